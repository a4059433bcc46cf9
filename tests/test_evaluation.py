"""An agent outside of training: same rollout as the trainer's, scores, pass@k, going on after a kill, the benchmarks'
script, and what the viewer shows of it."""

import importlib.util
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import tiny
import torch
from loopback import Loopback, http
from scripted import END, PROMPT, ScriptedModel, character_tokenizer, plan
from transformers import AutoModelForCausalLM, AutoTokenizer
from viewer_samples import open_browser, write_run

from arpo_trl.evaluation import Agent, bootstrap_interval, evaluate, pass_at_k, summarize
from arpo_trl.protocols import mark_checkpoint
from arpo_trl.viewer import render
from arpo_trl.viewer.records import find_benchmarks, read_file

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def script(monkeypatch):
    """examples/evaluate.py as a module."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("evaluate_script", EXAMPLES / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "evaluate_script", module)
    spec.loader.exec_module(module)
    return module


def search(query: str) -> str:
    """
    Search.

    Args:
        query: What to look for.
    """
    return "found " + query


def scripted_agent(plans, **settings):
    tokenizer = character_tokenizer()
    search.__name__ = "s"
    agent = Agent(ScriptedModel(tokenizer, plans).eval(), tokenizer, [search], tool_protocol="tags", **settings)
    agent.generation_config.use_cache = False
    return agent


def score(completions, answer, **kwargs):
    return [float(right in completion) for completion, right in zip(completions, answer, strict=True)]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_scores_calls_and_pass_at_k(tmp_path):
    agent = scripted_agent([plan("A<s>q</s>yes"), plan("Bno")], batch_size=4)
    rows = [{"prompt": "Q?", "answer": "yes"}, {"prompt": "Q?", "answer": "maybe"}]
    records = evaluate(agent, rows, score, num_generations=2, records_path=tmp_path / "records.jsonl")
    assert [record["scores"] for record in records] == [[1.0, 0.0], [0.0, 0.0]]
    assert records[0]["completions"][0] == "A<s>q</s><result>found q</result>yes"
    assert [len(calls) for calls in records[0]["tool_calls"]] == [1, 0]
    summary = summarize(records, ks=(1, 2, 3))
    assert summary["accuracy"] == summary["pass@1"] == 0.25 and summary["pass@2"] == 0.5 and "pass@3" not in summary
    assert summary["calls_per_completion"] == 0.5 and summary["truncated"] == 0
    agent.close()


def test_a_line_is_a_rollout_record_and_more(tmp_path):
    from arpo_trl.rollout.record import rollout_records
    from arpo_trl.rollout.tree import Group, Trajectory

    agent = scripted_agent([plan("A<s>q</s>yes"), plan("Bno")], batch_size=3)
    rows = [{"prompt": PROMPT, "question": f"{i}?", "answer": "yes"} for i in range(2)]

    def half(completions, **columns):
        return [0.5] * len(completions)

    evaluate(agent, rows, half, num_generations=2, records_path=tmp_path / "a.jsonl", correct=score)
    agent.close()

    records = lines(tmp_path / "a.jsonl")
    empty = rollout_records(0, [Group(range(1), 1, 1, 0, [Trajectory(0, [])])], {}, [0.0], None)[0]
    assert set(records[0]) == {
        *empty,
        *("question", "answer", "completion", "prediction", "score", "correct", "seconds"),
        *("sampling", "scored_with"),
    }
    assert [(record["prompt_index"], record["row"], record["question"]) for record in records] == [
        *((0, 0, "0?"), (0, 1, "0?"), (1, 0, "1?"), (1, 1, "1?")),
    ]
    # batches hold one question here, whose first row follows the first plan
    assert [(record["score"], record["correct"]) for record in records] == [(0.5, True), (0.5, False)] * 2
    assert records[0]["rewards"] == {"half": 0.5, "score": 1.0}
    assert [records[0][key] for key in ("step", "advantage", "shared_advantages", "parent")] == [None] * 4
    text = agent.tokenizer.decode(records[0]["completion_ids"])
    assert text == "A<s>q</s><result>found q</result>yes" + END
    assert records[0]["tool_mask"] == [int(not 9 <= i < 33) for i in range(len(records[0]["completion_ids"]))]


def test_two_tools_of_one_name_are_refused_and_one_given_twice_is_one():
    def other(query: str) -> str:
        """Another tool."""

    tokenizer = character_tokenizer()
    model = ScriptedModel(tokenizer, [plan("Ano")]).eval()
    search.__name__ = other.__name__ = "s"
    with pytest.raises(ValueError, match="`tools` holds two tools named 's'"):
        Agent(model, tokenizer, [search, other], tool_protocol="tags")
    assert Agent(model, tokenizer, [search, search], tool_protocol="tags").tools == {"s": search}


def test_what_a_score_function_changes_in_place_is_neither_recorded_nor_judged(tmp_path):
    def careless(completions, tool_calls, completion_ids, answer, **columns):
        for calls, ids in zip(tool_calls, completion_ids, strict=True):
            calls.clear()
            ids.clear()
        completions[:] = answer
        return [0.0] * len(completions)

    agent = scripted_agent([plan("A<s>q</s>yes")])
    rows = [{"prompt": PROMPT, "answer": "yes"}]
    evaluate(agent, rows, careless, records_path=tmp_path / "a.jsonl", correct=score)
    agent.close()
    (record,) = lines(tmp_path / "a.jsonl")
    assert [call["name"] for call in record["tool_calls"]] == ["s"] and record["completion_ids"]
    assert record["completion"].endswith("</result>yes") and record["correct"]


def test_a_question_may_take_several_batches(tmp_path):
    agent = scripted_agent([plan("A<s>q</s>yes"), plan("Bno")], batch_size=2)
    evaluate(agent, [{"prompt": PROMPT, "answer": "yes"}] * 2, score, num_generations=3, records_path=tmp_path / "a")
    records = lines(tmp_path / "a")
    assert agent.model.batches == [2, 1, 1, 1] * 2  # two rows, the first after its call; one row, after its call
    assert [(record["prompt_index"], record["row"]) for record in records] == [
        (i, j) for i in (0, 1) for j in range(3)
    ]
    assert [record["score"] for record in records] == [1.0, 0.0, 1.0] * 2
    agent.close()


def test_an_interrupted_evaluation_goes_on(tmp_path):
    """Sampled completions are kept where scoring ends it, and scored when it goes on; others are not asked again."""
    path = tmp_path / "records.jsonl"
    rows = [{"prompt": "Q?", "answer": "yes"}] * 4
    asked = []

    def counting(completions, **kwargs):
        asked.append(len(completions))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return [1.0] * len(completions)

    agent = scripted_agent([plan("Ayes")], batch_size=1)
    with pytest.raises(KeyboardInterrupt):
        evaluate(agent, rows, counting, records_path=path)
    assert [record["score"] for record in lines(path)] == [1.0, 1.0, None] and len(agent.model.batches) == 3
    with path.open("a") as file:
        file.write('{"index": 3, "sco')  # killed in mid-write
    records = evaluate(agent, rows, counting, records_path=path)
    assert len(agent.model.batches) == 4 and [record["index"] for record in records] == [0, 1, 2, 3]
    assert [record["score"] for record in lines(path)] == [1.0] * 4
    assert evaluate(agent, rows, counting, records_path=path) == records and len(agent.model.batches) == 4
    agent.close()


@pytest.mark.parametrize("cut", ["a line", "a question", "the line feed", "in the middle"])
def test_a_damaged_file_is_repaired_and_loses_no_whole_question(tmp_path, cut):
    path = tmp_path / "records.jsonl"
    rows = [{"prompt": PROMPT, "answer": str(i)} for i in range(3)]
    agent = scripted_agent([plan("Ayes")], batch_size=2)
    evaluate(agent, rows, score, num_generations=2, records_path=path)
    whole = path.read_bytes()
    each = whole.splitlines(keepends=True)
    damaged = {
        "a line": b"".join(each[:5]) + each[5][:40],
        "a question": b"".join(each[:5]),
        "the line feed": whole[:-1],
        "in the middle": each[0] + each[1] + each[2][:40] + each[4] + each[5],  # half a line with another behind it
    }[cut]
    path.write_bytes(damaged)
    agent.model.batches.clear()
    evaluate(agent, rows, score, num_generations=2, records_path=path)
    again = 2 if cut == "in the middle" else 1
    assert len(agent.model.batches) == again
    records = lines(path)
    assert sorted((record["prompt_index"], record["row"]) for record in records) == [
        (i, row) for i in range(3) for row in range(2)
    ]
    assert [line for line in path.read_bytes().splitlines(keepends=True)][:2] == each[:2]
    assert sorted(os.listdir(tmp_path)) == ["records.jsonl"]
    agent.close()


def test_records_of_other_questions_are_refused(tmp_path):
    path = tmp_path / "records.jsonl"
    agent = scripted_agent([plan("Ayes")], batch_size=2)
    rows = [{"prompt": PROMPT, "question": "one?", "answer": "yes"}]
    evaluate(agent, rows, score, num_generations=2, records_path=path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="holds other questions: number 0 was 'one\\?'"):
        evaluate(agent, [rows[0] | {"question": "two?"}], score, num_generations=2, records_path=path)
    with pytest.raises(ValueError, match="holds 2 completions of a question, and num_generations is 1"):
        evaluate(agent, rows, score, num_generations=1, records_path=path)
    assert path.read_bytes() == before
    agent.close()


def test_corrected_truths_and_other_functions_are_scored_again_without_being_sampled(tmp_path):
    path = tmp_path / "records.jsonl"
    agent = scripted_agent([plan("Ayes")], batch_size=2)
    rows = [{"prompt": PROMPT, "question": "Q?", "answer": answer} for answer in ("no", "yes")]

    def verdicts(rows, score=score, **options):
        agent.model.batches.clear()
        records = evaluate(agent, rows, score, records_path=path, **options)
        return [record["correct"][0] for record in records], len(agent.model.batches)

    assert verdicts(rows) == ([False, True], 1)
    before = path.read_bytes()
    assert verdicts(rows) == ([False, True], 0) and path.read_bytes() == before
    corrected = [rows[0] | {"answer": "yes"}, rows[1]]
    assert verdicts(corrected) == ([True, True], 0)
    assert [record["answer"] for record in lines(path)] == ["yes", "yes"]
    assert verdicts(rows[::-1]) == ([True, False], 0)  # equal prompts that changed places
    assert verdicts(corrected, lambda completions, **columns: [0.0] * len(completions)) == ([False, False], 0)
    assert verdicts(corrected) == ([True, True], 0)
    assert verdicts(corrected, correct=lambda completions, **columns: [0.0] * len(completions)) == ([False] * 2, 0)

    def at_least(limit):
        return lambda completions, **columns: [float(len(text) >= limit) for text in completions]

    assert verdicts(corrected, at_least(3)) == ([True, True], 0)
    assert verdicts(corrected, at_least(30)) == ([False, False], 0)  # the same code with another constant
    assert verdicts(corrected, partial(score, weight=2)) == ([True, True], 0)
    agent.close()


def test_a_score_is_known_again_in_another_process(tmp_path):
    """A hash that depended on an address or on the order of a set would score everything again at each start."""
    script = (
        "from arpo_trl.evaluation.records import scoring_hashes\n"
        "from arpo_trl.rewards import arpo_reward, make_judge_reward, math_reward\n"
        "judges = [make_judge_reward('http://localhost/v1', name, api_key=name) for name in 'ab']\n"
        "own = lambda completions, **columns: [text in {'yes', 'aye', 'si'} for text in completions]\n"
        "row = {'prompt': 'q', 'answer': ['a', {'b': 1.5}]}\n"
        "for functions in ([own], [math_reward], [arpo_reward], judges[:1], judges[1:]):\n"
        "    print(*scoring_hashes(functions, [row]))\n"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | {"PYTHONHASHSEED": seed}
        )
        for seed in "12"
    ]
    assert runs[0].returncode == 0, runs[0].stderr
    assert runs[0].stdout == runs[1].stdout and len(set(runs[0].stdout.split())) == 5


def test_completions_of_another_prompt_or_other_settings_are_refused(tmp_path):
    path = tmp_path / "records.jsonl"
    row = {"prompt": PROMPT, "question": "one?", "answer": "yes"}
    agent = scripted_agent([plan("Ayes")])
    evaluate(agent, [row], score, records_path=path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="completions of another prompt to question number 0: its system prompt"):
        evaluate(agent, [row | {"prompt": "Be brief. " + PROMPT}], score, records_path=path)
    agent.close()
    for settings, told in (
        ({"temperature": 0.5}, "temperature was 1.0 and is 0.5"),
        ({"top_p": 0.9, "top_k": 5}, "top_p was 1.0 and is 0.9, top_k was 0 and is 5"),
        ({"max_completion_length": 77}, "max_completion_length was 1024 and is 77"),
        ({"repetition_penalty": 1.1}, "repetition_penalty was 1.0 and is 1.1"),
    ):
        other = scripted_agent([plan("Ayes")], **settings)
        with pytest.raises(
            ValueError, match=f"holds completions of other settings: {told}. Evaluate into another file"
        ):
            evaluate(other, [row], score, records_path=path)
        other.close()
    fast = scripted_agent([plan("Ayes")], batch_size=7, tool_timeout=3.0)  # nothing that a completion depends on
    evaluate(fast, [row], score, records_path=path)
    fast.close()
    assert path.read_bytes() == before


def test_a_file_of_version_0_1_0_goes_on_and_is_scored_again(tmp_path):
    path = tmp_path / "records.jsonl"
    agent = scripted_agent([plan("Ayes")])
    rows = [{"prompt": PROMPT, "answer": "yes"}] * 2
    evaluate(agent, rows, score, records_path=path)
    old = [{**record, "score": 0.0, "correct": False} for record in lines(path)]
    for record in old:
        del record["sampling"], record["scored_with"]
    path.write_text("".join(json.dumps(record) + "\n" for record in old))
    agent.model.batches.clear()
    assert [record["correct"] for record in evaluate(agent, rows, score, records_path=path)] == [[True]] * 2
    assert agent.model.batches == []
    agent.close()


@pytest.mark.parametrize("line", ['{"prompt_index": 0, "reward": 1}', "[]", "null", '{"prompt_index": -1}'])
def test_a_file_that_holds_something_else_is_left_alone(tmp_path, line):
    path = tmp_path / "records.jsonl"
    path.write_text(line + "\n")
    agent = scripted_agent([plan("Ayes")])
    with pytest.raises(ValueError, match="records.jsonl, line 1 is no record of an evaluation"):
        evaluate(agent, [{"prompt": PROMPT, "answer": "yes"}], score, records_path=path)
    assert path.read_text() == line + "\n"
    agent.close()


def test_what_is_returned_has_the_keys_of_the_file(tmp_path):
    agent = scripted_agent([plan("A<s>q</s>yes"), plan("Bno")], batch_size=4)
    rows = [{"prompt": PROMPT, "answer": "yes"}] * 2
    returned = evaluate(agent, rows, score, num_generations=2, records_path=tmp_path / "records.jsonl")
    agent.close()
    written = lines(tmp_path / "records.jsonl")
    assert [record for question in returned for record in question["records"]] == written
    for question in returned:
        for name in ("score", "completion", "prediction"):
            assert question[name + "s"] == [record[name] for record in question["records"]]
        for name in ("correct", "truncated", "tool_calls"):
            assert question[name] == [record[name] for record in question["records"]]


def test_a_prompt_that_overflows_loses_nothing_else():
    agent = scripted_agent([plan("Ayes")], batch_size=3)
    agent.limits.context = 50
    rows = [{"prompt": prompt, "answer": "yes"} for prompt in ("Q?", "x" * 100 + "Q?", "Q?")]
    records = evaluate(agent, rows, score)
    assert [record["scores"][0] for record in records] == [1.0, 0.0, 1.0]
    assert [record["truncated"][0] for record in records] == [False, True, False]
    agent.close()


def test_tools_that_die_lose_nothing_else(tmp_path):
    def s(query: str) -> str:
        """
        Search.

        Args:
            query: What to look for.
        """
        if query == "q":
            raise SystemExit("gone")
        raise MemoryError

    tokenizer = character_tokenizer()
    plans = [plan("A<s>q</s>yes"), plan("B<s>r</s>yes"), plan("Cyes")]
    agent = Agent(ScriptedModel(tokenizer, plans).eval(), tokenizer, [s], tool_protocol="tags", batch_size=3)
    agent.generation_config.use_cache = False
    records = evaluate(agent, [{"prompt": PROMPT, "answer": "yes"}] * 3, score, records_path=tmp_path / "a.jsonl")
    assert [record["scores"] for record in records] == [[1.0]] * 3
    assert [bool(call["error"]) for record in records for call in record["tool_calls"][0]] == [True, True]
    agent.close()


def test_the_chat_template_protocol(agent_dirs, tokenizer):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(agent_dirs["chat_template"]).eval()
    agent = Agent(model, tokenizer, [tiny.add], max_completion_length=200, max_tool_calling_iterations=3)
    trajectories = agent.rollout([tiny.question(a, 3) for a in range(8)])
    assert any(trajectory.calls for trajectory in trajectories)
    for trajectory in trajectories:
        messages = agent.completion(trajectory, tiny.question(1, 3))
        assert all(message["role"] in ("assistant", "tool") for message in messages)
        assert len([m for m in messages if m["role"] == "tool"]) <= len(trajectory.calls)
    agent.close()


def test_pass_at_k_is_unbiased():
    # 5 samples, 2 right: 1 − C(3, k) / C(5, k)
    assert pass_at_k(5, 2, 1) == pytest.approx(0.4)
    assert pass_at_k(5, 2, 3) == pytest.approx(1 - 1 / 10)
    assert pass_at_k(5, 2, 4) == 1.0 and pass_at_k(5, 0, 5) == 0.0


def test_bootstrap_interval():
    low, high = bootstrap_interval([0.0, 1.0] * 200)
    assert low < 0.5 < high and high - low == pytest.approx(4 * 0.5 / math.sqrt(400), abs=0.02)
    assert bootstrap_interval([1.0] * 5) == (1.0, 1.0)


def test_a_summary_by_hand():
    def question(scores, correct):
        return {
            "scores": scores,
            "correct": correct,
            "tool_calls": [[{}] * place for place in range(len(scores))],
            "truncated": [False] * (len(scores) - 1) + [True],
            "seconds": 3.0,
        }

    records = [
        question([1.0, 0.5, 0.0, 0.0], [True, False, False, False]),
        question([None, None, 0.8, 1.0], [None, None, False, True]),
        question([None] * 4, [None] * 4),
    ]
    summary = summarize(records, ks=(1, 2, 3, 4, 5))
    assert summary["score"] == pytest.approx((1.5 / 4 + 1.8 / 2) / 2)
    assert summary["accuracy"] == summary["pass@1"] == pytest.approx((1 / 4 + 1 / 2) / 2)
    assert summary["pass@2"] == pytest.approx(((1 - 3 / 6) + 1) / 2)
    assert summary["pass@3"] == pytest.approx(1 - 1 / 4)  # of the one question with three scored completions
    assert summary["pass@4"] == 1.0 and "pass@5" not in summary
    assert summary["unscored"] == 6 and summary["questions"] == 3 and summary["completions_per_question"] == 4
    assert summary["calls_per_completion"] == 1.5 and summary["truncated"] == 0.25
    assert summary["seconds_per_question"] == 3.0
    assert summary["pass@1_low"] == 0.25 and summary["pass@1_high"] == 0.5  # of two questions, all resamples
    with pytest.raises(ValueError, match="No completion has a score"):
        summarize(records[2:])


# ------------------------------------------------------------------------------------------------------------ vLLM


@dataclass
class SamplingParams:
    """The fields of vLLM's that are used, under its names and with its defaults."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None
    max_tokens: int | None = 16
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False


