"""Every chat template of TRL's that knows tools, held to what a rollout makes of it: a conversation with two rounds of
calls, produced turn by turn (parse, run, append the results, go on), is token for token what the template renders.
"""

import importlib.resources
import re
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import trl_suite
from trl import GRPOTrainer
from trl.chat_template_utils import (
    add_response_schema,
    get_training_chat_template,
    is_chat_template_prefix_preserving,
    supports_tool_calling,
)

from arpo_trl.protocols import ChatTemplateProtocol, check_chat_template, suffix
from arpo_trl.protocols.suffix import suffix_renderer

FOLDER = importlib.resources.files("trl") / "chat_templates"
NAMES = sorted(file.name.removesuffix(".jinja") for file in FOLDER.iterdir() if file.name.endswith(".jinja"))
# A token of a template: a mark in brackets
MARK = re.compile(
    r'<[|｜][^<>\s]{1,30}[|｜]>|<[|｜][a-z_]+>|<[a-z_]+[|｜]>|</?(?:think|tool_call|tool_response)>|<\|"\|>'
)

# What ends a turn, by the family's beginning: the tokenizer's EOS first, then what the checkpoint's generation config
# adds
ENDS = {
    "deepseekv3": ["<｜end▁of▁sentence｜>"],
    "diffusion_gemma": ["<eos>", "<turn|>", "<|tool_response>"],
    "gemma4": ["<eos>", "<turn|>", "<|tool_response>"],
    "glm4moe": ["<|endoftext|>", "<|user|>", "<|observation|>"],
    "gptoss": ["<|return|>", "<|call|>"],
    "llama3": ["<|eot_id|>"],
    "muse_glimmer": ["<|eot|>"],
}

# Templates that speak of tools, and which the trainer refuses all the same, with the reason
REFUSED = {
    "deepseekv3": "TRL has no parser for it",
    "deepseekv3_training": "TRL has no parser for it",
    "diffusion_gemma": "TRL has no parser for it",
    "diffusion_gemma_training": "TRL has no parser for it",
    "muse_glimmer": "the checkpoint ships its own parser",
    "muse_glimmer_training": "the checkpoint ships its own parser",
}

# Templates that forget the thoughts of earlier turns when the answer is there, and how they have written one
FORGETS = {"gptoss": "<|channel|>analysis<|message|>I think.<|end|><|start|>assistant"}

# Templates that render one call a turn at most, as TRL's documentation of them says
ONE_CALL = ("gptoss", "llama3_1", "llama3_2")


def search(query: str, limit: int = 3) -> str:
    """
    Search.

    Args:
        query: What to look for.
        limit: How many.
    """


def add(a: int, b: int) -> int:
    """
    Add.

    Args:
        a: First.
        b: Second.
    """


TOOLS = {"search": search, "add": add}


def original(name: str) -> str:
    return name.removesuffix("_training")


def tokenizer_of(name: str):
    """A tokenizer with the template, whose marks are tokens."""
    template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    ends = next((ends for family, ends in ENDS.items() if name.startswith(family)), ["<|im_end|>"])
    marks = sorted({*MARK.findall(template), *ends} - {ends[0], "<pad>", "<bos>"})
    tokenizer = trl_suite.plain_tokenizer("qwen3", ends[0], *marks)
    tokenizer.chat_template = template
    return tokenizer, set(tokenizer.convert_tokens_to_ids(ends))


def knows_tools(name: str) -> bool:
    return supports_tool_calling(tokenizer_of(name)[0])


SPOKEN = [name for name in NAMES if knows_tools(name) and name not in REFUSED]


def call(tool: str, **arguments) -> dict:
    return {"type": "function", "function": {"name": tool, "arguments": arguments}}


def with_ids(message: dict) -> dict:
    """The message with ids of its calls, as clients write them; the results' are counted from the turn's first."""
    if "tool_calls" not in message:
        return message
    return {**message, "tool_calls": [{**made, "id": str(i)} for i, made in enumerate(message["tool_calls"])]}


def turns(name: str) -> list[dict]:
    """What the assistant says: a call, two calls of which one fails, and an answer."""
    both = [call("add", a=1, b=2), call("search", query="z")]
    return [
        {"content": "", "tool_calls": [call("search", query="x y", limit=2)]},
        {"content": "", "tool_calls": both[:1] if original(name) in ONE_CALL else both},
        {"content": "It is 3."},
    ]


def thought(text: str) -> dict:
    """The name of the field is the template's own."""
    return {"reasoning_content": text, "thinking": text} if text else {}


