"""The tokenizer's chat template, and what to tell those whose template knows no tools."""

import copy
import functools
import importlib.resources
import inspect
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import get_json_schema
from transformers.utils.chat_parsing.response_templates import load_response_template
from trl.chat_template_utils import (
    add_response_schema,
    get_training_chat_template,
    is_chat_template_prefix_preserving,
    parse_response,
    supports_tool_calling,
)

from ..execution.executor import ToolCall
from ..plain_data import copied
from .base import ToolProtocol, Tools, Turn, defuse, text_of, writable

# From TRL 1.16 on, a template whose arguments are plain text has them typed by the tools' schemas
_TYPES_ARGUMENTS = "tools" in inspect.signature(parse_response).parameters

# Tokens at the end of a context in which the start of the turn is looked for first; a prompt ends with it, as a rule
_TAIL = 64


class ChatTemplateProtocol(ToolProtocol):
    """
    TRL's way: the chat template renders the tools into the prompt, calls are parsed from the response into
    `tool_calls`, results are `tool` messages; reward functions see structured messages.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer with a response template or schema.
        tool_names (`Sequence[str]`): Not used.
        suffix_ids (`Callable[[list[dict], int], list[int]]`): Renders the tool messages that follow a turn, which
            ended with that token, into tokens (`suffix.py`).
    """

    schema_in_prompt = True
    structured = True

    def parse(self, ids: list[int], context: list[int], tools: Tools) -> Turn:
        if not ids:
            return Turn({}, [])
        try:
            schemas: dict[str, Any] = {"tools": self._schemas(tools)} if _TYPES_ARGUMENTS else {}
            message = writable(parse_response(self._parser, ids, prefix=self.turn_prefix(context), **schemas))
            _cut_end(message, self.tokenizer, ids[-1])
        except Exception:  # deep nesting, say; what is merely malformed TRL makes plain text of itself
            message = {"role": "assistant", "content": self.tokenizer.decode(ids, skip_special_tokens=True)}
        return Turn(message, [_structured_call(call) for call in message.get("tool_calls") or []])

    def shows_images(self) -> bool:
        return self._template_shows_images

    @functools.cached_property
    def _template_shows_images(self) -> bool:
        """Whether the template writes an image of a tool's result; some write its texts alone."""
        if self.image_reader is None or self.suffix_ids is None:
            return False
        content = [{"type": "image", "image": self.image_reader.sample}]
        try:
            ids = self.suffix_ids([{"role": "tool", "name": "dummy", "content": content}])
        except Exception:  # of the template
            return False
        wanted = self.image_reader.types(self.image_reader.ids(self.image_reader.sample))
        return sum(self.image_reader.types(ids)) == sum(wanted)

    def turn_prefix(self, context: list[int]) -> list[int]:
        """
        The end of a context that decides how the turn behind it is parsed: from some tokens before the start of that
        turn on. A response is parsed from what stands behind the last start of a turn, so the rest need not be
        decoded. All of the context where it holds no start.
        """
        if self._turn_starts is None:
            return []
        size = _TAIL
        while size < len(context):
            # The first token may be part of a character, or lose its space, so a start does not count at the beginning
            if self._turn_starts.search(self.tokenizer.decode(context[-size:]), 1):
                return context[-size:]
            size *= 8
        return context

    @functools.cached_property
    def _parser(self) -> PreTrainedTokenizerBase:
        """The tokenizer, as a copy whose response template is compiled once rather than for each turn."""
        template = getattr(self.tokenizer, "response_template", None)
        if template is None:
            return self.tokenizer
        parser = copy.copy(self.tokenizer)
        parser.response_template = load_response_template(template)
        return parser

    @functools.cached_property
    def _turn_starts(self) -> Any:
        """What a turn of the model starts with, as a pattern; `None` with a parser that looks at no prefix."""
        template = getattr(self._parser, "response_template", None)
        return None if template is None else template.start_anchor_re

    def _schemas(self, tools: Tools) -> list[Any]:
        """What the parser types arguments by: the schema of each function, which is made once."""
        for tool in tools.values():
            function = getattr(tool, "__func__", tool)  # copies of an environment share the functions of its methods
            if inspect.isfunction(function) and function not in self._known_schemas:
                self._known_schemas[function] = get_json_schema(tool)
        return [self._known_schemas.get(getattr(tool, "__func__", tool), tool) for tool in tools.values()]

    @functools.cached_property
    def _known_schemas(self) -> dict[Any, dict[str, Any]]:
        return {}

    def results_turn(self, calls: Sequence[ToolCall], written: Sequence[int] = ()) -> list[dict]:
        return [{"role": "tool", "name": call.name, "content": self._content(call.result)} for call in calls]

    def _content(self, result: str | list | None) -> str | list:
        return copied(result) if isinstance(result, list) and self.shows_images() else text_of(result)

    def result_ids(self, calls: Sequence[ToolCall], written: Sequence[int] = ()) -> list[int]:
        assert self.suffix_ids is not None
        messages = self.results_turn(calls)
        for message in messages:
            message["content"] = self._defused(message["content"])
        return self.suffix_ids(messages, written[-1]) if written else self.suffix_ids(messages)

    def _defused(self, content: str | list) -> str | list:
        if isinstance(content, str):
            return defuse(self.tokenizer, content)
        return [
            {**block, "text": defuse(self.tokenizer, block["text"])} if block["type"] == "text" else block
            for block in content
        ]

    def completion(self, turns: list[dict], conversational: bool) -> list[dict]:
        return [copied(turn) for turn in turns if turn]


