import random
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from branching import branching
from test_merging import distinct_and_executed

from arpo_trl.data import tags_sft_features
from arpo_trl.execution.executor import ToolCall, ToolExecutor
from arpo_trl.protocols import TagsProtocol
from arpo_trl.rewards.format import tags_format_error
from arpo_trl.rollout.engines import Sample
from arpo_trl.rollout.environments import RowTools
from arpo_trl.rollout.loop import Limits, RolloutHooks, run_waves
from arpo_trl.rollout.record import rollout_records
from arpo_trl.rollout.tree import group_parts
from arpo_trl.tools import tool
from arpo_trl.tools.search import BM25Search

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import demo_world  # noqa: E402
from demo_world import MISTAKES, SPLITS, World, build_model, build_tokenizer  # noqa: E402


@pytest.fixture(scope="module")
def world():
    return World(seed=0)


@pytest.fixture(scope="module")
def tokenizer(world):
    return build_tokenizer(world)


@pytest.fixture(scope="module")
def search(world):
    return BM25Search(world.passages, top_k=1).search


def calls_and_results(trace: str) -> list[tuple[str, str, str]]:
    return re.findall(r"<(search|python)>(.*?)</\1><result>(.*?)</result>", trace)


def test_same_seed_same_world():
    one, same, other = World(seed=3), World(seed=3), World(seed=4)
    assert one.passages == same.passages
    assert one.demonstrations() == same.demonstrations()
    assert one.rows("held_out") == same.rows("held_out")
    assert one.passages != other.passages
    assert one.rows("held_out") != other.rows("held_out")


def test_names_are_distinct(world):
    names = [*world.first_names, *world.last_names, *world.founded]
    assert len(set(names)) == len(names)


def test_splits_share_no_pair_of_entities(world):
    pairs = {split: [frozenset(q.entities) for q in world.questions(split)] for split in SPLITS}
    assert {split: len(of_split) for split, of_split in pairs.items()} == SPLITS
    assert len(set().union(*pairs.values())) == sum(SPLITS.values())


def test_splits_have_the_same_mix_of_questions(world):
    for split, size in SPLITS.items():
        kinds = Counter(question.kind for question in world.questions(split))
        for kind in ("older", "younger", "birthplace"):
            assert 0.15 < kinds[kind] / size < 0.5, (split, kinds)


def test_answers_follow_from_the_facts(world):
    for question in world.questions("held_out"):
        first, second = question.entities
        if question.kind == "birthplace":
            assert second == world.birthplace[first]
            expected = world.born[first] - world.founded[second]
        else:
            expected = world.born[second] - world.born[first]
            expected = expected if question.kind == "older" else -expected
        assert expected > 0
        assert question.answer == str(expected)


def test_search_finds_every_fact(world, search):
    for entity in (*world.born, *world.founded):
        assert search(world.query(entity)) == f"Page 1: {world.passage(entity)}"


@pytest.mark.parametrize("mistake", [None, *MISTAKES])
def test_results_in_a_trace_are_those_of_the_tools(world, search, mistake):
    for question in world.questions("held_out")[:20]:
        for name, body, result in calls_and_results(world.trace(question, mistake, guess=7)):
            # the code is a sum or difference of two years, written by the trace
            computed = str(eval(body.removeprefix("print(").removesuffix(")"))) if name == "python" else search(body)
            assert result == computed


def test_only_the_demonstration_without_mistake_is_right(world):
    question = world.questions("held_out")[0]
    right = f"<answer>\\boxed{{{question.answer}}}</answer>"
    for mistake in MISTAKES:
        assert not world.trace(question, mistake, guess=0).endswith(right), mistake
    trace = world.trace(question)
    assert trace.endswith(right)
    assert [name for name, _, _ in calls_and_results(trace)] == ["search", "search", "python"]


@pytest.mark.parametrize("mistake", [None, *MISTAKES])
def test_format_is_good_unless_the_box_is_missing(world, mistake):
    written = re.sub(r"<result>.*?</result>", "", world.trace(world.questions("rl")[0], mistake, guess=7))
    assert (tags_format_error(written) is None) == (mistake != "no_box")


def test_mistakes_have_their_stated_share_and_follow_a_tool_result(world):
    rows = world.demonstrations()
    shares = Counter(row["mistake"] for row in rows)
    for mistake, share in MISTAKES.items():
        assert shares[mistake] / len(rows) == pytest.approx(share, abs=0.015)
    question = world.questions("rl")[0]
    right = world.trace(question)
    for mistake in MISTAKES:
        wrong = world.trace(question, mistake, guess=7)
        parted = next(i for i, (a, b) in enumerate(zip(right, wrong, strict=False)) if a != b)
        assert "</result>" in right[:parted], mistake


