"""An agent outside of training: same rollout as the trainer's, scores, pass@k, and going on after a kill."""

import json
import math

import pytest
import tiny
import torch
from scripted import ScriptedModel, character_tokenizer, plan
from transformers import AutoModelForCausalLM

from arpo_trl.evaluation import Agent, bootstrap_interval, evaluate, pass_at_k, summarize


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


def test_a_killed_evaluation_goes_on(tmp_path):
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
    with path.open("a") as file:
        file.write('{"index": 2, "sco')  # killed in mid-write
    records = evaluate(agent, rows, counting, records_path=path)
    assert len(asked) == 5 and [record["index"] for record in records] == [0, 1, 2, 3]
    agent.close()


def test_a_prompt_that_overflows_loses_nothing_else():
    agent = scripted_agent([plan("Ayes")], batch_size=3)
    agent.limits.context = 50
    rows = [{"prompt": prompt, "answer": "yes"} for prompt in ("Q?", "x" * 100 + "Q?", "Q?")]
    records = evaluate(agent, rows, score)
    assert [record["scores"][0] for record in records] == [1.0, 0.0, 1.0]
    assert [record["truncated"][0] for record in records] == [False, True, False]
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


def test_the_evaluation_script(agent_dirs, tokenizer, tmp_path):
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    import evaluate as script

    questions = tmp_path / "questions.jsonl"
    questions.write_text(
        "\n".join(json.dumps({"prompt": tiny.question(a, 2), "answer": str(a + 2)}) for a in range(6))
    )
    summary = script.main(
        script.EvaluationArguments(
            model_name_or_path=agent_dirs["tags"],
            dataset_name=str(questions),
            tool_protocol="tags",
            tools=["tiny.add"],
            num_generations=3,
            pass_at=[1, 3],
            max_completion_length=120,
            max_tool_calling_iterations=2,
            output_dir=str(tmp_path / "out"),
        )
    )
    assert summary["questions"] == 6 and 0 <= summary["accuracy"] <= summary["pass@3"] <= 1
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    assert len((tmp_path / "out" / "questions.jsonl").read_text().splitlines()) == 6
