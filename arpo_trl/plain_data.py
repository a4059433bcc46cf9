"""Copies of plain data: what is given to a user's function must not change what others read."""

from typing import Any


def copied(value: Any) -> Any:
    """`value` with all its lists and dicts copied; what else is in it (text, images, environments) stays the same."""
    if type(value) is list:
        return [copied(item) if isinstance(item, list | dict) else item for item in value]
    if type(value) is dict:
        return {key: copied(item) for key, item in value.items()}
    return value