class ScriptedEngine:
    """Stands in for `vllm.LLM`: greedy, over a model of the transformers library."""

    def __init__(self, model, tokenizer):
        self.model = model
        self.tokenizer = tokenizer
        self.asked = []
        eos = {"eos_token_id": [tokenizer.eos_token_id]}
        config = SimpleNamespace(max_model_len=4096, get_vocab_size=lambda: 70, try_get_generation_config=lambda: eos)
        self.llm_engine = SimpleNamespace(model_config=config)

    @torch.no_grad()
    def generate(self, prompts, sampling_params=None, *, use_tqdm=True):
        self.asked.append(sampling_params)
        outputs = []
        for row, (prompt, params) in enumerate(zip(prompts, sampling_params, strict=True)):
            ids = list(prompt["prompt_token_ids"])
            start = len(ids)
            while True:
                text = self.tokenizer.decode(ids).partition(PROMPT)[2]
                ids.append(int(self.model.next_logits(row, text).argmax()))
                written = self.tokenizer.decode(ids[start:], skip_special_tokens=params.skip_special_tokens)
                stopped = ids[-1] in params.stop_token_ids or any(stop in written for stop in params.stop)
                if stopped or len(ids) - start == params.max_tokens:
                    break
            outputs.append(
                SimpleNamespace(
                    prompt_token_ids=[], num_cached_tokens=0, outputs=[SimpleNamespace(token_ids=tuple(ids[start:]))]
                )
            )
        return outputs


