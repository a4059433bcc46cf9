"""GRPO is the special case: with N = M and soft attribution, ARPOTrainer does what GRPOTrainer does, to the bit."""

import pytest
import tiny
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from arpo_trl import ARPOConfig, ARPOTrainer


def reward(completions, a, b, **kwargs):
    """Varies within a group, so that advantages are not all zero."""
    texts = [completion[-1]["content"] if completion else "" for completion in completions]
    return [float(str(x + y) in text) - 0.01 * len(text) for text, x, y in zip(texts, a, b, strict=True)]


def run(trainer_class, config_class, folder, tokenizer, output_dir, **extra):
    seen = {"completions": [], "rewards": [], "losses": []}

    class Spy(trainer_class):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            seen["completions"].append(output["completion_ids"])
            seen["rewards"].append(output["advantages"])
            return output

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            seen["losses"].append(loss.detach())
            return loss

    rows = [{"prompt": tiny.question(a, b), "a": a, "b": b} for a in range(4) for b in range(4)]
    args = config_class(
        output_dir,
        num_generations=4,
        per_device_train_batch_size=8,
        max_completion_length=200,
        max_tool_calling_iterations=3,
        max_steps=3,
        learning_rate=1e-3,
        seed=7,
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **extra,
    )
    trainer = Spy(
        model=AutoModelForCausalLM.from_pretrained(folder),
        args=args,
        reward_funcs=reward,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        tools=[tiny.add],
    )
    trainer.train()
    seen["weights"] = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    seen["log"] = trainer.state.log_history
    return seen


@pytest.mark.parametrize("extra", [{}, {"beta": 0.1, "num_iterations": 2, "loss_type": "grpo"}])
def test_grpo_is_the_special_case(agent_dirs, tokenizer, tmp_path, extra):
    # Prefix sharing computes the same up to rounding; off, for equality to the bit
    folder = agent_dirs["chat_template"]
    grpo = run(GRPOTrainer, GRPOConfig, folder, tokenizer, str(tmp_path / "grpo"), **extra)
    arpo = run(
        ARPOTrainer,
        ARPOConfig,
        folder,
        tokenizer,
        str(tmp_path / "arpo"),
        num_initial_generations=4,
        prefix_sharing=False,
        **extra,
    )

    calls = [entry["tools/call_frequency"] for entry in grpo["log"] if "tools/call_frequency" in entry]
    assert max(calls) > 0.5, "the test's model must call tools, or nothing is shown"
    for key in ("completions", "rewards", "losses", "weights"):
        assert len(grpo[key]) == len(arpo[key])
        for left, right in zip(grpo[key], arpo[key], strict=True):
            assert torch.equal(left, right), key
    assert any(advantages.abs().sum() > 0 for advantages in grpo["rewards"])
    for left, right in zip(grpo["log"], arpo["log"], strict=True):
        shared = {key for key in left if "time" not in key and "runtime" not in key and "per_second" not in key}
        assert {key: left[key] for key in shared} == {key: right[key] for key in shared}
