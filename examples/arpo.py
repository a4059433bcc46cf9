"""
Train an agent with ARPO.

```bash
python examples/arpo.py \
    --model_name_or_path Qwen/Qwen2.5-3B-Instruct \
    --dataset_name dongguanting/ARPO-RL-Reasoning-10K \
    --tool_protocol tags \
    --tools search python --search_corpus wiki.jsonl \
    --reward_funcs arpo_reward \
    --num_generations 16 --num_initial_generations 8 \
    --learning_rate 1e-6 \
    --output_dir Qwen2.5-3B-ARPO
```

With LoRA, add `--use_peft --lora_r 32 --lora_alpha 16`; with vLLM, `--use_vllm`; to the Hub, `--push_to_hub`. From a
file: `python examples/arpo.py --config recipe.yaml`. On several devices: `accelerate launch examples/arpo.py …`.
Without an accelerator it trains on the CPU in float32; `docs/troubleshooting.md` says what makes that faster.
"""

from dataclasses import dataclass, field
from pathlib import Path

from common import ToolArguments, build_rewards, build_tools, load_questions, make_parser
from trl import ModelConfig, ScriptArguments, get_peft_config, get_quantization_config

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.protocols import protocol_class


@dataclass
class ARPOScriptArguments(ToolArguments, ScriptArguments):
    """Arguments of the script, besides those of TRL."""

    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward functions: names from arpo_trl.rewards, or dotted paths. By default the paper's reward "
            "for the protocol: 'arpo_reward' (tags) or 'arpo_chat_reward' (chat_template)."
        },
    )


def main(script_args: ARPOScriptArguments, training_args: ARPOConfig, model_args: ModelConfig):
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }

    structured = protocol_class(training_args.tool_protocol).structured
    default_reward = "arpo_chat_reward" if structured else "arpo_reward"

    def load(split):
        return load_questions(script_args.dataset_name, split, script_args.dataset_config, training_args.tool_protocol)

    trainer = ARPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        reward_funcs=build_rewards(script_args.reward_funcs or [default_reward]),
        train_dataset=load(script_args.dataset_train_split),
        eval_dataset=load(script_args.dataset_test_split) if training_args.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        tools=build_tools(script_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        local = Path(script_args.dataset_name).exists()
        trainer.push_to_hub(dataset_name=None if local else script_args.dataset_name)
    trainer.end()


if __name__ == "__main__":
    main(*make_parser(ARPOScriptArguments, ARPOConfig, ModelConfig).parse_args_and_config())
