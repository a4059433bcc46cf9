"""QLoRA on a CPU: a base model in 4 bits, of which only a LoRA adapter is trained, with branching on."""

import pytest
import tiny
import torch
from datasets import Dataset
from test_trainer_options import ROWS, reward
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.viewer.records import read_file

pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")

FOUR_BITS = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
)
ADAPTER = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def qlora(checkpoint, tokenizer, folder, quantization_config=FOUR_BITS, **settings) -> ARPOTrainer:
    return ARPOTrainer(
        model=checkpoint,
        args=ARPOConfig(
            str(folder),
            **{
                "model_init_kwargs": {"device_map": "cpu", "dtype": "float32"},
                "num_generations": 4,
                "num_initial_generations": 2,
                "per_device_train_batch_size": 8,
                "max_completion_length": 120,
                "max_tool_calling_iterations": 3,
                "branch_rule": "random",
                "branch_probability": 1.0,
                "max_steps": 2,
                "learning_rate": 1e-3,
                "logging_steps": 1,
                "log_rollouts": True,
                "bf16": False,
                "use_cpu": True,
                "report_to": "none",
                "save_strategy": "no",
                "disable_tqdm": True,
                **settings,
            },
        ),
        reward_funcs=reward,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
        tools=[tiny.add],
        quantization_config=quantization_config,
        peft_config=ADAPTER,
    )


def records(folder):
    paths = sorted((folder / "rollouts").iterdir())
    return [record for path in paths for record in read_file(path)[0]]


def adapter(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if "lora_" in name}


def base(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if "lora_" not in name}


@torch.no_grad()
def disturb(model, scale):
    """Give the adapter, which does nothing at first, an effect."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="module")
def trained(agent_dirs, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("qlora")
    trainer = qlora(agent_dirs["chat_template"], tokenizer, folder)
    weights = [(base(trainer.model), adapter(trainer.model))]
    trainer.train()
    weights.append((base(trainer.model), adapter(trainer.model)))
    trainer.save_model(str(folder / "adapter"))
    return trainer, weights, folder


def test_it_trains_with_forks(trained):
    trainer, _, folder = trained
    rows = records(folder)
    assert [record["row"] for record in rows] == [0, 1, 2, 3] * 4
    assert sum(record["kind"] == "fork" for record in rows) >= 4
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 2 and all(log["grad_norm"] > 0 for log in logs)


def test_only_the_adapter_changes(trained):
    _, ((base_before, adapter_before), (base_after, adapter_after)), _ = trained
    quantized = [name for name, value in base_before.items() if value.dtype == torch.uint8]
    assert len(quantized) == 2 * 7, "every projection of both layers is in 4 bits"
    assert all(torch.equal(value, base_after[name]) for name, value in base_before.items())
    assert not any(torch.equal(value, adapter_after[name]) for name, value in adapter_before.items())


@pytest.mark.parametrize("quantization_config", [FOUR_BITS, None], ids=["QLoRA", "LoRA"])
def test_the_rollout_samples_from_the_adapted_policy(agent_dirs, tokenizer, tmp_path, quantization_config):
    """At a temperature near 0 every sampled token is the argmax of the adapted model, and often not of the base's."""
    trainer = qlora(
        agent_dirs["chat_template"],
        tokenizer,
        tmp_path,
        quantization_config,
        temperature=1e-3,
        learning_rate=0.0,
        max_steps=1,
    )
    disturb(trainer.model, 0.1)
    trainer.train()
    model = trainer.model.eval()
    sampled, adapted, plain = [], [], []
    for record in records(tmp_path):
        prompt, ids = record["prompt_ids"], record["completion_ids"]
        own = torch.tensor(record["tool_mask"]).bool()
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            with model.disable_adapter():
                base_logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        sampled.append(torch.tensor(ids)[own])
        adapted.append(logits.argmax(-1)[own])
        plain.append(base_logits.argmax(-1)[own])
    sampled, adapted, plain = (torch.cat(parts) for parts in (sampled, adapted, plain))
    assert (sampled == adapted).float().mean() > 0.98 and (sampled == plain).float().mean() < 0.8


def test_prefix_sharing_gives_the_same_step(agent_dirs, tokenizer, tmp_path):
    steps, rollouts = {}, {}
    for sharing in (True, False):
        folder = tmp_path / str(sharing)
        trainer = qlora(
            agent_dirs["chat_template"], tokenizer, folder, prefix_sharing=sharing, optim="sgd", max_steps=1,
            learning_rate=1.0,
        )  # fmt: skip
        disturb(trainer.model, 0.02)
        before = adapter(trainer.model)
        trainer.train()
        after = adapter(trainer.model)
        steps[sharing] = torch.cat([(after[name].float() - before[name].float()).flatten() for name in before])
        rollouts[sharing] = [record["completion_ids"] for record in records(folder)]
    assert rollouts[True] == rollouts[False]
    # The adapter is in bfloat16, as TRL makes it
    assert (steps[True] - steps[False]).norm() < 0.02 * steps[False].norm()
    assert not torch.equal(steps[True], steps[False]), "prefixes were shared"


def test_the_saved_adapter_reloads_and_merges(trained, agent_dirs, tokenizer):
    trainer, _, folder = trained
    files = {path.name for path in (folder / "adapter").iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    ids = torch.tensor([tokenizer.encode("What is 1 plus 2?")])

    def load(**kwargs):
        whole = AutoModelForCausalLM.from_pretrained(agent_dirs["chat_template"], dtype=torch.float32, **kwargs)
        return peft.PeftModel.from_pretrained(whole, folder / "adapter").eval()

    with torch.no_grad():
        trained_logits = trainer.model.eval()(ids).logits
        reloaded = load(quantization_config=FOUR_BITS, device_map="cpu")(ids).logits
        assert torch.allclose(reloaded, trained_logits, atol=0.05), "but for bfloat16"
        # The way to merge is into the base model as it was before it was quantized
        whole = load()
        adapted = whole(ids).logits
        with whole.disable_adapter():
            assert not torch.allclose(whole(ids).logits, adapted, atol=0.05)
        merged = whole.merge_and_unload()
        assert not isinstance(merged, peft.PeftModel)
        assert torch.allclose(merged(ids).logits, adapted, atol=1e-4)
