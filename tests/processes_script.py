"""What `test_processes.py` and `test_hub.py` launch: `accelerate launch … tests/processes_script.py <scenarios>
<folder> <agent>`.

All scenarios of one launch run one after another, since starting costs more than running. Each process leaves what
only it can know in `<folder>/<scenario>/process-<rank>.json`.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path

import multimodal
import test_images
import tiny
import torch
from accelerate import DistributedType, PartialState
from datasets import Dataset
from scripted import PROMPT, ScriptedModel, character_tokenizer, plan
from transformers import AutoModelForCausalLM, AutoTokenizer

from arpo_trl import ARPOConfig, ARPOTrainer

ROWS = [{"prompt": tiny.question(a, b), "a": a, "b": b} for a in range(4) for b in range(4)]
FIXED = {
    "max_steps": 1,
    "log_rollouts": True,
    "logging_steps": 1,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}


def s(query: str) -> str:
    """
    Search.

    Args:
        query: What to look for.
    """
    return "found"


def correct(completions, a, b, **kwargs):
    texts = [completion[-1].get("content") or "" if completion else "" for completion in completions]
    return [float(str(x + y) in text) - 0.01 * len(text) for text, x, y in zip(texts, a, b, strict=True)]


def length(completions, **kwargs):
    return [float(len(text)) for text in completions]


def scripted(folder: Path, plans, tool=s, **settings) -> ARPOTrainer:
    """A trainer whose model follows `plans`, of one prompt."""
    tokenizer = character_tokenizer()
    settings = {
        "max_completion_length": 300,
        "max_tool_calling_iterations": 4,
        "tool_protocol": "tags",
        "branch_rule": "threshold",
        "generation_kwargs": {"use_cache": False},
        "gradient_checkpointing": False,
        **settings,
    }
    return ARPOTrainer(
        model=ScriptedModel(tokenizer, plans),
        args=ARPOConfig(str(folder), **{**FIXED, **settings}),
        reward_funcs=length,
        train_dataset=Dataset.from_list([{"prompt": PROMPT}] * 8),
        processing_class=tokenizer,
        tools=[tool],
    )


def agent(folder: Path, checkpoint: str, reward=correct, **settings) -> ARPOTrainer:
    """A trainer whose model has learnt to call `add`."""
    settings = {
        "num_generations": 4,
        "num_initial_generations": 2,
        "per_device_train_batch_size": 8,
        "max_completion_length": 120,
        "max_tool_calling_iterations": 3,
        **settings,
    }
    return ARPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(checkpoint),
        args=ARPOConfig(str(folder), **{**FIXED, **settings}),
        reward_funcs=reward,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
        tools=[tiny.add],
    )


def scenario(name: str, folder: Path, checkpoint: str) -> ARPOTrainer:
    rank = PartialState().process_index
    if name == "split":  # a group of 6 over both: 3 rows each, one initial trajectory here and two there
        plans = [
            [plan("A<s>q</s>?c", (9, "xyzw"))],
            [plan("B<s>q</s>?c", (9, "xy")), plan("C<s>q</s>?c", (9, "abcdefgh"))],
        ]
        settings = {"num_generations": 6, "num_initial_generations": 3, "per_device_train_batch_size": 3}
        return scripted(folder, plans[rank], **settings)
    if name == "uneven":  # a group each: eight waves here, two there
        plans = [[plan("A<s>q</s><s>q</s><s>q</s>c")], [plan("B")]]
        settings = {"num_generations": 4, "num_initial_generations": 2, "per_device_train_batch_size": 4}
        return scripted(folder, plans[rank], **settings)
    if name == "hang":  # on process 1 alone
        forever = threading.Event()

        def s(query: str) -> str:
            """
            Search.

            Args:
                query: What to look for.
            """
            if rank == 1:
                forever.wait()
            return "found"

        settings = {"num_generations": 4, "num_initial_generations": 2, "per_device_train_batch_size": 2}
        return scripted(folder, [plan("A<s>q</s>c")], tool=s, tool_timeout=1.0, max_steps=2, **settings)
    if name == "eager":  # tools that take their time on process 1 alone, a group each

        def s(query: str) -> str:
            """
            Search.

            Args:
                query: What to look for.
            """
            time.sleep(0.3 * rank)
            return "found"

        settings = {"num_generations": 4, "num_initial_generations": 2, "per_device_train_batch_size": 4}
        return scripted(
            folder, [plan("A<s>q</s><s>q</s>c")], tool=s, rollout_schedule="eager", max_steps=2, **settings
        )
    if name == "contrast":  # a group each: all rows as long as each other here, and not there
        plans = [
            [plan("A<s>q</s>?c", (9, "xyzw"))],
            [plan("B<s>q</s>?c", (9, "xy")), plan("C<s>q</s>?ccc", (9, "xy"))],
        ]
        settings = {"num_generations": 6, "num_initial_generations": 2, "per_device_train_batch_size": 6}
        settings |= {"branch_rule": "contrast", "fork_sampling": "distinct", "dynamic_sampling": True}
        return scripted(folder, plans[rank], **settings)
    if name == "continuous":  # a group each; here many segments, there tools that take their time
        plans = [[plan("A<s>q</s><s>q</s><s>q</s>c")], [plan("B<s>q</s>?c", (9, "xyzw"))]]

        def s(query: str) -> str:
            """
            Search.

            Args:
                query: What to look for.
            """
            time.sleep(0.3 * rank)
            return "found"

        settings = {"num_generations": 4, "num_initial_generations": 2, "per_device_train_batch_size": 4}
        return scripted(folder, plans[rank], tool=s, rollout_schedule="continuous", max_steps=2, **settings)
    if name == "agent-whole":
        return agent(folder, checkpoint, max_steps=2, learning_rate=1e-3)
    if name == "agent-split":
        settings = {"num_generations": 8, "num_initial_generations": 4, "per_device_train_batch_size": 4}
        return agent(folder, checkpoint, max_steps=2, learning_rate=1e-3, advantage_attribution="hard", **settings)
    if name in ("agent-shared", "agent-stock"):  # SGD, so that rounding stays rounding
        return agent(folder, checkpoint, optim="sgd", learning_rate=0.1, prefix_sharing=name == "agent-shared")
    if name == "multimodal":  # text on a checkpoint with a vision tower, which gets no gradient; a group each
        model, processor = multimodal.build("Qwen3.5, no thinking")
        settings = {"num_generations": 4, "num_initial_generations": 2, "per_device_train_batch_size": 4}
        settings |= {"branch_rule": "threshold", "branch_threshold": 1e-4, "max_completion_length": 220}
        return ARPOTrainer(
            model=multimodal.asks_then_answers(model, processor),
            args=ARPOConfig(str(folder), **{**FIXED, **settings, "learning_rate": 0.1, "max_steps": 2}),
            reward_funcs=lambda completions, **kwargs: [float(sum(map(ord, str(c))) % 7) for c in completions],
            train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": "The weather?"}]}] * 4),
            processing_class=processor,
            tools=[multimodal.weather],
        )
    if name == "images":  # a group each: the prompt here has one, the prompt there none, and here are more waves
        rows = [{"prompt": multimodal.PROMPT, "image": multimodal.PICTURE}]
        rows += [{"prompt": [{"role": "user", "content": "And there?"}], "image": None}]
        settings = {"per_device_train_batch_size": 1, "steps_per_generation": 4, "shuffle_dataset": False}
        return multimodal.trainer_of(
            "Qwen3-VL",
            folder,
            rows=rows * 2,
            tools=[test_images.sometimes_a_photo()],
            questions=2 - rank,
            **{**FIXED, **settings, "max_steps": 2, "max_completion_length": 400},
        )
    if name == "victim":  # hangs in the middle of its third step until it is killed

        def hanging(completions, trainer_state, **kwargs):
            if trainer_state.global_step == 2:
                (folder / "in-step-3").touch()
                time.sleep(600)
            return correct(completions, **kwargs)

        return resumable(folder, checkpoint, hanging)
    raise ValueError(f"no scenario is called {name!r}")


def resumable(folder: Path, checkpoint: str, reward=correct) -> ARPOTrainer:
    return agent(
        folder, checkpoint, reward, max_steps=4, learning_rate=1e-3, save_strategy="steps", save_steps=2, seed=3
    )


def main(names: str, folder: str, checkpoint: str):
    sharded = "true" in (os.environ.get("ACCELERATE_USE_FSDP"), os.environ.get("ACCELERATE_USE_DEEPSPEED"))
    if sharded:
        # Accelerate shards on accelerators alone and would quietly fall back to DDP; torch and DeepSpeed shard on CPU
        # too
        PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
        PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
        FIXED["use_cpu"] = False
    state = PartialState(cpu=not sharded)
    for name in names.split(","):
        trainer = scenario(name, Path(folder) / name, checkpoint)
        trainer.train()
        if name == "images":  # the steps were those of one rollout, by the weights that the model had
            model, _ = multimodal.build("Qwen3-VL")
            test_images.check_scores(trainer, model)
        trainer.save_model(str(Path(folder) / name / "final"))
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        facts = {
            "distributed": state.distributed_type.value,
            "sharded": any(hasattr(p, "full_tensor") or hasattr(p, "ds_id") for p in model.parameters()),
            "batches": getattr(model, "batches", None),  # rows of each call of generate
            "weights": None if sharded else torch.cat([p.detach().flatten() for p in model.parameters()]).tolist(),
            "logs": trainer.state.log_history,
        }
        (Path(folder) / name / f"process-{state.process_index}.json").write_text(json.dumps(facts))
        state.wait_for_everyone()


if __name__ == "__main__":
    main(*sys.argv[1:])
