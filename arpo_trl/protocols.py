"""How a model writes a tool call and how it reads the result.

A protocol turns sampled tokens into calls, results into tokens, and a finished trajectory into what reward functions
see. There are two: the tokenizer's chat template, and the tags of the ARPO paper. A third is a class with the same four
members.

What is not here: images in tool results; see [`ARPOTrainer`].
"""

import functools
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import parse_response

from .rollout.tree import copied
from .tools.executor import ToolCall
from .tools.function_worker import whole_text

Tools = Mapping[str, Callable]

# From TRL 1.16 on, a template whose arguments are plain text has them typed by the tools' schemas
_TYPES_ARGUMENTS = "tools" in inspect.signature(parse_response).parameters


@dataclass
class Turn:
    """What a model wrote in one segment: `message`, to rebuild the conversation, and the `calls` in it."""

    message: Any
    calls: list[ToolCall]


class ToolProtocol(Protocol):
    """
    One way of speaking to tools.

    Attributes:
        schema_in_prompt (`bool`): Whether the chat template renders the tools into the prompt.
        stop_strings (`list[str]`): Text at which generation stops, besides the end of the turn.
    """

    schema_in_prompt: bool
    stop_strings: list[str]

    def parse(self, ids: list[int], context: list[int], tools: Tools) -> Turn:
        """Read the tokens `ids` that were sampled after `context`. Never raises: bad calls come back with an error."""

    def result_ids(self, calls: Sequence[ToolCall]) -> list[int]:
        """Tokens of the results of one turn's calls, up to where the model goes on."""

    def results_turn(self, calls: Sequence[ToolCall]) -> list[Any]:
        """What `turns` keeps of the results."""

    def completion(self, turns: list[Any], conversational: bool) -> Any:
        """What reward functions see, from the trajectory's turns."""


def encode_plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """
    Tokens of `text` in which nothing is a special token: a web page that holds `<|im_end|>` cannot end a turn.

    Every added token that occurs in the text is cut after its first character, so that no part matches it. (Fast
    tokenizers' own switch, `split_special_tokens`, leaves added tokens such as `<tool_call>` whole.)
    """
    pieces = defuse(tokenizer, text, "\0").split("\0") if "\0" not in text else list(text)
    return [token for piece in pieces for token in tokenizer.encode(piece, add_special_tokens=False)]


def defuse(tokenizer: PreTrainedTokenizerBase, text: str, separator: str = "\u200b") -> str:
    """`text` with `separator` (a zero-width space) after the first character of every special or added token in it."""
    for token in _added_tokens(tokenizer, len(tokenizer)):
        if token in text:
            text = text.replace(token, token[0] + separator + token[1:])
    return text


@functools.lru_cache(maxsize=8)
def _added_tokens(tokenizer: PreTrainedTokenizerBase, size: int) -> list[str]:
    """Special and added tokens, longest first. Asking the tokenizer is slow; its `size` changes when some are added."""
    return sorted((token for token in tokenizer.get_added_vocab() if len(token) > 1), key=len, reverse=True)


def _tame(value: Any, levels: int = 100) -> Any:
    """
    JSON that a model wrote, fit for tokenizers, files and other processes: lone surrogates, which are no text, are
    replaced, and nesting that would exhaust the stack of whoever copies it raises a `ValueError`.
    """
    if levels == 0:
        raise ValueError("nested too deep")
    if isinstance(value, str):
        return whole_text(value)
    if isinstance(value, list):
        return [_tame(item, levels - 1) for item in value]
    if isinstance(value, dict):
        return {_tame(key, levels - 1): _tame(item, levels - 1) for key, item in value.items()}
    return value


