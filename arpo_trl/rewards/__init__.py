"""Reward functions: TRL's signature, usable in plain TRL.

`completions.py` reads a completion (the model's own text, its answer, the tools it ran); `qa.py` exact match and token
F1; `mathematics.py` mathematics; `judge.py` an LLM's verdict; `format.py` the protocols' formats; `composite.py` the
paper's reward, made of the others.

A reward function takes `completions` and the dataset's columns and returns one float per row, or `None` for a row it
has nothing to say about. A new one goes into a file of its own and needs no entry anywhere but here.
"""

from .completions import executed_tools, extract_answer, extract_boxed
from .composite import arpo_chat_reward, arpo_reward, make_arpo_reward
from .format import chat_format_error, chat_format_reward, tags_format_error, tags_format_reward
from .judge import make_judge_reward
from .mathematics import MathVerifier, math_reward
from .qa import exact_match, exact_match_reward, normalize_answer, token_f1, token_f1_reward

__all__ = [
    "MathVerifier",
    "arpo_chat_reward",
    "arpo_reward",
    "chat_format_error",
    "chat_format_reward",
    "exact_match",
    "exact_match_reward",
    "executed_tools",
    "extract_answer",
    "extract_boxed",
    "make_arpo_reward",
    "make_judge_reward",
    "math_reward",
    "normalize_answer",
    "tags_format_error",
    "tags_format_reward",
    "token_f1",
    "token_f1_reward",
]
