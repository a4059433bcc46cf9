"""
Evaluation: an agent that answers with tools (`agent.py`), what asks and scores it (`evaluator.py`), the file that it
fills (`records.py`), what the scores say (`statistics.py`) and the published benchmarks (`benchmarks.py`).
"""

from .agent import Agent
from .evaluator import evaluate
from .statistics import bootstrap_interval, pass_at_k, summarize

__all__ = ["Agent", "bootstrap_interval", "evaluate", "pass_at_k", "summarize"]