def test_vllm_samples_what_transformers_samples(monkeypatch, tmp_path):
    vllm = ModuleType("vllm")
    vllm.SamplingParams = SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    plans = [plan("A<s>q</s>yes"), plan("B<s>rr</s><s>q</s>"), plan("C" + "x" * 60)]
    settings = {"max_completion_length": 50, "batch_size": 3, "top_p": 0.9, "top_k": 7}
    reference = scripted_agent(plans, **settings)
    tokenizer = reference.tokenizer
    engine = ScriptedEngine(ScriptedModel(tokenizer, plans), tokenizer)
    agent = Agent(engine, tokenizer, [search], tool_protocol="tags", **settings)
    rows = [{"prompt": PROMPT, "answer": "yes"}] * 3

    expected = evaluate(reference, rows, score, records_path=tmp_path / "a.jsonl")
    records = evaluate(agent, rows, score, records_path=tmp_path / "b.jsonl")

    assert [r["completions"] for r in records] == [r["completions"] for r in expected]
    assert [r["truncated"] for r in records] == [[False], [True], [True]]
    for ours, theirs in zip(lines(tmp_path / "b.jsonl"), lines(tmp_path / "a.jsonl"), strict=True):
        assert all(ours[key] == theirs[key] for key in ("completion_ids", "tool_mask", "score", "truncated"))
        assert [segment["entropy"] for segment in ours["segments"]] == [None] * len(theirs["segments"])
    assert [params.max_tokens for params in engine.asked[0]] == [50] * 3  # each row's own limit, in every wave
    assert [params.max_tokens for params in engine.asked[1]] == [50 - 9 - 24, 50 - 10 - 25]
    first = engine.asked[0][0]
    assert (first.temperature, first.top_p, first.top_k, first.stop) == (1.0, 0.9, 7, ["</s>"])
    agent.limits.context = 40
    (record,) = evaluate(agent, [{"prompt": "x" * 90 + PROMPT, "answer": "yes"}], score)
    assert record["truncated"] == [True] and record["scores"] == [0.0]
    agent.close()
    reference.close()


