r"""Cold start: supervised fine-tuning on traces with tool calls, before ARPO.

Loss falls on what the assistant wrote, never on what a tool answered.

```bash
python examples/sft_cold_start.py \
    --model_name_or_path Qwen/Qwen3-1.7B \
    --dataset_name traces.jsonl \
    --tool_protocol tags \
    --max_length 8192 \
    --output_dir outputs/cold_start
```

From a file, on all GPUs, to the Hub:

```bash
accelerate launch examples/sft_cold_start.py --config cold_start.yaml --push_to_hub
```

With LoRA:

```bash
python examples/sft_cold_start.py --config cold_start.yaml --use_peft --lora_r 32 --lora_alpha 64 --learning_rate 2e-4
```

The data set is a local JSON, JSONL or parquet file, or the id of one on the Hub, in either shape:

- `conversations`, possibly `system`: ShareGPT, the shape of the published cold-start set, whose traces speak the tags
  protocol; for the chat template they are rewritten as tool calls and tool turns;
- `messages`, possibly `tools`: TRL's conversational shape, the traces in the protocol that `--tool_protocol` names.

Does NOT make traces, and does NOT check that they end in the right answer.
"""

from dataclasses import dataclass, field
from pathlib import Path

from common import make_parser
from datasets import Dataset, IterableDataset, load_dataset
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from trl import (
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    get_peft_config,
    get_quantization_config,
)

from arpo_trl.data import load_cold_start, tags_sft_features
from arpo_trl.protocols import check_chat_template, mark_checkpoint


@dataclass
class ColdStartArguments(ScriptArguments):
    """
    Script arguments of the cold start: TRL's, and how the traces speak to tools.

    Args:
        tool_protocol (`str`, *optional*, defaults to `"tags"`):
            `"tags"` or `"chat_template"`, as in [`~arpo_trl.ARPOConfig`].
    """

    tool_protocol: str = field(
        default="tags",
        metadata={
            "help": "How the traces call tools and read results: 'tags' or 'chat_template'.",
            "choices": ["tags", "chat_template"],
        },
    )


def load_traces(path: str, split: str = "train", config: str | None = None, protocol: str = "tags") -> Dataset:
    """
    A data set of traces in TRL's conversational shape.

    Args:
        path (`str`): Local .json, .jsonl or .parquet file, or a hub id.
        split (`str`, *optional*, defaults to `"train"`): Split of a hub data set; a local file is one split.
        config (`str`, *optional*): Configuration of a hub data set.
        protocol (`str`, *optional*, defaults to `"tags"`): `"tags"` or `"chat_template"`.

    Returns:
        `Dataset`: With a column `messages`, and possibly `tools`.
    """
    if Path(path).is_file():
        kind = "parquet" if path.endswith(".parquet") else "json"
        traces = load_dataset(kind, data_files=path, split="train")
    else:
        traces = load_dataset(path, name=config, split=split)
    if "conversations" in traces.column_names:
        return load_cold_start(path, protocol, split)
    if "messages" not in traces.column_names:
        raise ValueError(
            f"`--dataset_name {path}` has neither the column `messages` nor `conversations` "
            f"(it has {', '.join(traces.column_names)})."
        )
    return traces


def cold_start_trainer(
    model: str | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    args: SFTConfig,
    traces: Dataset | IterableDataset,
    eval_traces: Dataset | None = None,
    protocol: str = "tags",
    **kwargs,
) -> SFTTrainer:
    """
    A trainer whose loss leaves tool results out.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]): Model, or where it is.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]): Its tokenizer, with
            a chat template; of a multimodal checkpoint its processor.
        args ([`~trl.SFTConfig`]): Training arguments; the one that chooses where loss falls is set here.
        traces (`Dataset` or `IterableDataset`): Data set with a column `messages`, and possibly `tools`.
        eval_traces (`Dataset`, *optional*): As `traces`.
        protocol (`str`, *optional*, defaults to `"tags"`): `"tags"` or `"chat_template"`.
        **kwargs: Passed to [`~trl.SFTTrainer`].

    Returns:
        [`~trl.SFTTrainer`]: For the chat template it finds the assistant's tokens with TRL's training variant of the
        template; for tags it gets tokens and mask from here. The tokenizer that it saves says which protocol the model
        speaks.
    """
    mark_checkpoint(tokenizer.tokenizer if isinstance(tokenizer, ProcessorMixin) else tokenizer, protocol)
    if protocol == "chat_template":
        if "tools" in (traces.column_names or ()):
            check_chat_template(tokenizer, fine_tuning=True)
        args.assistant_only_loss = True
    else:
        args.completion_only_loss = True
        traces = _tokenize_tags(traces, tokenizer)
        eval_traces = eval_traces and _tokenize_tags(eval_traces, tokenizer)
    return SFTTrainer(
        model, args, train_dataset=traces, eval_dataset=eval_traces, processing_class=tokenizer, **kwargs
    )


def _tokenize_tags(traces: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    def tokenize(row):
        return tags_sft_features(tokenizer, row["messages"])

    return traces.map(tokenize, remove_columns=traces.column_names, desc="Tokenizing")


def main(script_args: ColdStartArguments, training_args: SFTConfig, model_args: ModelConfig) -> SFTTrainer:
    """Train, save, and push if asked to."""
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    tokenizer = AutoTokenizer.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
        # here, and not only in the trainer: the tags protocol is tokenized before there is one
        **({"eos_token": training_args.eos_token} if training_args.eos_token else {}),
    )

    def load(split: str) -> Dataset:
        return load_traces(script_args.dataset_name, split, script_args.dataset_config, script_args.tool_protocol)

    trainer = cold_start_trainer(
        model_args.model_name_or_path,
        tokenizer,
        training_args,
        load(script_args.dataset_train_split),
        load(script_args.dataset_test_split) if training_args.eval_strategy != "no" else None,
        script_args.tool_protocol,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        local = Path(script_args.dataset_name).exists()
        trainer.push_to_hub(dataset_name=None if local else script_args.dataset_name)
    return trainer


if __name__ == "__main__":
    main(*make_parser(ColdStartArguments, SFTConfig, ModelConfig).parse_args_and_config()).end()
