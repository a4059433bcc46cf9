r"""The published ARPO data as TRL datasets, for both protocols, with its damage repaired.

```python
from arpo_trl.data import load_cold_start, load_rl

train = load_rl("dongguanting/ARPO-RL-Reasoning-10K")              # or a local .parquet; for GRPOTrainer, ARPOTrainer
sft = load_cold_start("final_sft.jsonl", protocol="chat_template")  # for SFTTrainer
```

RL sets are in `rl.py`, cold-start traces in `cold_start.py`, what is repaired in `repair.py`, reading of local files
in `files.py`. `python -m arpo_trl.data FILE…` prints what was repaired (`report.py`).
"""

from .cold_start import (
    TOOL_ARGUMENTS,
    TOOL_SCHEMAS,
    load_cold_start,
    sharegpt_messages,
    tags_sft_features,
    trace_messages,
)
from .repair import repair_answer, repair_text
from .report import repair_counts, report, suspect_truths, unread_truths
from .rl import CHAT_SYSTEM_PROMPT, convert_rl_row, load_rl

__all__ = [
    "CHAT_SYSTEM_PROMPT",
    "TOOL_ARGUMENTS",
    "TOOL_SCHEMAS",
    "convert_rl_row",
    "load_cold_start",
    "load_rl",
    "repair_answer",
    "repair_counts",
    "repair_text",
    "report",
    "sharegpt_messages",
    "suspect_truths",
    "tags_sft_features",
    "trace_messages",
    "unread_truths",
]