@functools.lru_cache(maxsize=8)
def _special_tokens(tokenizer: PreTrainedTokenizerBase, size: int) -> dict[int, str]:
    """Asking the tokenizer is slow; its `size` changes when some are added."""
    return {token: added.content for token, added in tokenizer.added_tokens_decoder.items() if added.special}


def _cut_end(message: dict, tokenizer: PreTrainedTokenizerBase, last: int) -> None:
    """
    Take the token that ends the turn out of its text. TRL's parser knows the tokenizer's EOS, and there are others.
    """
    end = _special_tokens(tokenizer, len(tokenizer)).get(last)
    if end is not None and isinstance(message.get("content"), str):
        message["content"] = message["content"].removesuffix(end)


def _structured_call(call: dict) -> ToolCall:
    if call.get("type") != "function" or "function" not in call:
        return ToolCall(str(call.get("name", "unknown")), error=f"Unsupported tool call type: {call.get('type')}")
    # Arguments that are no object are left to the call itself, which answers as TRL's does
    return ToolCall(str(call["function"]["name"]), call["function"]["arguments"])


def check_chat_template(tokenizer: PreTrainedTokenizerBase | ProcessorMixin, fine_tuning: bool = False) -> None:
    """
    Refuse a chat template that cannot tell a model of tools, or that TRL cannot parse or train with.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]): Tokenizer, or
            processor of a multimodal checkpoint, whose template is looked at.
        fine_tuning (`bool`): Whether it is for supervised fine-tuning, which parses nothing, but has to find the
            assistant's tokens in a conversation.

    Raises:
        ValueError: Says which ways on there are.
    """
    fault = _template_fault(tokenizer, fine_tuning)
    if fault is None:
        return
    fitting = _fitting_templates(tokenizer, fine_tuning)
    text, kind = _text_tokenizer(tokenizer), "tokenizer" if tokenizer is _text_tokenizer(tokenizer) else "processor"
    copied = "."
    if fitting:
        copied = (
            f"; or give the {kind} one of TRL's templates that end a turn with {text.eos_token!r} (of "
            f"{', '.join(fitting)} the one that the model knows best) and save it into the checkpoint: "
            f"`{kind}.chat_template = (importlib.resources.files('trl') / 'chat_templates' / '{fitting[0]}.jinja')"
            ".read_text()`."
        )
    raise ValueError(
        f"The chat template of {text.name_or_path or f'the {kind}'!r} {fault}, but "
        f"`tool_protocol='chat_template'` speaks to tools through it. Set `tool_protocol='tags'`{copied}"
    )


def _text_tokenizer(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> PreTrainedTokenizerBase:
    """The tokenizer in a processor, or the tokenizer itself."""
    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class


def tool_chat_template(tokenizer: PreTrainedTokenizerBase | ProcessorMixin) -> str | None:
    """As TRL's trainer does: have `tokenizer` parse tool calls; the template to use in place of its own, if any."""
    check_chat_template(tokenizer)
    if not _has_parser(tokenizer):
        add_response_schema(tokenizer)
    return None if is_chat_template_prefix_preserving(tokenizer) else get_training_chat_template(tokenizer)


def _template_fault(tokenizer: PreTrainedTokenizerBase | ProcessorMixin, fine_tuning: bool) -> str | None:
    """The end of a sentence that begins with "The chat template"."""
    if tokenizer.chat_template is None:
        return "is missing"
    try:
        knows_tools = supports_tool_calling(tokenizer)
    except Exception:  # one written for text alone, say, to which a processor hands blocks
        knows_tools = False
    if not knows_tools:
        return "knows no tools"
    try:
        if not fine_tuning and not _has_parser(tokenizer):
            add_response_schema(_copied(tokenizer))
    except ValueError:
        return "is none whose tool calls TRL can parse"
    try:
        if fine_tuning or not is_chat_template_prefix_preserving(tokenizer):
            get_training_chat_template(tokenizer)
    except ValueError:
        return "is none that TRL can train with"
    return None


def _copied(tokenizer: PreTrainedTokenizerBase | ProcessorMixin) -> Any:
    """A copy that may be given another template and parser."""
    own = copy.copy(tokenizer)
    if isinstance(own, ProcessorMixin):
        own.tokenizer = copy.copy(own.tokenizer)
    return own


def _has_parser(tokenizer: PreTrainedTokenizerBase | ProcessorMixin) -> bool:
    return any(
        getattr(_text_tokenizer(tokenizer), name, None) is not None
        for name in ("response_template", "response_schema")
    )


def _fitting_templates(tokenizer: PreTrainedTokenizerBase | ProcessorMixin, fine_tuning: bool) -> list[str]:
    """Names of TRL's templates that know tools and end a turn as the tokenizer does."""
    eos = _text_tokenizer(tokenizer).eos_token
    if not eos:
        return []
    fitting = []
    for file in sorted((importlib.resources.files("trl") / "chat_templates").iterdir(), key=lambda file: file.name):
        if file.name.endswith(".jinja") and not file.name.endswith("_training.jinja"):
            candidate = _copied(tokenizer)
            candidate.chat_template = file.read_text(encoding="utf-8")
            ends_alike = eos in candidate.chat_template
            if ends_alike and _template_fault(candidate, fine_tuning) is None:
                fitting.append(file.name.removesuffix(".jinja"))
    return fitting
