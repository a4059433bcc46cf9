import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from arpo_trl.data import tags_sft_features
from arpo_trl.rewards.format import tags_format_error

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from demo_world import SPLITS, build_tokenizer  # noqa: E402
from hard_world import MAX_CALLS, MISTAKES, RUMOURS, HardWorld  # noqa: E402


@pytest.fixture(scope="module")
def world():
    return HardWorld(seed=0)


def calls_and_results(trace: str) -> list[tuple[str, str, str]]:
    return re.findall(r"<(search|python)>(.*?)</\1><result>(.*?)</result>", trace, re.DOTALL)


def test_same_seed_same_world(world):
    same, other = HardWorld(seed=0), HardWorld(seed=1)
    assert world.passages == same.passages
    assert world.rows("held_out") == same.rows("held_out")
    assert world.passages != other.passages


def test_splits_share_no_pair_of_entities(world):
    pairs = {split: {frozenset(q.entities) for q in world.questions(split)} for split in SPLITS}
    assert len(set().union(*pairs.values())) == sum(SPLITS.values())


def test_answers_follow_from_the_facts(world):
    for question in world.questions("held_out"):
        child, last = question.entities
        parent = world.born[world.parent[child]]
        if question.kind == "birthplace":
            assert last == world.birthplace[world.parent[child]]
            expected = parent - world.founded[last]
        else:
            expected = abs(parent - world.born[last])
        assert question.answer == str(expected)
        assert expected > 0


def test_search_finds_the_fact_and_contradicts_it(world):
    people = [*world.born][:200] + [*world.born][-200:]
    results = {person: world.search(f"birth of {person}") for person in people}
    facts = [f"birth of {person} was in {world.born[person]} in" in result for person, result in results.items()]
    assert sum(facts) / len(facts) > 0.97  # the rest is buried under namesakes
    rumours = [
        f"birth of {person} was perhaps in {world.rumoured[person]}" in results[person]
        for person in people
        if person in world.rumoured
    ]
    assert sum(rumours) / len(rumours) > 0.9
    assert len(rumours) / len(people) == pytest.approx(RUMOURS, abs=0.1)
    assert all(world.rumoured[person] != world.born[person] for person in world.rumoured)
    # a rumour stands first about as often as second, so that place does not tell it
    first = [" perhaps" in result.split("\n")[0] for person, result in results.items() if person in world.rumoured]
    assert 0.3 < sum(first) / len(first) < 0.7


def test_the_right_trace_needs_every_call_there_is(world):
    for question in world.questions("held_out")[:50]:
        trace = world.trace(question)
        assert [name for name, _, _ in calls_and_results(trace)] == ["search", "search", "search", "python"]
        assert trace.endswith(f"<answer>\\boxed{{{question.answer}}}</answer>")
        repeated = world.trace(question, "repeat_first")
        assert len(calls_and_results(repeated)) == MAX_CALLS and "python" not in repeated


@pytest.mark.parametrize("mistake", [None, *MISTAKES])
def test_results_in_a_trace_are_those_of_the_tools(world, mistake):
    for question in world.questions("held_out")[:20]:
        for name, body, result in calls_and_results(world.trace(question, mistake, guess=7)):
            computed = world.search(body)
            if name == "python":  # a difference of two years, written by the trace
                minuend, subtrahend = body.removeprefix("print(").removesuffix(")").split("-")
                computed = str(int(minuend) - int(subtrahend))
            assert result == computed


def test_mistakes_are_wrong_but_for_a_rumour_that_there_is_not(world):
    for question in world.questions("held_out")[:50]:
        right = f"<answer>\\boxed{{{question.answer}}}</answer>"
        told = {world.parent[question.entities[0]], question.entities[1]} & {*world.rumoured}
        assert world.trace(question, "believe_rumour").endswith(right) == (not told)
        for mistake in {*MISTAKES} - {"believe_rumour", "skip_parent"}:
            assert not world.trace(question, mistake, guess=0).endswith(right), mistake


def test_format_is_good_unless_the_box_is_missing(world):
    for mistake in (None, *MISTAKES):
        written = re.sub(r"<result>.*?</result>", "", world.trace(world.questions("rl")[0], mistake), flags=re.DOTALL)
        assert (tags_format_error(written) is None) == (mistake != "no_box"), mistake


def test_rows_fit_and_tokens_are_lossless(world):
    tokenizer = build_tokenizer(world)
    shares = Counter()
    for question in world.questions("rl")[:40]:
        for mistake in (None, *MISTAKES):
            messages = [{"role": "user", "content": question.text}]
            trace = world.trace(question, mistake)
            assert tokenizer.decode(tokenizer.encode(trace)) == trace
            ids = tags_sft_features(tokenizer, [*messages, {"role": "assistant", "content": trace}])["input_ids"]
            shares[len(ids) <= 140] += 1
    assert shares == {True: 40 * (1 + len(MISTAKES))}
