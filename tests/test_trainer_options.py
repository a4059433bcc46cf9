"""Where GRPOTrainer holds, ARPOTrainer holds with branching on: one test an option."""

import asyncio
import shutil
from pathlib import Path

import pandas
import pytest
import tiny
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    TrainerCallback,
)

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.viewer.records import read_file

ROWS = [{"prompt": tiny.question(a, b), "a": a, "b": b} for a in range(4) for b in range(4)]


def reward(completions, a, b, **kwargs):
    texts = [completion[-1].get("content") or "" if completion else "" for completion in completions]
    return [float(str(x + y) in text) - 0.01 * len(text) for text, x, y in zip(texts, a, b, strict=True)]


def build(agent_dirs, tokenizer, tmp_path, protocol="chat_template", tools=(tiny.add,), model=None, **settings):
    keys = ("peft_config", "callbacks", "eval_dataset", "reward_funcs", "train_dataset", "environment_factory")
    arguments = {key: settings.pop(key) for key in keys if key in settings}
    args = ARPOConfig(
        str(tmp_path),
        **{
            "num_generations": 4,
            "num_initial_generations": 2,
            "per_device_train_batch_size": 8,
            "max_completion_length": 120,
            "max_tool_calling_iterations": 3,
            "max_steps": 2,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "tool_protocol": protocol,
            "log_rollouts": True,
            "bf16": False,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            **settings,
        },
    )
    return ARPOTrainer(
        model=model or AutoModelForCausalLM.from_pretrained(agent_dirs[protocol]),
        args=args,
        processing_class=tokenizer,
        tools=list(tools) or None,
        **{"reward_funcs": reward, "train_dataset": Dataset.from_list(ROWS), **arguments},
    )


def records(tmp_path):
    return [record for path in sorted((tmp_path / "rollouts").iterdir()) for record in read_file(path)[0]]


def check(trainer, tmp_path, groups):
    """Groups are whole, the loss is finite and some weights moved."""
    rows = [record["row"] for record in records(tmp_path)]
    assert rows == [0, 1, 2, 3] * groups
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses and all(torch.isfinite(torch.tensor(loss)) for loss in losses)
    assert any(log["grad_norm"] > 0 for log in trainer.state.log_history if "loss" in log)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"])
@pytest.mark.parametrize("attribution", ["soft", "hard"])
def test_loss_types(agent_dirs, tokenizer, tmp_path, loss_type, attribution):
    trainer = build(
        agent_dirs, tokenizer, tmp_path, loss_type=loss_type, advantage_attribution=attribution, max_steps=1
    )
    trainer.train()
    check(trainer, tmp_path, groups=2)


def logged(trainer, name):
    return [log[name] for log in trainer.state.log_history if name in log]


def generated_at(*steps):
    """The global steps at which new groups were sampled."""
    return lambda trainer, rows: [row["step"] for row in rows[::4]] == [step for step in steps for _ in range(2)]


def drifts_from_the_reference(trainer, rows):
    first, second = logged(trainer, "kl")
    return abs(first) < 1e-5 and second > 1e-5


def scaled_over_the_batch(trainer, rows):
    """The advantage is the reward less the mean of its group, over the deviation of the whole batch."""
    for step in (0, 1):
        groups = [rows[first : first + 4] for first in range(0, len(rows), 4) if rows[first]["step"] == step]
        rewards = torch.tensor([[row["rewards"]["reward"] for row in group] for group in groups])
        wanted = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std() + 1e-4)
        assert torch.allclose(
            wanted, torch.tensor([[row["advantage"] for row in group] for group in groups]), atol=1e-4
        )
    return True


def a_table_of_each_step(trainer, rows):
    tables = sorted((Path(trainer.args.output_dir) / "completions").glob("*.parquet"))
    return [len(pandas.read_parquet(table)) for table in tables] == [8, 8]


def every_result_forks_twice_while_there_is_room(trainer, rows):
    return all(row["kind"] != "initial" for row in rows[2::4] + rows[3::4]) and any(
        segment["forks"] == 2 for row in rows for segment in row["segments"]
    )