ANSWERS = {"add": "3", "search": "found it"}


def without(row: list[int], piece: list[int]) -> list[int]:
    """The row without the piece, wherever it is; an empty one is nowhere."""
    places = [place for place in range(len(row)) if row[place : place + len(piece)] == piece]
    taken = {place + offset for place in places for offset in range(len(piece))}
    return [token for place, token in enumerate(row) if place not in taken]


class Conversation:
    """A conversation as a template renders it."""

    def __init__(self, name: str, thoughts: Sequence[str]):
        self.thoughts = thoughts
        self.tokenizer, self.ends = tokenizer_of(name)
        self.forgotten = self.tokenizer.encode(FORGETS.get(original(name), ""))
        parser, _ = tokenizer_of(original(name))
        add_response_schema(
            parser
        )  # TRL knows a template by its text; a checkpoint with a training one has the parser
        self.tokenizer.response_template = parser.response_template
        own = is_chat_template_prefix_preserving(self.tokenizer)
        self.template = None if own else get_training_chat_template(self.tokenizer)
        self.messages = [{"role": "user", "content": "What is up?"}]

    def ids(self, *more: dict, prompt: bool = False) -> list[int]:
        return self.tokenizer.apply_chat_template(
            list(map(with_ids, [*self.messages, *more])),
            tools=list(TOOLS.values()),
            chat_template=self.template,
            add_generation_prompt=prompt,
            return_dict=False,
        )

    def written(self, turn: dict) -> tuple[dict, list[int]]:
        """
        The message, with a thought if it has one, and what a model writes of it: up to the token that ends it, which
        may be the first of the results.
        """
        head = self.ids(prompt=True)
        if "tool_calls" not in turn:
            head = without(head, self.forgotten)
        for text in self.thoughts:
            message = {"role": "assistant", **turn, **thought(text)}
            whole = self.ids(message)
            if whole[: len(head)] != head:
                continue
            rest = whole[len(head) :]
            if text not in self.tokenizer.decode(rest):  # the template writes no thought into a turn of this kind
                message = {"role": "assistant", **turn}
            stop = next((place for place, token in enumerate(rest) if token in self.ends), None)
            if stop is not None:
                return message, rest[: stop + 1]
            if "tool_calls" in turn:
                follows = self.ids(message, {"role": "tool", "name": "add", "content": ""})[len(whole)]
            else:
                follows = next(token for token in self.ids() if token in self.ends)  # a question begins with it
            assert follows in self.ends
            return message, [*rest, follows]
        raise AssertionError("no turn of this kind goes on from the generation prompt")


def assert_parsed(parsed: dict, message: dict, name: str) -> None:
    assert (parsed.get("content") or "").strip() == message["content"]
    got = parsed.get("reasoning_content") or parsed.get("thinking") or ""
    assert got.strip() == message.get("thinking", "")
    assert (parsed.get("tool_calls") or []) == message.get("tool_calls", [])


def thinks(name: str) -> bool:
    """Whether the template renders the thought of a turn with calls."""
    tokenizer, _ = tokenizer_of(name)
    message = {"role": "assistant", **turns(name)[0], **thought("I think.")}
    return "I think." in tokenizer.apply_chat_template([{"role": "user", "content": ""}, message], tokenize=False)


CASES = [(name, False) for name in SPOKEN] + [(name, True) for name in SPOKEN if thinks(name)]


@pytest.mark.parametrize("name, thinks", CASES)
def test_a_rollout_is_what_the_template_renders(name, thinks):
    conversation = Conversation(name, ("I think.", "") if thinks else ("", "I think."))
    protocol = ChatTemplateProtocol(
        conversation.tokenizer, list(TOOLS), suffix_renderer(conversation.tokenizer, conversation.template)
    )
    row = conversation.ids(prompt=True)
    for turn in turns(name):
        message, written = conversation.written(turn)
        parsed = protocol.parse(written, row, TOOLS)
        assert_parsed(parsed.message, message, name)
        row += written
        conversation.messages.append(message)
        for index, made in enumerate(parsed.calls):
            made.result = ANSWERS[made.name] if index == 0 else str({"error": "nothing"})
        if parsed.calls:
            row += protocol.result_ids(parsed.calls, written)
            results = enumerate(protocol.results_turn(parsed.calls))
            conversation.messages += [{**result, "tool_call_id": str(index)} for index, result in results]
            assert conversation.tokenizer.decode(row) == conversation.tokenizer.decode(conversation.ids(prompt=True))
            assert row == conversation.ids(prompt=True)
    # What is behind the token that ends the answer (a line break), or that token itself, the other of both may lack
    whole, row = without(conversation.ids(), conversation.forgotten), without(row, conversation.forgotten)
    assert row[: len(whole)] == whole[: len(row)] and abs(len(row) - len(whole)) <= 1


