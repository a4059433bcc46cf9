"""A branching rule and an attribution of a user's own: the code of docs/extending.md, run by the trainer."""

import json
import math
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import yaml
from scripted import plan, rollout
from trl import TrlParser

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.advantages import ATTRIBUTIONS, Span, check_spans, soft_advantages
from arpo_trl.rollout.rules import BRANCH_RULES, BranchRule, Node, branch_rule
from arpo_trl.rollout.rules.answers import decide, expand, priority
from arpo_trl.rollout.tree import Group, Segment, Trajectory
from arpo_trl.viewer.records import read_file

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text("utf-8")
RULE, ATTRIBUTION = "own_rule_of_the_page:AbsoluteEntropy", "own_rule_of_the_page:once"


@pytest.fixture(autouse=True)
def modules(tmp_path, monkeypatch):
    """A folder on the path of imports; `own_rule_of_the_page` there holds the Python blocks of the page."""
    folder = tmp_path / "modules"
    folder.mkdir()
    text = "\n".join(re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
    (folder / "own_rule_of_the_page.py").write_text(text, "utf-8")
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    sys.modules.pop("own_rule_of_the_page", None)


def search(query: str) -> str:
    """
    Search.

    Args:
        query: What to look for.
    """
    return "r"


# Sure (one token is possible) until after the tool result, where four are equally likely: H = ln 4 over one token
UNSURE = plan("A<search>q</search>?b", (19, "xyzw"))
SURE = plan("A<search>q</search>xb")


def config(folder, **settings) -> ARPOConfig:
    return ARPOConfig(str(folder), bf16=False, use_cpu=True, report_to="none", **settings)


# ------------------------------------------------------------------------------------------------------------- a rule


def test_the_rule_of_the_page_has_about_twenty_lines():
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "BranchRule" in block]
    assert len([line for line in block.splitlines() if line.strip()]) <= 20


def test_a_named_rule_decides_the_rollouts_of_the_trainer(tmp_path):
    records, trainer, _ = rollout(
        tmp_path / "run", [UNSURE], [search], 1, 4, branch_rule=RULE, branch_factor=3, entropy_window=1, seed=3
    )
    rule = trainer._branching.rule
    assert (type(rule).__name__, rule.branch_factor, rule.scale) == ("AbsoluteEntropy", 3, 1.0)
    _, decided = records[0]["segments"]
    # P = 1 − exp(−ln 4) = 3/4
    assert decided["entropy"] == pytest.approx(math.log(4), abs=1e-4)
    assert decided["branch_probability"] == pytest.approx(3 / 4, abs=1e-4)
    # One decision makes the three forks of `branch_factor`, or none
    assert decided["forks"] in (0, 3)
    kind = "fork" if decided["forks"] else "supplement"
    assert [record["kind"] for record in records] == ["initial", kind, kind, kind]


def test_a_sure_model_never_forks_by_it(tmp_path):
    records, _, _ = rollout(tmp_path / "run", [SURE], [search], 1, 2, branch_rule=RULE)
    assert records[0]["segments"][1]["branch_probability"] == pytest.approx(0.0, abs=1e-6)
    assert [record["kind"] for record in records] == ["initial", "supplement"]


def test_an_instance_is_passed_to_the_trainer_in_place_of_the_configs_rule(tmp_path):
    from own_rule_of_the_page import AbsoluteEntropy

    rule = AbsoluteEntropy(1, scale=1e-3)  # forks wherever there is any entropy
    records, trainer, _ = rollout(tmp_path / "run", [UNSURE], [search], 1, 2, rule=rule, branch_rule="bernoulli")
    assert trainer._branching.rule is rule
    assert [record["kind"] for record in records] == ["initial", "fork"]


