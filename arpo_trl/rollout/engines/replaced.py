"""A method of somebody else's object, replaced for a while."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def generate_with(model: Any, generate: Callable) -> Iterator[None]:
    """
    Within the context, `model.generate` is `generate`; a model is also vLLM's, or TRL's client of a server. Afterwards
    what stood there stands there again, also where a library had put it on the instance.
    """
    before = vars(model).get("generate")
    model.generate = generate
    try:
        yield
    finally:
        if before is None:
            del model.generate  # the class's method shows again
        else:
            model.generate = before
