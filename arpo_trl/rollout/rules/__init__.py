"""
When to fork: the branching rules, by the names that `ARPOConfig.branch_rule` takes.

A rule of one's own is a subclass of [`BranchRule`] (`base.py`): passed as an instance (`ARPOTrainer(branch_rule=...)`), or
named in the config as `"my_module:MyRule"`. Rules that decide while rows go on are in `probability.py`, those that wait
for a finished tree in `expansion.py`.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ...named import named
from .base import PROMPT, BranchRule, Node
from .expansion import Expansion, RandomExpansion
from .probability import Bernoulli, Chance, Threshold

__all__ = ["BRANCH_RULES", "PROMPT", "BranchRule", "Node", "branch_rule"]

BRANCH_RULES: Mapping[str, type[BranchRule]] = {
    "bernoulli": Bernoulli,
    "threshold": Threshold,
    "random": Chance,
    "expansion": Expansion,
    "random_expansion": RandomExpansion,
}
"""The rules of this package, by name; each class names its paper."""


def rule_class(name: str) -> type[BranchRule]:
    """
    The class that `branch_rule` names.

    Raises:
        ValueError: There is no such rule, or the class is none.
    """
    found = named(name, BRANCH_RULES, "branch_rule", "a class of your own as 'my_module:MyRule'")
    if not isinstance(found, type) or not issubclass(found, BranchRule):
        raise ValueError(
            f"`branch_rule` is {name!r}, which is no branching rule: make it a subclass of "
            "`arpo_trl.rollout.rules.BranchRule`."
        )
    return found


def branch_rule(rule: str | BranchRule, settings: Any) -> BranchRule:
    """
    The rule that a rollout follows.

    Args:
        rule (`str` or [`BranchRule`]): A name or an instance.
        settings ([`ARPOConfig`]): Fills the fields of a rule that is named: each gets the setting of its own name, and
            keeps its default where there is no such setting.
    """
    if isinstance(rule, BranchRule):
        return rule
    found = rule_class(rule)
    return found(
        **{field.name: getattr(settings, field.name) for field in fields(found) if hasattr(settings, field.name)}
    )