def test_a_rule_of_ones_own_that_expands(tmp_path, modules):
    (modules / "expanding_rule.py").write_text(
        "from typing import ClassVar\n"
        "from arpo_trl.rollout.rules import BranchRule, sampled_nodes\n"
        "class Latest(BranchRule):\n"
        "    expands: ClassVar[bool] = True\n"
        "    def expand(self, group, rng):\n"
        "        return [max(sampled_nodes(group), key=lambda node: node.segment)]\n"
    )
    records, _, _ = rollout(tmp_path / "run", [SURE], [search], 1, 3, branch_rule="expanding_rule:Latest")
    assert [(record["kind"], record["parent"]) for record in records] == [("initial", None), ("fork", 0), ("fork", 0)]


def parsed(arguments, monkeypatch):
    """The config that examples/arpo.py makes of a command line."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from arpo import ARPOScriptArguments
    from trl import ModelConfig

    common = ["--dataset_name", "d", "--bf16", "False", "--use_cpu", "True", "--report_to", "none"]
    return TrlParser((ARPOScriptArguments, ARPOConfig, ModelConfig)).parse_args_and_config([*arguments, *common])[1]


def test_command_line_yaml_and_dict_keep_the_names(tmp_path, monkeypatch):
    out = ["--output_dir", str(tmp_path)]
    names = {"branch_rule": RULE, "advantage_attribution": ATTRIBUTION}
    flags = [part for name, value in names.items() for part in (f"--{name}", value)]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"branch_rule: {RULE}\nadvantage_attribution: {ATTRIBUTION}\n")
    torch.save(config(tmp_path, **names), tmp_path / "training_args.bin")
    told = config(tmp_path, **names).to_dict()

    for args in (
        parsed([*out, *flags], monkeypatch),
        parsed([*out, "--config", str(recipe)], monkeypatch),
        torch.load(tmp_path / "training_args.bin", weights_only=False),
        config(tmp_path, **{name: yaml.safe_load(yaml.safe_dump(told))[name] for name in names}),
        config(tmp_path, **{name: json.loads(json.dumps(told))[name] for name in names}),
    ):
        assert {name: getattr(args, name) for name in names} == names
        assert type(branch_rule(args.branch_rule, args)).__name__ == "AbsoluteEntropy"


def test_a_resumed_run_goes_on_with_the_rule(tmp_path):
    settings = {"branch_rule": RULE, "branch_factor": 3, "entropy_window": 1, "log_rollouts": True}

    def second_step(folder):
        rows, _ = read_file(folder / "rollouts" / "step-000001.jsonl.gz")
        return [row["completion_ids"] for row in rows]

    whole, halted = tmp_path / "whole", tmp_path / "halted"
    saving = {**settings, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    rollout(whole, [UNSURE], [search], 1, 4, **saving)
    rollout(halted, [UNSURE], [search], 1, 4, **{**saving, "max_steps": 1})
    _, trainer, _ = rollout(halted, [UNSURE], [search], 1, 4, resume=True, **saving)
    assert torch.load(halted / "checkpoint-1" / "training_args.bin", weights_only=False).branch_rule == RULE
    assert type(trainer._branching.rule).__name__ == "AbsoluteEntropy"
    assert second_step(halted) == second_step(whole)


BAD_RULES = """
from dataclasses import dataclass
from arpo_trl.rollout.rules import BranchRule

class NoRule:
    pass

@dataclass(frozen=True)
class Lacks(BranchRule):
    sharpness: float

class Bare(BranchRule):
    branch_factor: int

class Narrow(BranchRule):
    def expand(self, group):
        return []

def function():
    pass