class ChatTemplateProtocol:
    """
    TRL's way: the chat template renders the tools into the prompt, calls are parsed from the response into
    `tool_calls`, results are `tool` messages; reward functions see structured messages.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer with a response template or schema.
        suffix_ids (`Callable[[list[dict]], list[int]]`): TRL's rendering of tool messages into tokens,
            `GRPOTrainer._get_tool_suffix_ids`.
    """

    schema_in_prompt = True
    stop_strings: list[str] = []

    def __init__(self, tokenizer: PreTrainedTokenizerBase, suffix_ids: Callable[[list[dict]], list[int]]):
        self.tokenizer = tokenizer
        self.suffix_ids = suffix_ids

    def parse(self, ids: list[int], context: list[int], tools: Tools) -> Turn:
        if not ids:
            return Turn({}, [])
        schemas: dict[str, Any] = {"tools": list(tools.values())} if _TYPES_ARGUMENTS else {}
        try:
            message = _tame(parse_response(self.tokenizer, ids, prefix=context, **schemas))
        except Exception:  # deep nesting, say; what is merely malformed TRL makes plain text of itself
            message = {"role": "assistant", "content": self.tokenizer.decode(ids, skip_special_tokens=True)}
        return Turn(message, [_structured_call(call) for call in message.get("tool_calls") or []])

    def results_turn(self, calls: Sequence[ToolCall]) -> list[dict]:
        return [{"role": "tool", "name": call.name, "content": call.result} for call in calls]

    def result_ids(self, calls: Sequence[ToolCall]) -> list[int]:
        messages = self.results_turn(calls)
        for message in messages:
            if isinstance(message["content"], str):
                message["content"] = defuse(self.tokenizer, message["content"])
        return self.suffix_ids(messages)

    def completion(self, turns: list[dict], conversational: bool) -> list[dict]:
        return [copied(turn) for turn in turns if turn]


def _structured_call(call: dict) -> ToolCall:
    if call.get("type") != "function" or "function" not in call:
        return ToolCall(str(call.get("name", "unknown")), error=f"Unsupported tool call type: {call.get('type')}")
    # Arguments that are no object are left to the call itself, which answers as TRL's does
    return ToolCall(str(call["function"]["name"]), call["function"]["arguments"])


class TagsProtocol:
    """
    The ARPO paper's way, used by its data and checkpoints: `<tool>…</tool>` calls the tool of that name, generation
    stops at the closing tag, and the result follows as `<result>…</result>` in the same assistant turn. The answer is in
    `<answer>…\\boxed{}…</answer>`; reward functions see the text.

    A tool with one required parameter gets the text between the tags; one with more gets the fields of the JSON object
    between them.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Any tokenizer.
        names (`Sequence[str]`): Names of the tools.
    """

    schema_in_prompt = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase, names: Sequence[str]):
        self.tokenizer = tokenizer
        self.stop_strings = [f"</{name}>" for name in names]
        self._closing = re.compile("|".join(rf"</({re.escape(name)})>" for name in names)) if names else None

    def parse(self, ids: list[int], context: list[int], tools: Tools) -> Turn:
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        closing = self._closing.search(text) if self._closing else None
        return Turn(ids, [_tagged_call(closing.group(0)[2:-1], text[: closing.start()], tools)] if closing else [])

    def results_turn(self, calls: Sequence[ToolCall]) -> list[list[int]]:
        return [self.result_ids(calls)]

    def result_ids(self, calls: Sequence[ToolCall]) -> list[int]:
        return encode_plain(self.tokenizer, "".join(f"<result>{call.result}</result>" for call in calls))

    def completion(self, turns: list[list[int]], conversational: bool) -> Any:
        text = self.tokenizer.decode([token for ids in turns for token in ids], skip_special_tokens=True)
        return [{"role": "assistant", "content": text}] if conversational else text


def _tagged_call(name: str, before: str, tools: Tools) -> ToolCall:
    """The call that ends where `before` ends."""
    opening = before.rfind(f"<{name}>")
    if opening < 0:
        return ToolCall(name, error=f"</{name}> closes a tag that was not opened. Write <{name}>…</{name}>.")
    body = before[opening + len(name) + 2 :].strip()
    if not body:
        return ToolCall(name, error=f"<{name}></{name}> is empty. Write what to call the tool with between the tags.")
    if name not in tools:
        return ToolCall(name, {"text": body})
    parameters = inspect.signature(tools[name]).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    required = [p.name for p in named if p.default is p.empty] or [p.name for p in named[:1]]
    if len(required) == 1:
        return ToolCall(name, {required[0]: body})
    try:
        arguments = _tame(json.loads(body))
    except (ValueError, RecursionError) as error:
        return ToolCall(name, error=f"<{name}> takes a JSON object with {', '.join(required)}: {error}")
    if not isinstance(arguments, dict):
        return ToolCall(name, error=f"<{name}> takes a JSON object with {', '.join(required)}, got: {body[:80]!r}")
    return ToolCall(name, arguments)