def test_vllm_has_to_be_installed(script, monkeypatch, agent_dirs):
    monkeypatch.setitem(sys.modules, "vllm", None)
    args = script.EvaluationArguments(model_name_or_path=agent_dirs["tags"], dataset_name="x", use_vllm=True, tools=[])
    with pytest.raises(ImportError, match=r"`--use_vllm` needs vLLM: pip install 'arpo-trl\[vllm\]'"):
        script.load_agent(args, "tags")


# ------------------------------------------------------------------------------------------------ benchmarks' script


def write_benchmarks(folder):
    """Three benchmarks in their published formats, about what the small model was trained on."""
    generator = random.Random(0)
    pairs = [(generator.randrange(10), generator.randrange(10)) for _ in range(6)]
    rows = {
        "gsm8k": [{"question": tiny.question(a, b)[0]["content"], "answer": f"So #### {a + b}"} for a, b in pairs],
        "aime25": [{"problem": tiny.question(a, b)[0]["content"], "answer": a + b} for a, b in pairs[:4]],
        "hotpotqa": [
            {"question": tiny.question(a, b)[0]["content"], "golden_answers": [str(a + b)]} for a, b in pairs[:5]
        ],
    }
    folder.mkdir(exist_ok=True)
    for name, own in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    return {name: len(own) for name, own in rows.items()}