"""


@pytest.mark.parametrize(
    "name, words",
    [
        (
            "no_such_rule",
            f"set it to one of {', '.join(map(repr, BRANCH_RULES))}, or to a class of your own as 'my_module:MyRule'",
        ),
        ("bad_rules:Missing", "cannot be imported (AttributeError"),
        ("bad_rules:NoRule", "is no branching rule: make it a subclass of `arpo_trl.rollout.rules.BranchRule`"),
        ("bad_rules:function", "is no branching rule"),
        ("bad_rules:Lacks", "cannot be made from the config"),
        (
            "bad_rules:Lacks",
            "'sharpness'). Give a default to each field that is none of `ARPOConfig`, or pass an instance",
        ),
        ("bad_rules:Bare", "`Bare` has the fields branch_factor and is no dataclass"),
        ("bad_rules:Narrow", "`Narrow.expand` has other parameters than (self, group, rng)"),
    ],
)
def test_what_is_no_rule_is_refused_by_the_config(tmp_path, modules, name, words):
    (modules / "bad_rules.py").write_text(BAD_RULES)
    try:
        with pytest.raises(ValueError) as caught:
            config(tmp_path, branch_rule=name)
    finally:
        sys.modules.pop("bad_rules", None)
    assert "`branch_rule`" in str(caught.value) and words in str(caught.value)


def test_a_class_in_place_of_an_instance_is_refused(tmp_path):
    from own_rule_of_the_page import AbsoluteEntropy

    with pytest.raises(ValueError, match=r"`branch_rule` is <class .*an instance goes to"):
        branch_rule(AbsoluteEntropy, config(tmp_path))


class Answers(BranchRule):
    """A rule that answers what it is told to."""

    expands: ClassVar[bool] = True

    def __init__(self, **answers):
        vars(self).update(answers)
        self.probability = lambda segment: answers.get("chance", 0.5)
        self.forks = lambda probability, rng: answers.get("count", 1)
        self.priority = lambda segment: answers.get("rank", 0.0)
        self.expand = lambda group, rng: answers["nodes"]


@pytest.mark.parametrize(
    "answers, words",
    [
        ({"chance": 1.5}, "`Answers.probability` returned 1.5; return a number between 0 and 1, or None."),
        ({"chance": math.nan}, "`Answers.probability` returned nan"),
        ({"chance": "much"}, "`Answers.probability` returned 'much'"),
        ({"count": -1}, "`Answers.forks` returned -1; return a whole number, 0 or more."),
        ({"count": 0.5}, "`Answers.forks` returned 0.5"),
        ({"rank": None}, "`Answers.priority` returned None; return a number."),
        ({"rank": math.nan}, "`Answers.priority` returned nan"),
    ],
)
def test_an_answer_about_a_segment_that_makes_no_sense_ends_the_run(answers, words):
    segment, rng = Segment(3, 5, 1.0, 1.0), random.Random(0)
    with pytest.raises(ValueError, match=re.escape(words)):
        decide(Answers(**answers), segment, rng)
        priority(Answers(**answers), segment)


@dataclass(frozen=True)
class Places(BranchRule):
    nodes: object

    def expand(self, group, rng):
        return self.nodes


class LatePlaces(Places):
    expands: ClassVar[bool] = True


@pytest.mark.parametrize(
    "kind, nodes, words",
    [
        (Places, [], "`Places.expand` returned []; return a list of at least one and at most 2 nodes."),
        (Places, [Node(0, 0)] * 3, "return a list of at least one and at most 2 nodes."),
        (Places, None, "`Places.expand` returned None"),
        (Places, [Node(0, 1)], "return `PROMPT` alone, or say `expands: ClassVar[bool] = True` in the class."),
        (
            LatePlaces,
            [Node(0, 2)],
            "returned [Node(row=0, segment=2)]; return nodes of `arpo_trl.rollout.rules.sampled",
        ),
        (LatePlaces, [Node(1, 0)], "return nodes of"),
        (LatePlaces, [(0, 1)], "return nodes of"),
    ],
)
def test_places_that_a_group_does_not_have_end_the_run(kind, nodes, words):
    row = Trajectory(0, [1])
    row.completion_ids = [2, 3, 4]
    for start in (0, 2):
        row.starts.append(row.end._replace(tokens=start))
        row.segments.append(Segment(start, start + 1))
    group = Group(range(3), 1, 3, 0, [row])
    with pytest.raises(ValueError, match=re.escape(words)):
        expand(kind(nodes), group, random.Random(0))
    assert expand(LatePlaces([Node(0, 1)]), group, random.Random(0)) == [Node(0, 1)]


# ------------------------------------------------------------------------------------------------------ an attribution


def test_a_named_attribution_reaches_the_loss_and_the_record(tmp_path, monkeypatch):
    seen = []
    stock = ARPOTrainer._generate_and_score_completions

    def watched(self, inputs):
        output = stock(self, inputs)
        seen.append(output["advantages"])
        return output

    monkeypatch.setattr(ARPOTrainer, "_generate_and_score_completions", watched)
    records, _, _ = rollout(
        tmp_path / "run",
        [UNSURE],
        [search],
        1,
        2,
        branch_rule="random",
        branch_probability=1.0,
        advantage_attribution=ATTRIBUTION,
        reward=lambda completions, **kwargs: [float(row) for row in range(len(completions))],
    )
    parent, fork = records
    token = fork["fork_token"]
    assert parent["shared_advantages"] == [
        {"start": 0, "end": 0, "advantage": 0.0},
        {"start": 0, "end": len(parent["completion_ids"]), "advantage": parent["advantage"]},
    ]
    assert [span["advantage"] for span in fork["shared_advantages"]] == [0.0, fork["advantage"]]
    assert fork["advantage"] == pytest.approx(-parent["advantage"]) != 0
    (advantages,) = seen  # (B, T)
    assert advantages[1, :token].tolist() == [0.0] * token
    assert advantages[1, token : len(fork["completion_ids"])].unique().tolist() == [pytest.approx(fork["advantage"])]


@pytest.mark.parametrize(
    "name, words",
    [
        (
            "mine",
            f"set it to one of {', '.join(map(repr, ATTRIBUTIONS))}, or to a function of your own as 'my_module:my_",
        ),
        ("math:pi", "is no function of (advantages, parents, fork_tokens, lengths)"),
        ("math:sqrt", "is no function of (advantages, parents, fork_tokens, lengths)"),
        ("math:missing", "cannot be imported (AttributeError"),
    ],
)
def test_what_is_no_attribution_is_refused_by_the_config(tmp_path, name, words):
    with pytest.raises(ValueError) as caught:
        config(tmp_path, advantage_attribution=name)
    assert f"`advantage_attribution` is {name!r}" in str(caught.value) and words in str(caught.value)


@pytest.mark.parametrize(
    "spans, words",
    [
        (None, "returned None for 2 rows; return a list of spans for each."),
        ([[Span(0, 4, 1.0)]], "for 2 rows"),
        ([[Span(0, 4, 1.0)], [(0, 2, 1.0)]], "returned [(0, 2, 1.0)] for row 1; return a list of"),
        ([[Span(0, 4, 1.0)], None], "returned None for row 1"),
        ([[Span(0, 4, 1.0)], [Span(0, 1, 1.0)]], "whose spans [(0, 1)] do not cover the 2 tokens of row 1"),
        ([[Span(0, 3, 1.0), Span(2, 4, 1.0)], [Span(0, 2, 1.0)]], "do not cover the 4 tokens of row 0"),
        ([[Span(0, 4, 1.0)], [Span(0, 2, math.nan)]], "returned the advantage nan for tokens 0 to 2 of row 1"),
        ([[Span(0, 4, 1.0)], [Span(0, 2, None)]], "returned the advantage None for tokens 0 to 2 of row 1"),
    ],
)
def test_spans_that_break_the_promise_are_refused(spans, words):
    with pytest.raises(ValueError) as caught:
        check_spans(spans, [4, 2], "my_module:mine")
    assert "`advantage_attribution` is 'my_module:mine', wh" in str(caught.value) and words in str(caught.value)


def test_spans_that_keep_it_pass():
    check_spans(soft_advantages([1.0, -1.0, 0.0], [None] * 3, [None] * 3, [4, 2, 0]), [4, 2, 0], "soft")
    check_spans([[Span(0, 0, 0.0), Span(0, 4, 1)], []], [4, 0], "my_module:mine")
