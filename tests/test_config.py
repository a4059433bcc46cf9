"""Misuse is refused at construction, with one sentence that names the argument, the value and the remedy."""

from types import SimpleNamespace

import pytest
import tiny
from datasets import Dataset
from trl import GRPOConfig

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.checks import check_timeouts, resolved_schedule
from arpo_trl.execution.options import tool
from arpo_trl.model_card import complete_card
from arpo_trl.rollout.engines import best_schedule, shared_engine, why_waves
from arpo_trl.rollout.rules import branch_rule
from arpo_trl.viewer.records import read_file

CPU = {"bf16": False, "use_cpu": True, "report_to": "none"}


def test_defaults_are_those_of_the_paper(tmp_path):
    config = ARPOConfig(str(tmp_path), **CPU)
    paper = dict(
        num_generations=16,
        num_initial_generations=8,
        branch_factor=1,
        entropy_window=20,
        branch_probability=0.5,
        entropy_weight=0.2,
        branch_threshold=0.5,
        branch_rule="bernoulli",
        advantage_attribution="soft",
    )
    assert {name: getattr(config, name) for name in paper} == paper


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"num_initial_generations": 17}, ["`num_initial_generations` (17)", "`num_generations` (16)"]),
        ({"num_initial_generations": 0}, ["`num_initial_generations` is 0", "1 or more"]),
        ({"branch_factor": 0}, ["`branch_factor` is 0"]),
        ({"entropy_window": 0}, ["`entropy_window` is 0"]),
        ({"expansion_rounds": 0}, ["`expansion_rounds` is 0"]),
        ({"entropy_weight": -0.1}, ["`entropy_weight` is -0.1"]),
        ({"entropy_weight": float("nan")}, ["`entropy_weight` is nan"]),
        ({"branch_probability": 1.5}, ["`branch_probability` is 1.5"]),
        ({"branch_threshold": -1}, ["`branch_threshold` is -1"]),
        ({"branch_rule": "greedy"}, ["`branch_rule` is 'greedy'", "'bernoulli', 'threshold', 'random'"]),
        ({"advantage_attribution": "both"}, ["`advantage_attribution` is 'both'", "'soft', 'hard'"]),
        ({"tool_protocol": "xml"}, ["`tool_protocol` is 'xml'"]),
        ({"rollout_schedule": "lazy"}, ["`rollout_schedule` is 'lazy'", "'waves', 'eager', 'continuous'"]),
        ({"rollout_deadline": 0}, ["`rollout_deadline` is 0", "seconds above 0"]),
        ({"rollout_finished_fraction": 0}, ["`rollout_finished_fraction` is 0"]),
        ({"rollout_finished_fraction": 90}, ["`rollout_finished_fraction` is 90", "no more than 1"]),
        ({"tool_timeout": 0}, ["`tool_timeout` is 0"]),
        ({"max_tool_concurrency": 0}, ["`max_tool_concurrency` is 0"]),
        ({"log_rollout_steps": 0}, ["`log_rollout_steps`", "1 or more"]),
        ({"log_rollout_groups": 0}, ["`log_rollout_groups` is 0", "None", "`log_rollouts=False`"]),
    ],
)
def test_bad_values(tmp_path, settings, words):
    with pytest.raises(ValueError) as caught:
        ARPOConfig(str(tmp_path), **CPU, **settings)
    assert all(word in str(caught.value) for word in words), str(caught.value)


class Board:
    def reset(self, **kwargs):
        return None

    def move(self, place: int) -> str:
        """
        Move.

        Args:
            place: Where.
        """
        return "ok"


def build(tmp_path, tokenizer, config=None, tools=(tiny.add,), **kwargs):
    return ARPOTrainer(
        model=tiny.build_model(tokenizer),
        args=ARPOConfig(str(tmp_path), **CPU, **(config or {})),
        reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
        train_dataset=Dataset.from_list([{"prompt": tiny.question(1, 2)}]),
        processing_class=tokenizer,
        tools=list(tools) or None,
        **kwargs,
    )


