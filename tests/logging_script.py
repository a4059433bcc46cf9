"""What `test_logging.py` launches, since trackio reads where to write when it is imported:
`tests/logging_script.py <folder> <agent> <backend,…>`."""

import sys
from pathlib import Path

from datasets import Dataset
from processes_script import ROWS, agent


def main(folder: str, checkpoint: str, backends: str):
    trainer = agent(
        Path(folder) / "run",
        checkpoint,
        max_steps=3,
        report_to=backends.split(","),
        run_name="small",
        project="arpo-tests",
        log_completions=True,
        log_tree_steps=2,
        log_rollouts=True,
    )
    trainer.eval_dataset = Dataset.from_list(ROWS[:2])
    trainer.train()
    trainer.evaluate()


if __name__ == "__main__":
    main(*sys.argv[1:])
