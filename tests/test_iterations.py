"""A batch with forks that is used more than once (`num_iterations`) is used as TRL uses one."""

import copy
import random

import pytest
import tiny
import torch
from datasets import Dataset
from test_trainer_grpo_equivalence import reward
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from arpo_trl import ARPOConfig, ARPOTrainer


def run(trainer_class, config_class, folder, tokenizer, output_dir, spy, **extra):
    """Losses by step, with the weights at the end; `spy(trainer, generate, inputs)` stands in for the rollout."""
    losses = []

    class Spy(trainer_class):
        def _generate_and_score_completions(self, inputs):
            output = spy(super()._generate_and_score_completions, inputs, int(self.state.global_step))
            torch.manual_seed(self.state.global_step)  # of the shuffle of the batch, whatever a rollout has drawn
            random.seed(self.state.global_step)
            return output

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.detach())
            return loss

    trainer = Spy(
        model=AutoModelForCausalLM.from_pretrained(folder),
        args=config_class(
            output_dir,
            num_generations=4,
            per_device_train_batch_size=8,
            max_completion_length=120,
            learning_rate=1e-3,
            seed=7,
            logging_steps=1,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **extra,
        ),
        reward_funcs=reward,
        train_dataset=Dataset.from_list([{"prompt": tiny.question(a, 1), "a": a, "b": 1} for a in range(8)]),
        processing_class=tokenizer,
        tools=[tiny.add],
    )
    trainer.train()
    return losses, [parameter.detach().clone() for parameter in trainer.model.parameters()]


@pytest.mark.parametrize(
    "iterations, settings",
    [
        (2, {"advantage_attribution": "soft"}),
        (2, {"advantage_attribution": "hard", "fork_sampling": "weighted"}),
        (4, {"advantage_attribution": "soft", "branch_rule": "expansion"}),
    ],
)
def test_a_batch_with_forks_is_used_again_as_trl_uses_one(agent_dirs, tokenizer, tmp_path, iterations, settings):
    batches, forks = {}, []
    folder = agent_dirs["chat_template"]
    shared = {"num_iterations": iterations, "max_steps": 2 * iterations}

    def keep(generate, inputs, step):
        output = generate(inputs)
        batches[step] = copy.deepcopy(output)
        forks.extend(row.kind == "fork" for group in generate.__self__._groups for row in group.trajectories)
        return output

    settings = {"branch_rule": "random", "branch_probability": 1.0, "num_initial_generations": 2} | settings
    arpo = run(
        *(ARPOTrainer, ARPOConfig, folder, tokenizer, str(tmp_path / "arpo"), keep),
        prefix_sharing=False,
        **settings,
        **shared,
    )
    assert any(forks) and sorted(batches) == [0, iterations], "one rollout for each so many steps"
    assert all("old_per_token_logps" in batch for batch in batches.values())

    def give(generate, inputs, step):
        return copy.deepcopy(batches[step])

    grpo = run(*(GRPOTrainer, GRPOConfig, folder, tokenizer, str(tmp_path / "grpo"), give), **shared)
    assert len(arpo[0]) == len(grpo[0]) == 2 * iterations
    for left, right in zip([*arpo[0], *arpo[1]], [*grpo[0], *grpo[1]], strict=True):
        assert torch.equal(left, right)
    assert len({loss.item() for loss in arpo[0]}) > 2, "the ratio leaves 1 when the batch is used again"
