"""Arguments that a model wrote, as the tool will see them.

What is not here: a check of their types. A wrong one is left to the call itself, as in TRL, and the model reads the
exception.
"""

import inspect
from collections.abc import Callable
from typing import Any


def bound_arguments(function: Callable, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return `arguments` with the defaults filled in, so that equal calls look equal."""
    try:
        bound = inspect.signature(function).bind(**arguments)
    except (TypeError, ValueError):
        return arguments
    bound.apply_defaults()
    return dict(bound.arguments)