@pytest.mark.parametrize(
    "config, kwargs, words",
    [
        ({}, {"tools": ()}, ["no tools", "num_initial_generations=16"]),
        ({}, {"rollout_func": lambda prompts, trainer: {}}, ["`rollout_func`", "num_initial_generations=16"]),
        ({"use_transformers_continuous_batching": True}, {}, ["`use_transformers_continuous_batching`"]),
        (
            {"tool_protocol": "tags"},
            {"tools": (), "environment_factory": Board},
            ["`environment_factory`", "tool_protocol"],
        ),
        ({"rollout_deadline": 60}, {}, ["`rollout_deadline` is 60", "'waves'", "`rollout_schedule='continuous'`"]),
        (
            {"rollout_finished_fraction": 0.9, "rollout_schedule": "eager"},
            {},
            ["`rollout_finished_fraction` is 0.9", "'eager'", "`rollout_schedule='continuous'`"],
        ),
    ],
)
def test_bad_combinations(tmp_path, tokenizer, config, kwargs, words):
    with pytest.raises(ValueError) as caught:
        build(tmp_path, tokenizer, config, **kwargs)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_part_of_a_group_without_room_for_a_fork_is_refused(tmp_path, tokenizer):
    class FourProcesses(ARPOConfig):
        world_size = property(lambda self: 4)

    args = FourProcesses(
        str(tmp_path), **CPU, num_generations=4, num_initial_generations=2, per_device_train_batch_size=1
    )
    with pytest.raises(ValueError, match="1 row\\(s\\) of a group of 4 and no room for a fork"):
        ARPOTrainer(tiny.build_model(tokenizer), args=args, tools=[tiny.add])


class TwoProcesses(ARPOConfig):
    world_size = property(lambda self: 2)


@pytest.mark.parametrize(
    "settings, options, words",
    [
        (
            {"tool_timeout": 1800},
            {},
            ["`tool_timeout` of the tool `add`, for 1 attempt(s), is 1800 s", "`ddp_timeout` (1800 s)"],
        ),
        ({"tool_timeout": None}, {}, ["`tool_timeout` of the tool `add`, for 1 attempt(s), is inf s"]),
        ({"ddp_timeout": 100}, {}, ["is 120 s", "`ddp_timeout` (100 s)"]),
        ({}, {"timeout": float("inf")}, ["The time-out of the tool `add`, for 1 attempt(s), is inf s"]),
        ({}, {"timeout": 600, "retries": 2}, ["The time-out of the tool `add`, for 3 attempt(s), is 1800 s"]),
        (
            {"rollout_schedule": "continuous", "rollout_deadline": 2000},
            {},
            ["`rollout_deadline` is 2000 s", "`ddp_timeout` (1800 s)"],
        ),
    ],
)
def test_processes_wait_for_each_other_longer_than_a_tool_may_take(tmp_path, settings, options, words):
    add = tool(tiny.add, **options)
    with pytest.raises(ValueError) as caught:
        check_timeouts(TwoProcesses(str(tmp_path), **CPU, **settings), [add])
    assert all(word in str(caught.value) for word in words), str(caught.value)
    check_timeouts(ARPOConfig(str(tmp_path), **CPU, **settings), [add])  # alone it waits for nobody


def test_a_tool_below_the_time_out_of_processes(tmp_path):
    check_timeouts(TwoProcesses(str(tmp_path), **CPU, tool_timeout=None), [tool(tiny.add, timeout=1799)])


@pytest.mark.parametrize(
    "settings, processes, fsdp, zero, shared",
    [
        ({}, 1, True, None, None),
        ({}, 2, False, None, None),
        ({}, 2, False, 2, None),
        ({}, 2, False, 3, "generation with transformers under ZeRO-3"),
        ({}, 2, True, None, "generation with transformers under FSDP"),
        ({"use_vllm": True}, 2, True, 3, None),
        ({"use_vllm": True, "vllm_tensor_parallel_size": 2}, 2, False, None, "`vllm_tensor_parallel_size=2`"),
        ({"use_vllm": True, "vllm_tensor_parallel_size": 2, "vllm_mode": "server"}, 2, True, 3, None),
    ],
)
def test_which_engine_has_which_schedule(tmp_path, settings, processes, fsdp, zero, shared):
    args = ARPOConfig(str(tmp_path), **CPU, **settings)
    plugin = zero and SimpleNamespace(zero_stage=zero)
    trainer = SimpleNamespace(
        args=args,
        use_vllm=args.use_vllm,
        _is_vlm=False,
        vllm_mode=args.vllm_mode,
        is_fsdp_enabled=fsdp,
        accelerator=SimpleNamespace(num_processes=processes, state=SimpleNamespace(deepspeed_plugin=plugin)),
    )
    assert shared_engine(trainer) == shared
    rule = branch_rule(args.branch_rule, args)
    assert resolved_schedule(args, rule, best_schedule(trainer), why_waves(trainer)) == (
        "continuous" if args.use_vllm and shared is None else "waves"
    )
    args.rollout_schedule = "continuous"
    if shared is None:
        assert resolved_schedule(args, rule, best_schedule(trainer), why_waves(trainer)) == "continuous"
    else:
        with pytest.raises(ValueError) as caught:
            resolved_schedule(args, rule, best_schedule(trainer), why_waves(trainer))
        assert all(word in str(caught.value) for word in ("`rollout_schedule='continuous'`", shared, "'eager'"))


