"""Which protocol a checkpoint speaks: a key in its tokenizer's configuration, written by training and read by all."""

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

logger = logging.get_logger(__name__)

_KEY = "tool_protocol"


def checkpoint_protocol(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The protocol that the checkpoint was trained to speak; `None` for one that does not say."""
    return tokenizer.init_kwargs.get(_KEY)


def mark_checkpoint(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Have `tokenizer` say, from when it is saved, that its model speaks the protocol `name`."""
    tokenizer.init_kwargs[_KEY] = name


def warn_of_another_protocol(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Warn where `name` is not the protocol that the checkpoint speaks."""
    spoken = checkpoint_protocol(tokenizer)
    if spoken not in (None, name):
        logger.warning(
            f"`tool_protocol` is {name!r}, but the checkpoint was trained to speak {spoken!r}. Set "
            f"`tool_protocol={spoken!r}`, unless it shall learn another one."
        )
