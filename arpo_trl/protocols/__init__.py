"""How a model writes a tool call and how it reads the result.

A protocol turns sampled tokens into calls, results into tokens, and a finished trajectory into what reward functions
see. There are two: the tokenizer's chat template (`chat_template.py`), and the tags of the ARPO paper (`tags.py`). A
third is a subclass of [`ToolProtocol`] (`base.py`), which `tool_protocol="my_module:MyProtocol"` names. How a
multimodal checkpoint reads images is in `images.py`.
"""

import inspect

from ..named import named
from .base import ToolProtocol, Tools, Turn, defuse, encode_onward, encode_plain
from .chat_template import ChatTemplateProtocol, check_chat_template, tool_chat_template
from .checkpoint import checkpoint_protocol, mark_checkpoint, warn_of_another_protocol
from .tags import TagsProtocol

__all__ = [
    "TOOL_PROTOCOLS",
    "ChatTemplateProtocol",
    "TagsProtocol",
    "ToolProtocol",
    "Tools",
    "Turn",
    "check_chat_template",
    "checkpoint_protocol",
    "defuse",
    "encode_onward",
    "encode_plain",
    "mark_checkpoint",
    "protocol_class",
    "tool_chat_template",
    "warn_of_another_protocol",
]

TOOL_PROTOCOLS: dict[str, type[ToolProtocol]] = {"chat_template": ChatTemplateProtocol, "tags": TagsProtocol}
"""The values of `tool_protocol`, and the class that each stands for."""


def protocol_class(name: str) -> type[ToolProtocol]:
    """
    The class that `tool_protocol` names.

    Args:
        name (`str`): A key of [`TOOL_PROTOCOLS`], or a class of your own as `"my_module:MyProtocol"`.

    Raises:
        ValueError: There is no such protocol, or the class is none.
    """
    found = named(name, TOOL_PROTOCOLS, "tool_protocol", "a class of your own as 'my_module:MyProtocol'")
    if not isinstance(found, type) or not issubclass(found, ToolProtocol):
        raise ValueError(
            f"`tool_protocol` is {name!r}, which is no tool protocol: make it a subclass of "
            "`arpo_trl.protocols.ToolProtocol`."
        )
    if inspect.isabstract(found):
        raise ValueError(
            f"`tool_protocol` is {name!r}, which lacks {', '.join(sorted(found.__abstractmethods__))}: a protocol has "
            "all methods of `arpo_trl.protocols.ToolProtocol`."
        )
    return found
