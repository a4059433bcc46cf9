"""What `test_hub.py` launches with `HF_ENDPOINT` set: `tests/hub_script.py <folder> <agent>`. The stand-in is named
there.

Each scenario is a run of its own in `<folder>/<scenario>`; errors go to `<folder>/<scenario>.error` as they are shown.
"""

import sys
import traceback
from pathlib import Path

from processes_script import agent


def main(folder: str, checkpoint: str):
    scenarios = {
        "accepted": {"hub_token": "good", "hub_model_id": "team/agent", "hub_private_repo": True},
        "public": {"hub_token": "good"},
        "refused": {"hub_token": "bad"},
        "refused-at-once": {"hub_token": "bad", "push_to_hub": True},
        "revoked": {
            "hub_token": "brief",
            "push_to_hub": True,
            "save_strategy": "steps",
            "save_steps": 1,
            "max_steps": 2,
        },
    }
    (Path(folder) / "public").mkdir()
    (Path(folder) / "public" / ".gitignore").write_text("runs/\n")
    for name, settings in scenarios.items():
        try:
            trainer = agent(Path(folder) / name, checkpoint, **settings)
            trainer.model.config._name_or_path = "team/base"
            trainer.train()
            trainer.push_to_hub(dataset_name="team/questions", tags=["sums"])
        except Exception:
            (Path(folder) / f"{name}.error").write_text(traceback.format_exc())


if __name__ == "__main__":
    main(*sys.argv[1:])
