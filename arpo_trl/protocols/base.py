"""
What a tool protocol is, and text as tokens: in the middle of a row, and with nothing in it that is a special
token.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..execution.executor import ToolCall
from ..execution.function_worker import whole_text
from ..execution.images import images_of
from .images import ImageReader

logger = logging.get_logger(__name__)

Tools = Mapping[str, Callable]

NO_IMAGE = str({"error": "The tool returned an image, and you read text only."})


@dataclass
class Turn:
    """What a model wrote in one segment: `message`, to rebuild the conversation, and the `calls` in it."""

    message: Any
    calls: list[ToolCall]


class ToolProtocol(ABC):
    """
    One way of speaking to tools.

    Every protocol is constructed with the same three arguments, and needs to keep only those that it uses.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's tokenizer.
        tool_names (`Sequence[str]`): Names of the tools.
        suffix_ids (`Callable[..., list[int]]`, *optional*): Renders tool messages into tokens by the chat template, as
            TRL does (`suffix.py`); takes them and, optionally, the last token of the turn that they follow.

    Class attributes:
        schema_in_prompt (`bool`): Whether the chat template renders the tools into the prompt.
        structured (`bool`): Whether calls and results are messages of the chat template. If so, a template that knows
            no tools is refused, TRL finds out how to parse it, and `environment_factory` is allowed.
        reserved_names (`frozenset[str]`): Names that no tool may have.
        stop_strings (`list[str]`): Text at which generation stops, besides the end of the turn. May be set for each
            object.
        image_reader ([`ImageReader`], *optional*): How the model reads images; `None` where it reads text alone. Set
            for each object, of a multimodal checkpoint.
    """

    schema_in_prompt: bool = False
    structured: bool = False
    reserved_names: frozenset[str] = frozenset()
    stop_strings: list[str] = []
    image_reader: ImageReader | None = None

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tool_names: Sequence[str] = (),
        suffix_ids: Callable[..., list[int]] | None = None,
    ):
        self.tokenizer = tokenizer
        self.tool_names = list(tool_names)
        self.suffix_ids = suffix_ids

    @abstractmethod
    def parse(self, ids: list[int], context: list[int], tools: Tools) -> Turn:
        """Read the tokens `ids` that were sampled after `context`. Never raises: bad calls come back with an error."""

    @abstractmethod
    def result_ids(self, calls: Sequence[ToolCall], written: Sequence[int] = ()) -> list[int]:
        """
        Tokens of the results of one turn's calls, up to where the model goes on. `written`: the turn's own tokens.
        """

    @abstractmethod
    def results_turn(self, calls: Sequence[ToolCall], written: Sequence[int] = ()) -> list[Any]:
        """What `turns` keeps of the results."""

    def shows_images(self) -> bool:
        """Whether the model sees the images that tools return; if not, it reads an error in the place of each."""
        return False

    def images(self, calls: Sequence[ToolCall]) -> list[Any]:
        """The images that [`result_ids`] writes, in order."""
        return [image for call in calls for image in images_of(call.result)] if self.shows_images() else []

    @abstractmethod
    def completion(self, turns: list[Any], conversational: bool) -> Any:
        """What reward functions see, from the trajectory's turns."""


def text_of(result: str | list | None) -> str:
    """What a model that reads only text is told of a tool's result; content blocks are told one a line."""
    if not isinstance(result, list):
        return "" if result is None else result
    if images_of(result):
        logger.warning_once(
            "A tool returned an image, which this model cannot be shown: it reads an error in its place. Images are "
            "for multimodal checkpoints with their processor, and an engine that takes them (docs/models.md)."
        )
    kinds = [block.get("type") if isinstance(block, dict) else None for block in result]
    return whole_text(
        "\n".join(
            str(block.get("text", block)) if kind == "text" else NO_IMAGE if kind == "image" else str(block)
            for block, kind in zip(result, kinds, strict=True)
        )
    )


def encode_onward(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """
    Tokens of `text` in the middle of a row.

    Tokenizers after SentencePiece's manner (Llama 2, Mistral) put a space before whatever they encode. Here the text
    is encoded behind an anchor, whose tokens come off again, so that it begins as it is written.
    """
    for anchor, ids in _anchors(tokenizer, len(tokenizer)) if text else ():
        together = tokenizer.encode(anchor + text, add_special_tokens=False)
        if together[: len(ids)] == ids:  # else the anchor has merged with the text
            return together[len(ids) :]
    return tokenizer.encode(text, add_special_tokens=False)


@functools.lru_cache(maxsize=8)
def _anchors(tokenizer: PreTrainedTokenizerBase, size: int) -> list[tuple[str, list[int]]]:
    """Texts and their tokens, to encode others behind; none for a tokenizer that puts no space before a text."""
    anchors = [(anchor, tokenizer.encode(anchor, add_special_tokens=False)) for anchor in ("\n", ":", "=", "0", "z")]
    alone = tokenizer.encode("a", add_special_tokens=False)
    if any(tokenizer.encode(anchor + "a", add_special_tokens=False) == ids + alone for anchor, ids in anchors):
        return []
    return [(anchor, ids) for anchor, ids in anchors if ids]


def encode_plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """
    Tokens of `text`, in the middle of a row, in which nothing is a special token: a web page that holds `<|im_end|>`
    cannot end a turn.

    Every added token that occurs in the text is cut after its first character, so that no part matches it. (Fast
    tokenizers' own switch, `split_special_tokens`, leaves added tokens such as `<tool_call>` whole.)
    """
    pieces = defuse(tokenizer, text, "\0").split("\0") if "\0" not in text else list(text)
    return [token for piece in pieces for token in encode_onward(tokenizer, piece)]


def defuse(tokenizer: PreTrainedTokenizerBase, text: str, separator: str = "\u200b") -> str:
    """`text` with `separator` (a zero-width space) after the first character of every special or added token in it."""
    for token in _added_tokens(tokenizer, len(tokenizer)):
        if token in text:
            text = text.replace(token, token[0] + separator + token[1:])
    return text


@functools.lru_cache(maxsize=8)
def _added_tokens(tokenizer: PreTrainedTokenizerBase, size: int) -> list[str]:
    """
    Special and added tokens, longest first. Asking the tokenizer is slow; its `size` changes when some are added.
    """
    return sorted((token for token in tokenizer.get_added_vocab() if len(token) > 1), key=len, reverse=True)


def writable(value: Any, levels: int = 100) -> Any:
    """
    JSON that a model wrote, fit for tokenizers, files and other processes: lone surrogates, which are no text, are
    replaced, and nesting that would exhaust the stack of whoever copies it raises a `ValueError`.
    """
    if levels == 0:
        raise ValueError("nested too deep")
    if isinstance(value, str):
        return whole_text(value)
    if isinstance(value, list):
        return [writable(item, levels - 1) for item in value]
    if isinstance(value, dict):
        return {writable(key, levels - 1): writable(item, levels - 1) for key, item in value.items()}
    return value
