"""
Tool results as tokens, up to where the model goes on: TRL's rendering, from the token on that has ended the
turn.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, ProcessorMixin
from transformers.utils import logging
from trl import GRPOTrainer
from trl.data_utils import prepare_multimodal_messages

logger = logging.get_logger(__name__)

_NO_TOKEN = -1

_ASKED: list[dict[str, Any]] = [{"role": "user", "content": "dummy"}]


def _called(name: str) -> list[dict[str, Any]]:
    call = {"type": "function", "function": {"name": name, "arguments": {}}}
    return [*_ASKED, {"role": "assistant", "content": "", "tool_calls": [call]}]


def _rendered(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    messages: list[dict[str, Any]],
    chat_template: str | None,
    kwargs: Any,
) -> list[int]:
    multimodal = isinstance(processing_class, ProcessorMixin)
    ids: Any = processing_class.apply_chat_template(
        prepare_multimodal_messages(messages) if multimodal else messages,
        tokenize=True,
        chat_template=chat_template,
        return_dict=False,
        **(kwargs or {}),
    )
    return ids[0] if multimodal else ids


def _template_ids(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin, messages: list[dict[str, Any]], **options: Any
) -> Any:
    """
    What `apply_chat_template` answers. A fast tokenizer is asked for the tokens alone, without the place of each in
    the text, which takes three quarters of the time.
    """
    if not isinstance(processing_class, PreTrainedTokenizerFast) or not _encodes_plainly(processing_class):
        return processing_class.apply_chat_template(messages, **options)
    text = processing_class.apply_chat_template(messages, **{**options, "tokenize": False})
    return processing_class.backend_tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids


def _encodes_plainly(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether a text's tokens are its own: nothing that was set for an earlier one cuts, pads or splits them."""
    backend = tokenizer.backend_tokenizer
    splits = tokenizer.split_special_tokens or backend.encode_special_tokens
    return backend.truncation is None and backend.padding is None and not splits


def suffix_renderer(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    chat_template: str | None = None,
    chat_template_kwargs: Any = None,
) -> Callable[..., list[int]]:
    """
    What renders tool messages into tokens by the chat template.

    TRL renders a dummy conversation and cuts it after the tokenizer's EOS token, since a template goes on with more
    than that, such as a line break. Some templates end a turn that holds calls with another token (`<turn|>`,
    `<|observation|>`), and that one is what the model has written last. So the cut is there. Gemma 4's template names
    a result without an id after the turn's last call, so each gets an id, which keeps its own name.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]): Renders.
        chat_template (`str`, *optional*): In place of its own template.
        chat_template_kwargs (`dict`, *optional*): Passed to the template.

    Returns:
        `Callable[[list[dict], int | None], list[int]]`: takes the tool messages of one turn and the last token of the
        turn, and returns what follows.
    """
    multimodal = isinstance(processing_class, ProcessorMixin)
    eos = (processing_class.tokenizer if multimodal else processing_class).eos_token_id
    kwargs = chat_template_kwargs or {}
    # What is meant for the template may be an option of the method that renders, which then acts upon it
    options = inspect.signature(processing_class.apply_chat_template).parameters.keys() & kwargs.keys()
    apply = processing_class.apply_chat_template if options else partial(_template_ids, processing_class)

    @functools.cache
    def in_turn(token: int, name: str) -> bool:
        """Whether the template renders the token into a turn that calls the tool of that name."""
        asked, called = (
            _rendered(processing_class, messages, chat_template, kwargs) for messages in (_ASKED, _called(name))
        )
        return called.count(token) > asked.count(token)

    calls_of: dict[str, Any] = {}  # by the tool's name: what TRL renders before the results, each time anew

    def render(messages: list[dict[str, Any]], **options: Any) -> Any:
        if messages[-1]["role"] == "tool":
            return apply(messages, **options)
        name = messages[-1]["tool_calls"][0]["function"]["name"]
        if name not in calls_of:
            calls_of[name] = apply(messages, **options)
        return calls_of[name]

    def suffix_ids(messages: Sequence[dict[str, Any]], last: int | None = None) -> list[int]:
        name = messages[0]["name"]
        cut = next((token for token in (last, eos) if token is not None and in_turn(token, name)), _NO_TOKEN)
        renderer: Any = SimpleNamespace(
            processing_class=SimpleNamespace(apply_chat_template=render),
            _tokenizer=SimpleNamespace(eos_token_id=cut),
            _is_vlm=multimodal,
            chat_template=chat_template,
            chat_template_kwargs=kwargs,
        )
        told = [{**message, "tool_call_id": str(index)} for index, message in enumerate(messages)]
        ids = GRPOTrainer._get_tool_suffix_ids(renderer, told)
        return ids[1:] if ids[:1] == [last] else ids  # the results begin with the token that the model ended with

    return suffix_ids


def warn_of_endless_calls(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    chat_template: str | None,
    chat_template_kwargs: Any,
    ends: Sequence[int],
) -> None:
    """
    Warn where no end token of the model stands between a call and its result, as the template writes them: a model
    that has learnt the template then writes the result itself.

    Args:
        processing_class, chat_template, chat_template_kwargs: As for [`suffix_renderer`].
        ends (`Sequence[int]`): Tokens at which generation stops.
    """
    asked = _rendered(processing_class, _ASKED, chat_template, chat_template_kwargs)
    results = [[*_called("dummy"), {"role": "tool", "name": "dummy", "content": content}] for content in ("a", "b")]
    told = [_rendered(processing_class, messages, chat_template, chat_template_kwargs) for messages in results]
    start, stop = _shared(asked, told[0]), _shared(*told)
    if not set(ends) & set(told[0][start:stop]):
        tokenizer = processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class
        logger.warning(
            f"Generation stops at {tokenizer.convert_ids_to_tokens(sorted(set(ends)))}, but the chat template goes on "
            f"from a call to its result with none of these ({tokenizer.decode(told[0][start:stop])!r}), so a model "
            "may write the result itself. Add the token that ends a turn with calls to "
            "`model.generation_config.eos_token_id`."
        )


def _shared(left: list[int], right: list[int]) -> int:
    """Tokens with which both begin."""
    return next((place for place, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]), len(left))