def settings_of(agent_dirs, tmp_path):
    return {
        "model_name_or_path": agent_dirs["tags"],
        "benchmarks": ["gsm8k", "aime25", "hotpotqa"],
        "data_dir": str(tmp_path / "data"),
        "system_prompt": "",
        "tool_protocol": "tags",
        "tools": ["tiny.add"],
        "num_generations": 3,
        "max_completion_length": 120,
        "max_tool_calling_iterations": 2,
        "batch_size": 6,
        "output_dir": str(tmp_path / "out"),
    }


def test_several_benchmarks_in_one_command(script, agent_dirs, tmp_path):
    counts = write_benchmarks(tmp_path / "data")
    (tmp_path / "prompt.txt").write_text("Add.\n")
    settings = settings_of(agent_dirs, tmp_path) | {"system_prompt": str(tmp_path / "prompt.txt")}
    results = script.main(script.EvaluationArguments(**settings))

    out = tmp_path / "out"
    assert {name: result["questions"] for name, result in results.items()} == counts
    assert json.loads((out / "results.json").read_text())["benchmarks"] == results
    metrics = {"gsm8k": "math_reward", "aime25": "math_reward", "hotpotqa": "token_f1_reward"}
    assert {name: result["metric"] for name, result in results.items()} == metrics
    for result in results.values():
        assert 0 <= result["pass@1"] <= result["pass@2"] <= result["pass@3"] <= 1
        assert result["score_low"] <= result["score"] <= result["score_high"]
    header, _, *table = (out / "results.md").read_text().splitlines()
    assert header.split(" | ")[:7] == [
        *("| benchmark", "questions", "scored by", "score", "pass@1", "pass@2", "pass@3")
    ]
    assert [row.split(" | ")[:3] for row in table] == [
        *(["| GSM8K", "6", "math"], ["| AIME25", "4", "math"], ["| HotpotQA", "5", "token f1"]),
    ]
    assert all(row.count("|") == header.count("|") for row in table)
    assert (out / "results.png").stat().st_size > 1000
    first = lines(out / "records" / "gsm8k.jsonl")[0]
    assert "system\nAdd.<|im_end|>" in AutoTokenizer.from_pretrained(out).decode(first["prompt_ids"])

    # more questions or benchmarks later join what is there; other settings do not
    again = script.main(script.EvaluationArguments(**settings | {"benchmarks": ["aime25"], "batch_size": 2}))
    assert again == results
    with pytest.raises(ValueError, match="other settings: `--temperature` was 1.0 and is 0.5. Give another"):
        script.main(script.EvaluationArguments(**settings | {"temperature": 0.5}))


