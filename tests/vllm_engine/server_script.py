"""What `test_server.py` launches, on two processes:
`accelerate launch … server_script.py <folder> <agent> <url> <schedule>`.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # `tiny`

import world  # noqa: E402
from server_weights import send_through_file  # noqa: E402


def main(folder: Path, agent: str, server: str, schedule: str):
    send_through_file()
    trainer = world.trainer(
        folder,
        agent,
        "chat_template",
        vllm_mode="server",
        vllm_server_base_url=server,
        per_device_train_batch_size=4,
        num_initial_generations=3,
        rollout_schedule=schedule,
    )
    waves, sample = [], trainer._engine.sample

    def counted(contexts, limits):
        waves.append(len(contexts))
        return sample(contexts, limits)

    trainer._engine.sample = counted
    trainer.train()
    facts = {"waves": waves, "logs": trainer.state.log_history}
    (folder / f"process-{trainer.accelerator.process_index}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