def all_but_one_row_left_a_row_that_had_ended(trainer, rows):
    forks = [row for row in rows if row["kind"] == "fork"]
    assert [row["kind"] for row in rows[::4]] == ["initial"] * 4 and forks
    for start in range(0, len(rows), 4):
        group = rows[start : start + 4]
        for row in group:
            if row["kind"] == "fork":
                parent = group[row["parent"]]
                assert parent["completion_ids"][: row["fork_token"]] == row["completion_ids"][: row["fork_token"]]
                (node,) = [segment for segment in parent["segments"] if segment["start"] == row["fork_token"]]
                assert node["forks"] >= 1 and node["branch_probability"] is None
    return True


@pytest.mark.parametrize(
    "settings, groups, shows",
    [
        ({"num_iterations": 2}, 2, generated_at(0)),
        (
            {"steps_per_generation": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
            2,
            generated_at(0),
        ),
        ({"steps_per_generation": 1, "gradient_accumulation_steps": 2}, 8, generated_at(0, 0, 1, 1)),
        ({"beta": 0.1}, 4, drifts_from_the_reference),
        ({"scale_rewards": "batch"}, 4, scaled_over_the_batch),
        ({"top_entropy_quantile": 0.5}, 4, generated_at(0, 1)),
        ({"entropy_coef": 0.01}, 4, generated_at(0, 1)),
        ({"log_completions": True}, 4, a_table_of_each_step),
        ({"prefix_sharing": False}, 4, generated_at(0, 1)),
        (
            {"branch_rule": "random", "branch_factor": 2, "branch_probability": 1.0},
            4,
            every_result_forks_twice_while_there_is_room,
        ),
        ({"branch_rule": "expansion", "num_initial_generations": 1}, 4, all_but_one_row_left_a_row_that_had_ended),
        ({"branch_rule": "random_expansion", "expansion_rounds": 1, "seed": 3}, 4, generated_at(0, 1)),
        (
            {"gradient_checkpointing": False, "repetition_penalty": 1.1, "top_p": 0.9, "top_k": 20, "min_p": 0.01},
            4,
            generated_at(0, 1),
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options(agent_dirs, tokenizer, tmp_path, settings, groups, shows):
    trainer = build(agent_dirs, tokenizer, tmp_path, **settings)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.train()
    check(trainer, tmp_path, groups)
    assert any(not torch.equal(old, new) for old, new in zip(before, trainer.model.parameters(), strict=True))
    assert shows(trainer, records(tmp_path))


def test_importance_sampling_levels_differ(agent_dirs, tokenizer, tmp_path):
    """In the second pass over a batch the ratio is no longer 1, and each level weighs it in its own way."""
    weights = []
    for level in ("token", "sequence"):
        trainer = build(
            agent_dirs,
            tokenizer,
            tmp_path / level,
            importance_sampling_level=level,
            loss_type="grpo",
            num_iterations=2,
            branch_rule="random",
            branch_probability=1.0,
        )
        trainer.train()
        check(trainer, tmp_path / level, groups=2)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()]))
    ids = [[row["completion_ids"] for row in records(tmp_path / level)] for level in ("token", "sequence")]
    assert ids[0] == ids[1] and any(row["kind"] == "fork" for row in records(tmp_path / "token"))
    assert not torch.equal(*weights)


@pytest.mark.parametrize("masked", [True, False])
def test_truncated_completions_bear_no_loss_where_they_are_masked(agent_dirs, tokenizer, tmp_path, masked):
    trainer = build(
        agent_dirs,
        tokenizer,
        tmp_path,
        mask_truncated_completions=masked,
        max_completion_length=62,  # one call and an answer fit, two calls do not
        branch_rule="random",
        branch_probability=1.0,
        max_steps=1,
    )
    tokens, compute_loss = [], trainer._compute_loss

    def spy(model, inputs):
        tokens.append(int((inputs["completion_mask"] * inputs["tool_mask"]).sum()))
        return compute_loss(model, inputs)

    trainer._compute_loss = spy
    trainer.train()
    rows = records(tmp_path)
    check(trainer, tmp_path, groups=2)
    cut = [row for row in rows if row["completion_ids"][-1] != tokenizer.eos_token_id]
    assert 0 < len(cut) < len(rows) and all(row["truncated"] for row in cut)
    assert sum(tokens) == sum(sum(row["tool_mask"]) for row in rows if not masked or row not in cut)


def test_rows_that_ran_into_the_call_limit_are_masked_too(agent_dirs, tokenizer, tmp_path):
    """Under the chat template the last token of such a row ends its turn, so that token does not tell."""
    trainer = build(
        agent_dirs,
        tokenizer,
        tmp_path,
        mask_truncated_completions=True,
        max_tool_calling_iterations=1,
        per_device_eval_batch_size=8,
        max_steps=1,
    )
    seen, score = [], trainer._generate_and_score_completions

    def spy(inputs):
        seen.append(score(inputs))
        return seen[-1]

    trainer._generate_and_score_completions = spy
    trainer.train()
    rows = records(tmp_path)
    cut = [row for row in rows if row["truncated"]]
    assert any(row["completion_ids"][-1] == tokenizer.eos_token_id for row in cut) and len(cut) < len(rows)
    (output,) = seen
    for row, completion_mask, tool_mask in zip(rows, output["completion_mask"], output["tool_mask"], strict=True):
        length = len(row["completion_ids"])
        assert completion_mask[:length].tolist() == [0 if row["truncated"] else 1] * length
        assert tool_mask[:length].tolist() == ([0] * length if row["truncated"] else row["tool_mask"])
    assert output["num_items_in_batch"] == sum(sum(row["tool_mask"]) for row in rows if not row["truncated"])


def test_forks_happen_in_these_tests(agent_dirs, tokenizer, tmp_path):
    build(agent_dirs, tokenizer, tmp_path, branch_rule="random", branch_probability=1.0).train()
    kinds = [record["kind"] for record in records(tmp_path)]
    assert kinds.count("fork") > 0 and kinds.count("initial") == len(kinds) // 2


def test_evaluation_never_branches(agent_dirs, tokenizer, tmp_path):
    trainer = build(
        agent_dirs,
        tokenizer,
        tmp_path,
        num_generations_eval=2,
        per_device_eval_batch_size=4,
        eval_strategy="steps",
        eval_steps=1,
        eval_dataset=Dataset.from_list(ROWS[:4]),
        branch_rule="random",
        branch_probability=1.0,
    )
    trainer.train()
    evals = [log for log in trainer.state.log_history if "eval_reward" in log]
    assert len(evals) == 2
    for log in evals:
        assert log["eval_arpo/initial"] == 2 and log["eval_arpo/forks"] == log["eval_arpo/supplements"] == 0
    assert {record["step"] for record in records(tmp_path)} == {0, 1}, "only training rollouts are recorded"


def test_evaluation_leaves_training_as_it_is(agent_dirs, tokenizer, tmp_path):
    """Also where a run is resumed between two rollouts that have an evaluation between them."""
    settings = {"save_strategy": "steps", "save_steps": 1, "branch_probability": 0.5, "branch_rule": "random"}
    settings |= {"seed": 3, "max_steps": 3, "learning_rate": 1e-5}
    evaluating = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_dataset": Dataset.from_list(ROWS[:4]),
        "num_generations_eval": 2,
        "per_device_eval_batch_size": 4,
    }
    runs = {}
    for name, extra in (("alone", {}), ("evaluated", evaluating), ("resumed", evaluating)):
        runs[name] = build(agent_dirs, tokenizer, tmp_path / name, **settings, **extra)
        if name == "resumed":
            shutil.copytree(tmp_path / "evaluated" / "checkpoint-1", tmp_path / name / "checkpoint-1")
        runs[name].train(resume_from_checkpoint=name == "resumed")
    assert sum("eval_reward" in log for log in runs["evaluated"].state.log_history) == 3
    alone = records(tmp_path / "alone")
    assert any(row["kind"] == "fork" for row in alone if row["step"] >= 1)
    for name, first in (("evaluated", 0), ("resumed", 1)):
        for left, right in zip([row for row in alone if row["step"] >= first], records(tmp_path / name), strict=True):
            for field in ("kind", "parent", "fork_token", "completion_ids"):
                assert left[field] == right[field], (name, field)
        weights = (run.model.parameters() for run in (runs["alone"], runs[name]))
        assert all(torch.equal(left, right) for left, right in zip(*weights, strict=True))


