"""A small world for tests: a tokenizer that speaks Qwen3's tool format, and a model trained on the spot to call a
tool.

Building takes some seconds, once a session (see `conftest.py`).
"""

import importlib.resources

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

NUMBERS = range(10)


def add(a: int, b: int) -> int:
    """
    Add two numbers.

    Args:
        a: First number.
        b: Second number.

    Returns:
        The sum.
    """
    return a + b


def question(a: int, b: int) -> list[dict]:
    return [{"role": "user", "content": f"What is {a} plus {b}?"}]


def conversation(a: int, b: int, calls: int = 1) -> list[dict]:
    messages = question(a, b)
    for _ in range(calls):
        call = {"type": "function", "function": {"name": "add", "arguments": {"a": a, "b": b}}}
        messages += [{"role": "assistant", "content": "", "tool_calls": [call]}]
        messages += [{"role": "tool", "name": "add", "content": str(a + b)}]
    return messages + [{"role": "assistant", "content": f"It is {a + b}."}]


def tagged(a: int, b: int, calls: int = 1) -> list[dict]:
    call = f'<add>{{"a": {a}, "b": {b}}}</add><result>{a + b}</result>'
    return question(a, b) + [{"role": "assistant", "content": call * calls + f"<answer>\\boxed{{{a + b}}}</answer>"}]


def chat_template(name: str = "qwen3.jinja") -> str:
    return (importlib.resources.files("trl") / "chat_templates" / name).read_text()


def build_tokenizer(vocab_size: int = 700) -> PreTrainedTokenizerFast:
    """Byte-level BPE with Qwen3's special tokens and chat template; encodes any text without loss."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    ordinary = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    renderer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template())
    text = [renderer.apply_chat_template(m, tools=[add], tokenize=False) for m in (conversation(1, 2), tagged(3, 4))]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(ordinary),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left"
    )
    fast.add_tokens(ordinary)
    fast.chat_template = chat_template()
    return fast


def build_model(tokenizer, hidden: int = 64, layers: int = 2, seed: int = 0, head_dim: int = 16) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen3ForCausalLM(config)


def train_agent(tokenizer, protocol: str, steps: int = 220, seed: int = 0, head_dim: int = 16) -> Qwen3ForCausalLM:
    """A model that has learnt, imperfectly, to call `add` once or twice and to answer."""
    from trl.chat_template_utils import get_training_chat_template

    model = build_model(tokenizer, seed=seed, head_dim=head_dim)
    template = get_training_chat_template(tokenizer) if protocol == "chat_template" else None
    rows = []
    for a in NUMBERS:
        for b in NUMBERS:
            calls = 1 + (a + b) % 2
            messages = conversation(a, b, calls) if protocol == "chat_template" else tagged(a, b, calls)
            tools = [add] if protocol == "chat_template" else None
            ids = tokenizer.apply_chat_template(messages, tools=tools, chat_template=template, return_dict=False)
            head = tokenizer.apply_chat_template(
                messages[:1], tools=tools, chat_template=template, return_dict=False, add_generation_prompt=True
            )
            rows.append((ids, len(head)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        picked = [rows[i] for i in torch.randint(len(rows), (12,), generator=generator)]
        length = max(len(ids) for ids, _ in picked)
        input_ids = torch.full((len(picked), length), tokenizer.pad_token_id)
        labels = torch.full((len(picked), length), -100)
        for i, (ids, start) in enumerate(picked):
            input_ids[i, : len(ids)] = torch.tensor(ids)
            labels[i, start : len(ids)] = torch.tensor(ids[start:])
        loss = model(input_ids=input_ids, labels=labels, attention_mask=input_ids != tokenizer.pad_token_id).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()
