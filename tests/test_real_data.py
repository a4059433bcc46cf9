"""Fifty prompts of the published RL set through the trainer: tags protocol, Python tool, recorded searches."""

import json
from pathlib import Path

import pytest
import tiny
import torch

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.viewer.records import read_file

DATA = Path(__file__).parents[2] / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.exists(), reason=f"the published data is not at {DATA}")


def demonstration(row, query):
    return (
        f"<think>look</think><search>{query}</search><result>Page 1: text</result>"
        f"<think>compute</think><python>print({len(query)} * 2)</python><result>{len(query) * 2}</result>"
        f"<answer>\\boxed{{{row['answer']}}}</answer>"
    )


def teach(model, tokenizer, rows, queries, steps=40):
    """Enough for the model to write calls now and then; what it says does not matter here."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        index = int(torch.randint(len(rows), (1,), generator=generator))
        head = tokenizer.apply_chat_template(rows[index]["prompt"], add_generation_prompt=True, return_dict=False)
        tail = tokenizer.encode(demonstration(rows[index], queries[index])) + [tokenizer.eos_token_id]
        ids = torch.tensor([head[-200:] + tail])
        labels = ids.clone()
        labels[:, : -len(tail)] = -100
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_two_steps_on_published_prompts(tokenizer, tmp_path):
    from arpo_trl.data import load_rl
    from arpo_trl.rewards import arpo_reward
    from arpo_trl.tools.python import PythonSandbox
    from arpo_trl.tools.search.replay import ReplaySearch

    train = load_rl(DATA / "arpo_rl_reasoning_10k.parquet", protocol="tags")
    train = train.shuffle(seed=0).select(range(50))
    recorded = json.loads((DATA / "arpo_search_cache.json").read_text())
    model = tiny.build_model(tokenizer)
    model.config.max_position_embeddings = 8192
    teach(model, tokenizer, train, list(recorded)[:50])

    with PythonSandbox(sandbox="rlimits", timeout=5, preload=()) as sandbox:
        trainer = ARPOTrainer(
            model=model,
            args=ARPOConfig(
                str(tmp_path),
                num_generations=4,
                num_initial_generations=2,
                per_device_train_batch_size=20,
                gradient_accumulation_steps=5,
                max_completion_length=400,
                max_tool_calling_iterations=3,
                max_steps=2,
                tool_protocol="tags",
                log_rollouts=True,
                logging_steps=1,
                bf16=False,
                use_cpu=True,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
            ),
            reward_funcs=arpo_reward,
            train_dataset=train,
            processing_class=tokenizer,
            tools=[ReplaySearch.from_json(DATA / "arpo_search_cache.json").search, sandbox.python],
        )
        trainer.train()

    records = []
    for path in sorted((tmp_path / "rollouts").iterdir()):
        records += read_file(path)[0]
    assert len(records) == 2 * 25 * 4
    groups = {}
    for record in records:
        groups.setdefault((record["step"], record["prompt_index"]), []).append(record["row"])
        assert len(record["completion_ids"]) == len(record["tool_mask"]) <= 400
        assert record["rewards"]["arpo_reward"] is not None
    assert len(groups) == 50 and all(rows == [0, 1, 2, 3] for rows in groups.values())
    calls = [call for record in records for call in record["tool_calls"]]
    assert {"search", "python"} <= {call["name"] for call in calls}, "the tools were used"
    assert all(isinstance(call["result"], str) for call in calls)
    logs = [log for log in trainer.state.log_history if "arpo/initial" in log]
    assert len(logs) == 2 and all(log["arpo/initial"] == 2 for log in logs)
    assert all(log["arpo/forks"] + log["arpo/supplements"] == 2 for log in logs)