def test_an_evaluation_of_its_own_draws_anew(agent_dirs, tokenizer, tmp_path):
    trainer = build(agent_dirs, tokenizer, tmp_path, per_device_eval_batch_size=4)
    drawn = []
    for _ in range(2):
        torch.manual_seed(len(drawn))
        trainer.evaluate(Dataset.from_list(ROWS[:1]))
        drawn.append(torch.get_rng_state())
    torch.manual_seed(1)
    assert not torch.equal(drawn[-1], torch.get_rng_state())


def test_async_tools(agent_dirs, tokenizer, tmp_path):
    running, most = [0], [0]

    async def add(a: int, b: int) -> int:
        """
        Add two numbers.

        Args:
            a: First number.
            b: Second number.

        Returns:
            The sum.
        """
        running[0] += 1
        most[0] = max(most[0], running[0])
        await asyncio.sleep(0.05)
        running[0] -= 1
        return a + b

    trainer = build(agent_dirs, tokenizer, tmp_path, tools=(add,))
    trainer.train()
    check(trainer, tmp_path, groups=4)
    assert most[0] > 1, "calls of one wave run at the same time"


def test_iterable_dataset_and_callbacks(agent_dirs, tokenizer, tmp_path):
    steps = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    dataset = Dataset.from_list(ROWS).to_iterable_dataset()
    trainer = build(agent_dirs, tokenizer, tmp_path, train_dataset=dataset, callbacks=[Count()])
    trainer.train()
    check(trainer, tmp_path, groups=4)
    assert steps == [1, 2]


