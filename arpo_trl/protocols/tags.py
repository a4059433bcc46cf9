"""The tags of the ARPO paper."""

import inspect
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..execution.executor import ToolCall
from ..source_code import unindented
from .base import ToolProtocol, Tools, Turn, encode_plain, text_of, writable


class TagsProtocol(ToolProtocol):
    """
    The ARPO paper's way, used by its data and checkpoints: `<tool>…</tool>` calls the tool of that name, generation
    stops at the closing tag, and the result follows as `<result>…</result>` in the same assistant turn. The answer is
    in `<answer>…\\boxed{}…</answer>`; reward functions see the text.

    A tool with one required parameter gets the text between the tags; one with more gets the fields of the JSON object
    between them. A tool that requires nothing may be called with nothing between them, with a JSON object of its
    parameters, or with the text of the first one.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Any tokenizer.
        tool_names (`Sequence[str]`): Names of the tools.
        suffix_ids (`Callable`, *optional*): Not used.
    """

    reserved_names = frozenset({"think", "result", "answer"})

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tool_names: Sequence[str] = (),
        suffix_ids: Callable[..., list[int]] | None = None,
    ):
        super().__init__(tokenizer, tool_names, suffix_ids)
        self.stop_strings = [f"</{name}>" for name in tool_names]
        self._closing = re.compile("|".join(rf"</({re.escape(name)})>" for name in tool_names)) if tool_names else None

    def parse(self, ids: list[int], context: list[int], tools: Tools) -> Turn:
        text, closing = self._read(ids)
        return Turn(ids, [_tagged_call(closing.group(0)[2:-1], text[: closing.start()], tools)] if closing else [])

    def results_turn(self, calls: Sequence[ToolCall], written: Sequence[int] = ()) -> list[list[int]]:
        return [self.result_ids(calls, written)]

    def result_ids(self, calls: Sequence[ToolCall], written: Sequence[int] = ()) -> list[int]:
        pieces: list[Any] = [""]  # texts and images in turns
        for call in calls:
            shown = isinstance(call.result, list) and self.shows_images()
            pieces[-1] += "<result>"
            told: Any = call.result if shown else [{"type": "text", "text": text_of(call.result)}]
            for block in told:
                if block["type"] == "image":
                    pieces += [block["image"], ""]
                else:
                    pieces[-1] += block["text"]
            pieces[-1] += "</result>"
        # The token that ends the call may hold more than the ">": with "><" the model has begun the result's own tag
        text, closing = self._read(written)
        begun = text[closing.end() :] if closing else ""
        if "<result>".startswith(begun):
            pieces[0] = pieces[0][len(begun) :]
        return [token for piece in pieces for token in self._encoded(piece)]

    def shows_images(self) -> bool:
        return self.image_reader is not None

    def _encoded(self, piece: Any) -> list[int]:
        if isinstance(piece, str):
            return encode_plain(self.tokenizer, piece)
        assert self.image_reader is not None
        return self.image_reader.ids(piece)

    def completion(self, turns: list[list[int]], conversational: bool) -> Any:
        text = self.tokenizer.decode([token for ids in turns for token in ids], skip_special_tokens=True)
        return [{"role": "assistant", "content": text}] if conversational else text

    def _read(self, ids: Sequence[int]) -> tuple[str, re.Match | None]:
        # Cleaning up would take spaces out of code
        text = self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text, self._closing.search(text) if self._closing else None


def _tagged_call(name: str, before: str, tools: Tools) -> ToolCall:
    """The call that ends where `before` ends."""
    opening = before.rfind(f"<{name}>")
    if opening < 0:
        return ToolCall(name, error=f"</{name}> closes a tag that was not opened. Write <{name}>…</{name}>.")
    body = unindented(before[opening + len(name) + 2 :])
    if name not in tools:
        return ToolCall(name, {"text": body})
    parameters = inspect.signature(tools[name]).parameters.values()
    named = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    required = [p.name for p in parameters if p.name in named and p.default is p.empty]
    if not body and required:
        return ToolCall(name, error=f"<{name}></{name}> is empty. Write what to call the tool with between the tags.")
    if not body:
        return ToolCall(name)
    if len(required) == 1:
        return ToolCall(name, {required[0]: body})
    arguments, fault = _json_object(body)
    if named and not required and (arguments is None or not set(arguments) <= set(named)):
        return ToolCall(name, {named[0]: body})
    if arguments is not None:
        return ToolCall(name, arguments)
    if not named and len(parameters) == 0:
        return ToolCall(name, error=f"<{name}> takes nothing, got: {body[:80]!r}. Write <{name}></{name}>.")
    fields = f" with {', '.join(required)}" if required else ""
    return ToolCall(name, error=f"<{name}> takes a JSON object{fields}{fault}")


def _json_object(body: str) -> tuple[dict | None, str]:
    """The JSON object in `body`; without one `None`, and the end of a sentence that says why."""
    try:
        value = writable(json.loads(body))
    except (ValueError, RecursionError) as error:
        return None, f": {error}"
    return (value, "") if isinstance(value, dict) else (None, f", got: {body[:80]!r}")