def test_tokenizer_is_lossless(tokenizer):
    for text in (
        "Où est 東京? \t\n\r \x00 \U0001f600",
        "than  than than",
        "<result <search></searc",
        "3.14e-5\\boxed",
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_is_compact(world, tokenizer):
    def pieces(text):
        return [tokenizer.decode(token) for token in tokenizer.encode(text)]

    person = next(iter(world.born))
    first, last = person.split()
    assert pieces(f"<search>{person}</search>") == ["<search>", f"{first} ", last, "</search>"]
    assert pieces("<python>print(1987-34)</python>") == ["<python>", "print(", "19", "87", "-", "34", ")", "</python>"]
    assert pieces("<answer>\\boxed{53}</answer>") == ["<answer>", "\\boxed{", "53", "}", "</answer>"]


def test_a_name_is_the_same_tokens_wherever_it_stands(world, tokenizer):
    for question in world.questions("held_out")[:50]:
        ids = tokenizer.encode(question.text + world.trace(question))
        text = " ".join(map(str, ids))
        for entity in question.entities:
            name = " ".join(map(str, tokenizer.encode(entity)))
            expected = (question.text + world.trace(question)).count(entity)
            assert len(re.findall(rf"(?<!\d){name}(?!\d)", text)) == expected


def test_rollout_and_demonstration_have_the_same_tokens(world, tokenizer, search):
    """What the model reads in training is what the protocol appends in a rollout."""
    question = world.questions("cold_start")[0]
    person = question.entities[0]
    messages = [{"role": "user", "content": question.text}, {"role": "assistant", "content": world.trace(question)}]
    features = tags_sft_features(tokenizer, messages)
    protocol = TagsProtocol(tokenizer, ["search", "python"])
    result = protocol.result_ids([ToolCall("search", {"query": person}, search(person))])
    start = features["completion_mask"].index(0, features["completion_mask"].index(1))
    end = features["completion_mask"].index(1, start)
    assert features["input_ids"][start:end] == result
    assert tokenizer.decode(features["input_ids"]).endswith(world.trace(question) + "<|im_end|>")
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    assert features["input_ids"][: len(prompt)] == prompt


def test_rows_are_short_and_model_is_small(world, tokenizer):
    lengths = [len(tags_sft_features(tokenizer, row["messages"])["input_ids"]) for row in world.demonstrations()[:200]]
    assert max(lengths) <= 100
    model = build_model(tokenizer)
    assert model.num_parameters() < 3_000_000
    ids = torch.tensor([tokenizer.encode(demo_world.PHRASES[0])])
    assert model(ids).logits.shape == (1, ids.shape[1], len(tokenizer))


class Demonstrator:
    """Writes the segments of demonstrations, mistakes included, as a model does that the cold start has taught."""

    def __init__(self, world, tokenizer, seed):
        self.world, self.tokenizer, self.rng = world, tokenizer, random.Random(seed)
        self.questions = {question.text: question for question in world.questions("rl")}

    def sample(self, contexts, budgets):
        samples = []
        for context in contexts:
            text, _, written = self.tokenizer.decode(context).partition("\n")
            question = self.questions[text]
            traces = [self.world.trace(question, mistake, guess=7) for mistake in (None, *MISTAKES)]
            going_on = [trace for trace in traces if trace.startswith(written)]
            rest = self.rng.choice(going_on)[len(written) :]
            segment = re.match(r".*?(</search>|</python>|$)", rest, re.DOTALL)[0]
            ids = self.tokenizer.encode(segment)
            samples.append(
                Sample(
                    ids + [self.tokenizer.eos_token_id] * segment.endswith("</answer>"),
                    [self.rng.random() for _ in ids],
                )
            )
        return samples


@pytest.mark.parametrize("initial", [16, 8], ids=["GRPO", "ARPO"])
@pytest.mark.parametrize("rule", ["bernoulli", "expansion"])
def test_executed_calls_are_the_distinct_calls_of_each_group(world, tokenizer, search, initial, rule):
    def python(code: str) -> str:
        """Run code."""
        return str(eval(code.removeprefix("print(").removesuffix(")")))

    tools = [search, tool(python, deterministic=True)]
    by_name = {function.__name__: function for function in tools}
    questions, size = world.questions("rl")[:6], 16
    groups = group_parts(0, len(questions) * size, size, initial)
    trainer = SimpleNamespace(
        environment_factories=None,
        environments=None,
        tools=tools,
        _sync_tool_dicts=[by_name] * len(questions) * size,
        _async_tool_dicts=[{}] * len(questions) * size,
    )
    with ToolExecutor() as executor:
        row_tools = RowTools(trainer, executor, forks=True)
        row_tools.begin(groups)
        rows = run_waves(
            groups,
            [tokenizer.encode(question.text + "\n") for question in questions for _ in range(size)],
            TagsProtocol(tokenizer, list(by_name)),
            RolloutHooks(
                sample=Demonstrator(world, tokenizer, seed=1).sample,
                tools_of=row_tools.of,
                submit=row_tools.submit,
                on_wave=lambda wave: row_tools.next_wave(),
            ),
            branching(len(tokenizer), rule),
            Limits(completion=160, context=1000, tool_turns=4),
            random.Random(0),
            tokenizer.eos_token_id.__eq__,
        )
    rewards = {"right": [None] * len(rows)}
    written = rollout_records(0, groups, rewards, [0.0] * len(rows), None)
    counts = list(distinct_and_executed(written))
    assert len(counts) == len(questions) and all(executed == distinct > 1 for distinct, executed in counts)
    calls = [call for row in written for call in row["tool_calls"]]
    assert all(call["error"] is None and not call["refused"] for call in calls)
    assert len(calls) > 5 * sum(executed for _, executed in counts)