def test_rewards_that_are_none_or_nan(agent_dirs, tokenizer, tmp_path):
    def patchy(completions, **kwargs):
        return [
            None if index % 3 == 0 else float("nan") if index % 3 == 1 else 1.0 for index in range(len(completions))
        ]

    trainer = build(agent_dirs, tokenizer, tmp_path, reward_funcs=[patchy, reward])
    trainer.train()
    check(trainer, tmp_path, groups=4)
    assert [record["rewards"]["patchy"] for record in records(tmp_path)][:3] == [None, None, 1.0]


def test_lora_samples_from_the_adapted_policy_and_trains_adapters_alone(agent_dirs, tokenizer, tmp_path):
    from peft import LoraConfig, PeftModel

    trainer = build(
        agent_dirs,
        tokenizer,
        tmp_path,
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    base = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora" not in name}
    seen = []
    original = trainer._engine.sample

    def spy(contexts, limits):
        samples = original(contexts, limits)
        seen.extend(samples)
        return samples

    trainer._engine.sample = spy
    # An adapter that pushes the end-of-turn token above all others: the policy's argmax is not the base model's
    head = trainer.model.get_base_model().lm_head.weight
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "layers.1.mlp.down_proj.lora_A" in name:
                parameter.fill_(0.0)
            if "layers.1.mlp.down_proj.lora_B" in name:
                parameter.normal_(std=30.0)
            if "layers.1.mlp.down_proj.lora_A" in name:
                parameter.normal_(std=1.0)
    with trainer.model.disable_adapter():
        plain = AutoModelForCausalLM.from_pretrained(agent_dirs["chat_template"])
    trainer.train()
    after = {name: p for name, p in trainer.model.named_parameters() if "lora" not in name}
    assert all(torch.equal(base[name], after[name]) for name in base), "the base model is untouched"
    ids = torch.tensor([tokenizer.encode("What is 1 plus 2?")])
    with torch.no_grad():
        adapted_argmax = trainer.model(ids).logits[0].argmax(-1)
        plain_argmax = plain(ids).logits[0].argmax(-1)
    assert not torch.equal(adapted_argmax, plain_argmax)
    assert head is trainer.model.get_base_model().lm_head.weight
    # What was sampled is likely under the adapted policy, not under the base model: its calls are gone
    assert not any(record["tool_calls"] for record in records(tmp_path))
    trainer.save_model(str(tmp_path / "adapter"))
    reloaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(agent_dirs["chat_template"]), tmp_path / "adapter"
    )
    with torch.no_grad():
        assert torch.allclose(reloaded(ids).logits, trainer.model(ids).logits, atol=1e-4)
        merged = reloaded.merge_and_unload()
        assert torch.allclose(merged(ids).logits, trainer.model(ids).logits, atol=1e-2)


