"""What `test_logging.py` launches: `tests/logging_script.py <folder> <agent>`. A process of its own, since trackio
reads where to write when it is imported.

One run that logs to TensorBoard, trackio and Weights & Biases at once; what was logged goes to `<folder>/logs.json`.
"""

import json
import sys
from pathlib import Path

from datasets import Dataset
from processes_script import FIXED, ROWS, correct
from tiny import add
from transformers import AutoTokenizer

from arpo_trl import ARPOConfig, ARPOTrainer


def main(folder: str, checkpoint: str):
    settings = {
        "num_generations": 4,
        "num_initial_generations": 2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_completion_length": 100,
        "max_tool_calling_iterations": 2,
        "max_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "report_to": ["tensorboard", "trackio", "wandb"],
        "run_name": "small",
        "project": "tests",
        "log_completions": True,
        "log_tree_steps": 2,
    }
    trainer = ARPOTrainer(
        model=checkpoint,
        args=ARPOConfig(f"{folder}/run", **{**FIXED, **settings}),
        reward_funcs=correct,
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(ROWS[:1]),
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
        tools=[add],
    )
    trainer.train()
    Path(folder, "logs.json").write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    main(*sys.argv[1:])
