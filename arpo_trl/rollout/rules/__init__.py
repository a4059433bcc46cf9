"""
When to fork: the branching rules, by the names that `ARPOConfig.branch_rule` takes.

A rule of one's own is a subclass of [`BranchRule`] (`base.py`): passed as an instance
(`ARPOTrainer(branch_rule=...)`), or named in the config as `"my_module:MyRule"`. Rules that decide while rows go on
are in `probability.py`, those that wait for a finished tree in `expansion.py`, the one that waits for its rewards in
`contrast.py`. What a rule answers is held to what it
was asked in `answers.py`.
"""

from collections.abc import Mapping
from dataclasses import fields
from inspect import get_annotations, signature
from typing import Any

from ...named import named, takes
from .base import PROMPT, BranchRule, Node
from .contrast import Contrast
from .expansion import Expansion, RandomExpansion, sampled_nodes
from .probability import Bernoulli, Chance, Threshold

__all__ = ["BRANCH_RULES", "PROMPT", "BranchRule", "Node", "branch_rule", "sampled_nodes"]

BRANCH_RULES: Mapping[str, type[BranchRule]] = {
    "bernoulli": Bernoulli,
    "threshold": Threshold,
    "random": Chance,
    "expansion": Expansion,
    "random_expansion": RandomExpansion,
    "contrast": Contrast,
}
"""The rules of this package, by name; each class names its paper."""


def rule_class(name: str) -> type[BranchRule]:
    """
    The class that `branch_rule` names.

    Raises:
        ValueError: There is no such rule, or the class is none.
    """
    otherwise = "a class of your own as 'my_module:MyRule'; an instance goes to `ARPOTrainer(branch_rule=...)`"
    found = named(name, BRANCH_RULES, "branch_rule", otherwise)
    if not isinstance(found, type) or not issubclass(found, BranchRule):
        raise ValueError(
            f"`branch_rule` is {name!r}, which is no branching rule: make it a subclass of "
            "`arpo_trl.rollout.rules.BranchRule`."
        )
    return found


def check_rule(rule: type[BranchRule]) -> None:
    """
    Hold a class to what is known of a rule before it is asked anything.

    Raises:
        ValueError: A method has other parameters than that of [`BranchRule`], or fields stand in a class that is no
            dataclass, where no setting would fill them.
    """
    for method in ("probability", "forks", "priority", "expand"):
        parameters = list(signature(getattr(BranchRule, method)).parameters)
        if not takes(getattr(rule, method), len(parameters)):
            raise ValueError(
                f"`branch_rule`: `{rule.__name__}.{method}` has other parameters than ({', '.join(parameters)}), with "
                "which it is called. Give it these."
            )
    for kind in rule.__mro__[: rule.__mro__.index(BranchRule)]:
        bare = [name for name, told in get_annotations(kind).items() if "ClassVar" not in str(told)]
        if bare and "__dataclass_fields__" not in vars(kind):
            raise ValueError(
                f"`branch_rule`: `{kind.__name__}` has the fields {', '.join(bare)} and is no dataclass, so that no "
                "setting fills them. Put `@dataclass(frozen=True)` above the class."
            )


def branch_rule(rule: str | BranchRule, settings: Any) -> BranchRule:
    """
    The rule that a rollout follows.

    Args:
        rule (`str` or [`BranchRule`]): A name or an instance.
        settings ([`ARPOConfig`]): Fills the fields of a rule that is named: each gets the setting of its own name, and
            keeps its default where there is no such setting.

    Raises:
        ValueError: There is no such rule, it cannot be made from `settings`, or a method has other parameters than
        that
            of [`BranchRule`].
    """
    if isinstance(rule, BranchRule):
        check_rule(type(rule))
        return rule
    found = rule_class(rule)
    check_rule(found)
    values = {field.name: getattr(settings, field.name) for field in fields(found) if hasattr(settings, field.name)}
    try:
        return found(**values)
    except TypeError as error:
        raise ValueError(
            f"`branch_rule` is {rule!r}, which cannot be made from the config ({error}). Give a default to each field "
            f"that is none of `ARPOConfig`, or pass an instance: `ARPOTrainer(branch_rule={found.__name__}(...))`."
        ) from error
