"""A model whose logits the test writes, so that every rule of a rollout can be driven exactly.

Every character is a token. A *plan* is the text that the model writes, tool results left out, one item a token: a
character, a string of characters to choose from with equal probability, or `END`. Which plan a row follows is told by
its first token. A choice may also be a dict of logits.
"""

from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.viewer.records import read_file

END = "<end>"
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789<>/ ?!.'{}:\""
VOCAB = ["<pad>", END, *CHARACTERS]
PROMPT = "Q?"


def character_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCAB)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token="<pad>", padding_side="left")


def plan(text: str, *choices: tuple[int, str | dict[str, float]]) -> list:
    """`text` then the end of the turn, with choices at some positions: `plan("A<s>q</s>?b", (9, "xyz"))`."""
    items = [*text, END]
    for position, characters in choices:
        items[position] = characters
    return items


class ScriptedModel(Qwen3ForCausalLM):
    """
    Args:
        plans (`list[list[str]]`): Row i of the first batch, or of a batch of supplements, follows plan i.
    """

    def __init__(self, tokenizer, plans):
        super().__init__(
            Qwen3Config(
                vocab_size=len(VOCAB),
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
                max_position_embeddings=4096,
            )
        )
        self.tokenizer = tokenizer
        self.plans = plans
        self.batches: list[int] = []  # rows of each call of generate

    def generate(self, input_ids, **kwargs):
        self.batches.append(len(input_ids))
        return super().generate(input_ids, **kwargs)

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        for row, ids in enumerate(input_ids):
            text = self.tokenizer.decode(ids[ids != self.tokenizer.pad_token_id]).partition(PROMPT)[2]
            output.logits[row, -1] = self.next_logits(row, text)
        return output

    def next_logits(self, row: int, text: str) -> torch.Tensor:
        while "<result>" in text:  # the plan counts the model's own tokens
            head, tail = text.split("<result>", 1)
            text = head + tail.split("</result>", 1)[1]
        logits = torch.full((len(VOCAB),), -1e4)
        if not text:
            wanted = [self.plans[row % len(self.plans)][0]]
        else:
            items = next(items for items in self.plans if text[0] in items[0])
            item = items[len(text)] if len(text) < len(items) else END
            wanted = [item] if item == END else item
        for token in wanted:
            logits[VOCAB.index(token)] = wanted[token] if isinstance(wanted, dict) else 0.0
        return logits


def rollout(tmp_path: Path, plans, tools, initial: int, generations: int, **settings):
    """
    Run one training step of ARPO on one prompt; returns the group's records, the trainer and the model. `rule` is a
    branching rule as an instance, `resume` goes on from the last checkpoint; the rest are settings of `ARPOConfig`.
    """
    rule, resume = settings.pop("rule", None), settings.pop("resume", None)
    tokenizer = character_tokenizer()
    model = ScriptedModel(tokenizer, plans)
    columns = settings.pop("columns", {})
    reward = settings.pop("reward", lambda completions, **kwargs: [float(len(text)) for text in completions])
    args = ARPOConfig(
        str(tmp_path),
        **{
            "num_initial_generations": initial,
            "num_generations": generations,
            "per_device_train_batch_size": generations,
            "max_steps": 1,
            "max_completion_length": 200,
            "tool_protocol": "tags",
            "branch_rule": "threshold",
            "branch_threshold": 0.5,
            "generation_kwargs": {"use_cache": False},
            "log_rollouts": True,
            "logging_steps": 1,
            "bf16": False,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            **settings,
        },
    )
    trainer = ARPOTrainer(
        model=model,
        args=args,
        reward_funcs=reward,
        train_dataset=Dataset.from_list([{"prompt": PROMPT, **columns}] * 4),
        processing_class=tokenizer,
        tools=tools,
        branch_rule=rule,
    )
    trainer.train(resume_from_checkpoint=resume)
    records, _ = read_file(tmp_path / "rollouts" / "step-000000.jsonl.gz")
    for record in records:
        record["text"] = tokenizer.decode(record["completion_ids"])
    return records, trainer, model