def test_the_cases_are_those_of_the_installed_trl():
    """A template that TRL adds is either spoken, or refused with the reason."""
    spoken = {original(name) for name in SPOKEN}
    assert {"qwen3", "qwen3_5_think", "qwen3_6", "qwen3_8", "qwen3_vl", "gemma4_v5", "glm4moe", "gptoss"} <= spoken
    assert {name for name, thinks in CASES if thinks} >= {
        "qwen3",
        "qwen3_8",
        "gemma4_v5",
        "glm4moe",
        "gptoss",
        "lfm2_2_5",
    }
    for name in REFUSED:
        tokenizer, _ = tokenizer_of(name)
        with pytest.raises(ValueError, match="is none whose tool calls TRL can parse"):
            check_chat_template(tokenizer)
    assert not spoken & {original(name) for name in REFUSED}


@pytest.mark.parametrize("name", SPOKEN)
def test_a_model_that_does_not_stop_behind_its_call_is_told_of(name, monkeypatch):
    told = []
    monkeypatch.setattr(suffix.logger, "warning", told.append)
    conversation = Conversation(name, ("", "I think."))
    template = (conversation.tokenizer, conversation.template, {})
    suffix.warn_of_endless_calls(*template, sorted(conversation.ends))
    assert not told
    suffix.warn_of_endless_calls(*template, [conversation.tokenizer.eos_token_id])
    if conversation.tokenizer.eos_token_id in conversation.written(turns(name)[0])[1]:
        assert not told
    else:
        (warning,) = told
        assert f"Generation stops at [{conversation.tokenizer.eos_token!r}]" in warning
        assert "generation_config.eos_token_id" in warning


# Where TRL's own rendering differs from its template

DIFFERENT = {
    "gemma4": "results of a turn are all named after the first call",
    "gemma4_v2": "the line break after `<turn|>` is missing",
    "glm4moe": "`<|observation|>` stands twice",
}


@pytest.mark.parametrize("name", SPOKEN)
def test_results_are_those_of_trl_but_where_it_differs_from_its_template(name):
    conversation = Conversation(name, ("", "I think."))
    protocol = ChatTemplateProtocol(
        conversation.tokenizer, list(TOOLS), suffix_renderer(conversation.tokenizer, conversation.template)
    )
    trainer = SimpleNamespace(
        processing_class=conversation.tokenizer,
        _tokenizer=conversation.tokenizer,
        _is_vlm=False,
        chat_template=conversation.template,
        chat_template_kwargs={},
    )
    equal = []
    for turn in turns(name)[:2]:
        message, written = conversation.written(turn)
        calls = protocol.parse(written, conversation.ids(prompt=True), TOOLS).calls
        for made in calls:
            made.result = "told"
        stock = GRPOTrainer._get_tool_suffix_ids(trainer, protocol.results_turn(calls))
        equal.append(protocol.result_ids(calls, written) == stock)
    family = "gemma4" if name.startswith("gemma4") and name != "gemma4_v2" else name
    assert equal == {"gemma4": [True, False]}.get(family, [family not in DIFFERENT] * 2)


def test_results_are_rendered_alike_after_a_padded_batch():
    conversation = Conversation("qwen3", ("", "I think."))
    render = suffix_renderer(conversation.tokenizer, conversation.template)
    message = [{"role": "tool", "name": "add", "content": "told <|im_end|> of it " * 20}]
    fresh = render(message)
    conversation.tokenizer(["a", "b"], padding="max_length", max_length=500, truncation=True)
    assert render(message) == fresh
    conversation.tokenizer(["a", "b"], max_length=4, truncation=True)
    assert render(message) == fresh


@pytest.mark.parametrize("name", ["glm4moe", "gemma4_v5", "qwen3"])
def test_a_turn_that_ends_with_a_token_of_another_place_is_answered_all_the_same(name):
    """A question begins with `<|user|>`, which may end a turn too: what is cut after it would repeat the question."""
    conversation = Conversation(name, ("", "I think."))
    render = suffix_renderer(conversation.tokenizer, conversation.template)
    message = [{"role": "tool", "name": "add", "content": "told"}]
    for end in sorted(conversation.ends):
        text = conversation.tokenizer.decode(render(message, end))
        assert "told" in text and "dummy" not in text