def test_questions_of_your_own(script, agent_dirs, tmp_path):
    questions = tmp_path / "questions.jsonl"
    rows = [{"prompt": tiny.question(a, 2), "answer": str(a + 2)} for a in range(6)]
    questions.write_text("\n".join(json.dumps(row) for row in rows))
    settings = settings_of(agent_dirs, tmp_path) | {
        "benchmarks": [],
        "dataset_name": str(questions),
        "pass_at": [1, 3],
    }
    results = script.main(script.EvaluationArguments(**settings, max_questions=4))
    assert results["questions"]["questions"] == 4 and results["questions"]["title"] == "questions.jsonl"
    assert {"pass@1", "pass@3"} <= set(results["questions"]) and "pass@2" not in results["questions"]
    assert len(lines(tmp_path / "out" / "records" / "questions.jsonl")) == 12


def test_bad_arguments_are_told_before_anything_is_loaded(script, tmp_path):
    with pytest.raises(ValueError, match="give `--benchmarks` or `--dataset_name`"):
        script.EvaluationArguments()
    with pytest.raises(ValueError, match="needs both `--judge_base_url` and `--judge_model`"):
        script.EvaluationArguments(benchmarks=["gaia"], judge_model="judge")
    args = script.EvaluationArguments(benchmarks=["gsm9k"], model_name_or_path="none", output_dir=str(tmp_path))
    with pytest.raises(ValueError, match="There is no benchmark 'gsm9k'"):
        script.main(args)
    assert list(tmp_path.iterdir()) == []


