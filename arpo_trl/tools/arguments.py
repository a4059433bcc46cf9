"""Arguments that a model wrote, held against the type hints of the tool."""

import inspect
import types
import typing
from collections.abc import Callable
from typing import Any


def check_arguments(function: Callable, arguments: dict[str, Any]) -> None:
    """Check the types that JSON knows; other hints are the tool's own business.

    Missing and unknown arguments are left to the call itself, whose message names them.

    Raises:
        `TypeError`: If an argument is of another type than its hint.
    """
    tool = getattr(function, "__name__", "tool")
    if not isinstance(arguments, dict):
        raise TypeError(f"{tool}() takes its arguments by name, as a JSON object, not as {type(arguments).__name__}")
    try:
        parameters, hints = inspect.signature(function).parameters, typing.get_type_hints(function)
    except (TypeError, ValueError, NameError):
        return  # no hints to be had, as for callables written in C
    for name, value in arguments.items():
        if name not in hints or name not in parameters or _matches(value, hints[name]):
            continue
        default = parameters[name].default
        if default is not inspect.Parameter.empty and value == default:
            continue  # `k: int = None` called with null
        hint = inspect.formatannotation(hints[name])
        raise TypeError(f"{tool}() argument '{name}' must be {hint}, not {type(value).__name__} ({_short(value)})")


def bound_arguments(function: Callable, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return `arguments` with the defaults filled in, so that equal calls look equal."""
    try:
        bound = inspect.signature(function).bind(**arguments)
    except (TypeError, ValueError):
        return arguments
    bound.apply_defaults()
    return dict(bound.arguments)


def _matches(value: Any, hint: Any) -> bool:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, part) for part in parts)
    if origin is typing.Annotated:
        return _matches(value, parts[0])
    if origin is typing.Literal:
        return value in parts
    if hint is None or hint is type(None):
        return value is None
    if hint is str:
        return isinstance(value, str)
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:  # JSON does not tell 3.0 from 3
        return not isinstance(value, bool) and (isinstance(value, int) or isinstance(value, float) and value % 1 == 0)
    if hint is float:
        return not isinstance(value, bool) and isinstance(value, int | float)
    if list in (hint, origin):
        return isinstance(value, list) and all(_matches(item, part) for part in parts[:1] for item in value)
    if dict in (hint, origin):
        return isinstance(value, dict) and all(_matches(item, part) for part in parts[1:] for item in value.values())
    return True


def _short(value: Any, length: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= length else text[: length - 1] + "…"
