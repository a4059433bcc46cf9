"""Arguments that a model wrote, as the tool will see them.

What is not here: a check of their types. A wrong one is left to the call itself, as in TRL, and the model reads the
exception.
"""

import inspect
import json
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


def canonical_json(value: Any) -> str | None:
    """Return `value` as JSON whose objects have their keys in order, so that equal values are equal texts; `None` for
    what JSON cannot hold."""
    try:
        return json.dumps(value, sort_keys=True)
    except (TypeError, ValueError, RecursionError):
        return None
