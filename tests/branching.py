"""Branching rules for tests that drive the rollout loop without a trainer."""

from dataclasses import fields
from types import SimpleNamespace

from arpo_trl import ARPOConfig
from arpo_trl.rollout.rules import BranchRule, branch_rule
from arpo_trl.rollout.steps import Branching

DEFAULTS = {field.name: field.default for field in fields(ARPOConfig)}


def rule(name: str, **settings) -> BranchRule:
    """The rule of a config with these settings, and the defaults of the others."""
    return branch_rule(name, SimpleNamespace(**{**DEFAULTS, **settings}))


def branching(vocab_size: int, name: str = "bernoulli", entropy_window: int = 20, **settings) -> Branching:
    return Branching(rule(name, **settings), entropy_window, vocab_size)