@pytest.mark.parametrize("settings", [{"branch_rule": "contrast"}, {"fork_sampling": "distinct"}])
def test_what_is_decided_for_all_rows_of_a_wave_needs_waves(tmp_path, settings):
    args = ARPOConfig(str(tmp_path), **CPU, use_vllm=True, **settings)
    rule = branch_rule(args.branch_rule, args)
    assert resolved_schedule(args, rule, "continuous", None) == "waves"
    args.rollout_schedule = "continuous"
    with pytest.raises(ValueError, match="`rollout_schedule='continuous'`.*set 'waves' or 'eager'"):
        resolved_schedule(args, rule, "continuous", None)


def test_a_grpo_config_is_refused(tmp_path, tokenizer):
    with pytest.raises(TypeError, match="must be an `ARPOConfig`, got a `GRPOConfig`"):
        ARPOTrainer(tiny.build_model(tokenizer), args=GRPOConfig(str(tmp_path), **CPU), tools=[tiny.add])


def test_a_tag_of_the_protocol_is_no_tool(tmp_path, tokenizer):
    def answer(text: str) -> str:
        """
        Answer.

        Args:
            text: Text.
        """
        return text

    with pytest.raises(ValueError, match="'answer'"):
        build(tmp_path, tokenizer, {"tool_protocol": "tags"}, tools=(answer,))


def test_no_tools_and_no_branching_is_grpo(tmp_path, tokenizer):
    trainer = build(
        tmp_path,
        tokenizer,
        {
            "num_initial_generations": 16,
            "max_steps": 1,
            "max_completion_length": 8,
            "log_rollouts": True,
            "save_strategy": "no",
        },
        tools=(),
    )
    trainer.train()
    assert len(read_file(tmp_path / "rollouts" / "step-000000.jsonl.gz")[0]) == 16


def test_the_model_card_cites_arpo(tmp_path, tokenizer):
    trainer = build(tmp_path, tokenizer)
    trainer.create_model_card(model_name="agent")
    card = (tmp_path / "README.md").read_text()
    assert "Agentic Reinforced Policy Optimization" in card and "2507.19849" in card and "- arpo" in card


def test_the_model_card_tells_the_local_base_model_and_the_rollouts(tmp_path, tokenizer):
    trainer = build(tmp_path, tokenizer)
    (tmp_path / "my-base").mkdir()
    trainer.model.config._name_or_path = str(tmp_path / "my-base")
    trainer.create_model_card(model_name="agent")
    card = (tmp_path / "README.md").read_text()
    assert "None" not in card and "the local model `my-base`" in card and str(tmp_path) not in card
    assert "- Tools: `add`" in card and f"- Tool protocol: `{trainer.args.tool_protocol}`" in card
    assert f"(M): {trainer.num_generations}, of which {trainer.args.num_initial_generations} start at once (N)" in card
    assert card.index("### Rollouts") < card.index("### Framework versions")


def test_a_card_without_tools_or_branches_says_so():
    card = complete_card(
        "[None](https://huggingface.co/None)\n### Framework versions",
        None,
        ARPOConfig("x", bf16=False, num_generations=4, num_initial_generations=4),
        [],
    )
    assert "a local model\n" in card and "- Tools: none" in card and "as in GRPO" in card and "protocol" not in card
