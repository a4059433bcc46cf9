"""Names of tools. A model calls a tool by its name, so a name must stand for one tool."""

from collections.abc import Callable, Iterable


def distinct_tools(tools: Iterable[Callable], source: str = "`tools`") -> list[Callable]:
    """
    Each tool once, in their order.

    Args:
        tools (`Iterable[Callable]`): Tools, of which one may be given twice.
        source (`str`): What the error calls them.

    Raises:
        TypeError: A tool has no name, as a partial has none.
        ValueError: Two different tools have the same name.
    """
    distinct: dict[str, Callable] = {}
    for tool in tools:
        name = getattr(tool, "__name__", None)
        if not isinstance(name, str):
            raise TypeError(
                f"{source} holds {tool!r}, which has no name by which a model could call it. Call it in a function of "
                "its own, with type hints and a docstring."
            )
        if distinct.setdefault(name, tool) != tool:
            raise ValueError(
                f"{source} holds two tools named {name!r}, and a model that calls {name!r} can mean only one. Give "
                "one of them another name, for instance with a function of its own that calls it."
            )
    return list(distinct.values())