class Counter:
    """A stateful environment: it remembers every addition."""

    def __init__(self):
        self.history = []

    def reset(self, **kwargs):
        self.history = []

    def add(self, a: int, b: int) -> int:
        self.history.append((a, b))
        return a + b

    add.__doc__ = tiny.add.__doc__  # the schema that the model has learnt


class ForkingCounter(Counter):
    copies = 0

    def fork(self):
        type(self).copies += 1
        twin = type(self)()
        twin.history = list(self.history)
        return twin


@pytest.mark.parametrize("environment", [Counter, ForkingCounter])
def test_siblings_never_see_each_others_environment(agent_dirs, tokenizer, tmp_path, environment):
    seen = []

    def judge(completions, environments, tool_calls, **kwargs):
        for own, calls in zip(environments, tool_calls, strict=True):
            answered = [call for call in calls if call["error"] is None]
            seen.append((own.history, [(call["arguments"]["a"], call["arguments"]["b"]) for call in answered]))
        assert len({id(own) for own in environments}) == len(environments)
        return [float(len(own.history)) for own in environments]

    trainer = build(
        agent_dirs,
        tokenizer,
        tmp_path,
        tools=(),
        environment_factory=environment,
        reward_funcs=judge,
        branch_rule="random",
        branch_probability=1.0,
        max_steps=3,
    )
    assert "fork" not in trainer._row_tools.names
    trainer.train()
    assert any(record["kind"] == "fork" for record in records(tmp_path))
    for history, calls in seen:
        assert history == calls, "an environment holds the calls of its own row, shared ones included, and no other"
    if environment is ForkingCounter:
        assert ForkingCounter.copies > 0


def test_an_environment_that_cannot_be_copied_is_named(agent_dirs, tokenizer, tmp_path):
    class Locked(Counter):
        def __init__(self):
            import threading

            super().__init__()
            self.lock = threading.Lock()

    with pytest.raises(TypeError, match="a `Locked` cannot be copied.*`fork\\(self\\)`"):
        build(agent_dirs, tokenizer, tmp_path, tools=(), environment_factory=Locked)


def test_resume_after_a_kill_ends_with_the_same_weights(agent_dirs, tokenizer, tmp_path):
    def run(folder, **kwargs):
        trainer = build(
            agent_dirs, tokenizer, tmp_path / folder, max_steps=4, save_strategy="steps", save_steps=2, seed=3
        )
        trainer.train(**kwargs)
        return trainer

    class Killed(Exception):
        pass

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise Killed

    whole = run("whole")
    stopped = build(
        agent_dirs,
        tokenizer,
        tmp_path / "killed",
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        seed=3,
        callbacks=[Kill()],
    )
    with pytest.raises(Killed):
        stopped.train()
    resumed = run("killed", resume_from_checkpoint=True)
    for left, right in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(left, right)
    whole_ids, resumed_ids = (
        [record["completion_ids"] for record in records(tmp_path / folder)] for folder in ("whole", "killed")
    )
    assert whole_ids == resumed_ids, "each step is recorded once"


def test_the_tool_limit_per_row(agent_dirs, tokenizer, tmp_path):
    from arpo_trl.tools import tool

    trainer = build(
        agent_dirs,
        tokenizer,
        tmp_path,
        tools=(tool(tiny.add, max_calls_per_row=1),),
        branch_rule="random",
        branch_probability=1.0,
        max_steps=1,
    )
    trainer.train()
    for record in records(tmp_path):
        errors = [call["error"] for call in record["tool_calls"]]
        assert all("may be called 1 times" in error for error in errors[1:])
