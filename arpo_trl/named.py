"""What a setting names: an entry of one of our tables, or `"my_module:MyClass"`, something of the user's own."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any


def named(name: Any, table: Mapping[str, Any], setting: str, otherwise: str) -> Any:
    """
    Look the value of a setting up.

    Args:
        name (`Any`): A key of `table`, or `"module:attribute"`.
        table (`Mapping[str, Any]`): What this package offers, by name.
        setting (`str`): Name of the argument, for errors.
        otherwise (`str`): What else it may be, for errors: `"a class of your own as 'my_module:MyRule'"`.

    Raises:
        ValueError: `name` is neither, or cannot be imported.
    """
    if isinstance(name, str) and name in table:
        return table[name]
    module, _, attribute = str(name).partition(":")
    if not module or not attribute:
        raise ValueError(
            f"`{setting}` is {name!r}; set it to one of {', '.join(map(repr, table))}, or to {otherwise}."
        )
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise ValueError(
            f"`{setting}` is {name!r}, which cannot be imported ({type(error).__name__}: {error}). Put the folder of "
            f"the module on PYTHONPATH, and name {otherwise}."
        ) from error


def takes(function: Callable, count: int) -> bool:
    """Whether a function can be called with `count` positional arguments; one that tells no signature is believed."""
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:
        return True
    return True