def test_the_protocol_is_the_one_that_the_checkpoint_speaks(script, agent_dirs, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(agent_dirs["tags"], folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    mark_checkpoint(tokenizer, "tags")
    tokenizer.save_pretrained(folder)
    write_benchmarks(tmp_path / "data")
    settings = settings_of(agent_dirs, tmp_path) | {"model_name_or_path": str(folder), "benchmarks": ["gsm8k"]}
    del settings["tool_protocol"]
    script.main(script.EvaluationArguments(**settings | {"num_generations": 1, "max_questions": 2}))
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["tool_protocol"] == "tags"
    records = [json.loads(line) for line in (tmp_path / "out" / "records" / "gsm8k.jsonl").read_text().splitlines()]
    assert all(call["name"] == "add" for record in records for call in record["tool_calls"])
    assert any(record["tool_calls"] for record in records)


def test_a_judge_that_dies_costs_no_completion(script, agent_dirs, tmp_path):
    """The first run ends on a judge that knows no such model; the second, with one that answers, samples nothing."""
    (tmp_path / "data").mkdir()
    rows = [{"question": f"What is {a} plus 2?", "answer": "the sum"} for a in range(2)]
    (tmp_path / "data" / "webwalker.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = settings_of(agent_dirs, tmp_path) | {"benchmarks": ["webwalker"], "judge_model": "judge"}
    records = tmp_path / "out" / "records" / "webwalker.jsonl"

    def boxed(trajectories):
        for trajectory in trajectories:  # so that there is something to judge
            trajectory.completion_ids += tokenizer.encode(
                "</think><answer>\\boxed{5}</answer>", add_special_tokens=False
            )
            trajectory.tool_mask += [1] * (len(trajectory.completion_ids) - len(trajectory.tool_mask))
        return trajectories

    real_rollout, asked = script.load_agent.__globals__["Agent"].rollout, []

    def rollout(agent, prompts, on_end):
        nonlocal tokenizer
        tokenizer = agent.tokenizer
        asked.append(len(prompts))
        return real_rollout(agent, prompts, lambda ended: on_end(boxed(ended)))

    tokenizer = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script.load_agent.__globals__["Agent"], "rollout", rollout)
        with Loopback({"*": http("{}", status="404 Not Found")}) as server:
            with pytest.raises(RuntimeError, match="The judge at .* answers 404"):
                script.main(script.EvaluationArguments(**settings, judge_base_url=server.url + "/v1"))
        assert [record["score"] for record in lines(records)] == [None] * 6 and asked == [6]
        reply = json.dumps({"choices": [{"message": {"content": "VERDICT: CORRECT"}}]})
        with Loopback({"*": http(reply)}) as server:
            results = script.main(script.EvaluationArguments(**settings, judge_base_url=server.url + "/v1"))
        assert asked == [6]
    assert [record["score"] for record in lines(records)] == [1.0] * 6
    assert results["webwalker"]["metric"] == "judge_reward" and results["webwalker"]["pass@1"] == 1.0


def test_a_run_killed_with_kill_9_goes_on(agent_dirs, tmp_path):
    """
    The tool kills the process at a call in the middle, for good; what was finished is there and is not asked again.
    """
    counts = write_benchmarks(tmp_path / "data")
    (tmp_path / "deadly.py").write_text(
        "import os, signal\nimport tiny\n\n"
        "def add(a: int, b: int) -> int:\n"
        '    """\n    Add.\n\n    Args:\n        a: One.\n        b: Other.\n    """\n'
        "    with open('calls', 'a') as file:\n        file.write('x')\n"
        # Calls of a wave run at the same time, so that none of them may find just that size
        "    if os.path.getsize('calls') >= 14 and not os.path.exists('killed'):\n"
        "        open('killed', 'w').close()\n        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return a + b\n"
    )
    settings = settings_of(agent_dirs, tmp_path) | {"tools": ["deadly.add"]}
    arguments = [sys.executable, str(EXAMPLES / "evaluate.py")]
    for name, value in settings.items():
        arguments += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parent}"}

    def run():
        return subprocess.run(arguments, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)

    killed = run()
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    path = tmp_path / "out" / "records" / "gsm8k.jsonl"
    finished = path.read_bytes()
    assert 0 < len(lines(path)) < 3 * counts["gsm8k"] and not (tmp_path / "out" / "results.json").exists()
    path.write_bytes(finished + finished.splitlines()[0][:100])  # as if it had died in the middle of a line

    again = run()
    assert again.returncode == 0, again.stderr[-2000:]
    assert path.read_bytes().startswith(finished)
    for name, count in counts.items():
        rows = [
            (record["prompt_index"], record["row"]) for record in lines(tmp_path / "out" / "records" / f"{name}.jsonl")
        ]
        assert rows == [(index, row) for index in range(count) for row in range(3)]
    assert set(json.loads((tmp_path / "out" / "results.json").read_text())["benchmarks"]) == set(counts)
    assert "GSM8K" in again.stderr and "questions" in again.stderr  # progress is shown


# ---------------------------------------------------------------------------------------------------------- viewer


@pytest.fixture
def evaluation(tmp_path):
    """The output of an evaluation of two benchmarks, made with the scripted model."""
    agent = scripted_agent([plan("A<s>q</s>yes"), plan("Bno")], batch_size=4)
    for name, count in (("aime25", 2), ("gsm8k", 3)):
        rows = [
            {"prompt": PROMPT, "question": f"Is it <b>{name} {i}</b>?", "answer": ["yes", "aye"]} for i in range(count)
        ]

        def right(completions, answer, **kwargs):
            return [float(text.endswith("yes")) for text in completions]

        evaluate(agent, rows, right, 2, tmp_path / "records" / f"{name}.jsonl")
    agent.tokenizer.save_pretrained(tmp_path)
    agent.close()
    return tmp_path


def test_the_viewer_reads_an_evaluation(evaluation, monkeypatch):
    assert [path.stem for path in find_benchmarks(evaluation)] == ["aime25", "gsm8k"]
    assert len(read_file(evaluation / "records" / "gsm8k.jsonl")[0]) == 6
    page = render(evaluation)
    assert "step-1" in page and "step-2" not in page
    monkeypatch.setattr("arpo_trl.viewer.page.QUESTIONS", 2)  # gsm8k comes in two parts
    assert "step-2" in render(evaluation)


def test_a_run_that_was_evaluated_shows_its_rollouts_and_its_records_the_evaluations(evaluation):
    write_run(evaluation, steps=1)
    assert "step-0" in (page := render(evaluation)) and "step-1" not in page
    assert "step-1" in render(evaluation / "records", evaluation)  # of two benchmarks


def test_the_page_of_an_evaluation(evaluation):
    if shutil.which("chromium") is None:
        pytest.skip("chromium is not installed")
    (evaluation / "report.html").write_text(render(evaluation))
    with open_browser() as browser:
        page = browser.new_page(viewport={"width": 1300, "height": 800})
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"file://{evaluation}/report.html")
        page.wait_for_selector("body[data-ready]")
        assert page.inner_text("#step-name") == "aime25 (1 of 2)"
        page.click("#next-step")
        page.locator("#step-name", has_text="gsm8k (2 of 2)").wait_for()  # the page forbids what a function would need
        assert "0.5 at gsm8k" in page.inner_text("#metric-value")
        questions = page.locator("#groups button")
        assert questions.count() == 3 and "fork" not in questions.nth(1).inner_text()
        questions.nth(1).click()
        assert "Question 1" in questions.nth(1).inner_text()
        text = page.inner_text("#transcript")
        assert "Is it <b>gsm8k 1</b>?" in text and "accepted yes · aye" in text and "answered nothing" in text
        assert page.locator("#transcript .card").count() == 3  # call, result, answer
        page.fill("#reward-max", "0.5")
        assert "3 of 6" in page.inner_text("#matches")
    assert errors == []
