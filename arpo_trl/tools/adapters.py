"""Tools from elsewhere as plain functions: those of an MCP server, and smolagents tools.

The functions have the name, docstring, signature and type hints that a chat template's JSON schema is made from, so
they go wherever a Python function goes: into `ARPOTrainer(tools=...)`, TRL's `GRPOTrainer(tools=...)` or [`tool`].

What is lost on the way: a schema says more than type hints can. Patterns, ranges and the types inside nested objects
are not shown to the model; the server still checks them and answers with an error. MCP resources, prompts, sampling
and elicitation are not offered. Audio is named, not passed on.
"""

import asyncio
import base64
import contextlib
import functools
import inspect
import io
import json
import keyword
import logging
import operator
import re
import shlex
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal

from ..execution.attempts import LoopThread
from ..execution.options import is_async

logger = logging.getLogger(__name__)

_CONNECTION_CLOSED = -32000  # of the protocol
# Exceptions of the streams that a session writes to, once the server has gone
_CLOSED = ("BrokenResourceError", "ClosedResourceError", "EndOfStream")

_TYPES = {
    "string": str,
    "integer": int,
    "number": float,
    "boolean": bool,
    "array": list,
    "object": dict,
    "null": type(None),
}


@contextlib.contextmanager
def mcp_tools(server: Any, timeout: float = 30.0) -> Iterator[list[Callable]]:
    """Connect to an MCP server and hand out its tools as coroutine functions, until the `with` block ends.

    Needs the package `mcp`. Calls of all rows share one connection and run at the same time. An error that the server
    reports is raised as a `RuntimeError`, a lost connection as a `ConnectionError`. The next call then connects anew,
    where `server` is a command or a function; `tool(..., retries=1)` makes that call by itself.

    Args:
        server (`mcp.StdioServerParameters` or transport):
            The command that starts a server on stdio, what a client of `mcp` returns, such as
            `streamable_http_client(url)`, or a function without arguments that returns the latter.
        timeout (`float`, defaults to `30.0`):
            Seconds that connecting may take. Calls take their time-out from [`tool`] or the executor.

    Returns:
        `list[Callable]`: The tools. Text answers are text; an answer with images is a list of content blocks.

    Example:

    ```python
    from mcp import StdioServerParameters

    from arpo_trl.tools.adapters import mcp_tools

    with mcp_tools(StdioServerParameters(command="uvx", args=["mcp-server-time"])) as tools:
        trainer = ARPOTrainer(..., tools=tools)
        trainer.train()
    ```
    """
    try:
        import mcp  # noqa: F401
    except ImportError as e:
        raise ImportError("`mcp_tools` needs the package mcp: pip install 'arpo-trl[mcp]'") from e

    connection = _MCPConnection(server, timeout)
    try:
        asyncio.run_coroutine_threadsafe(connection.session(), connection.host.loop).result()
        functions: dict[str, Callable] = {}
        for entry in connection.entries:
            name = entry["name"]
            if name in functions:
                logger.warning("The MCP server offers tool %s twice; the second one is left out.", name)
                continue
            try:
                functions[name] = _mcp_function(entry, connection)
            except Exception as e:  # one odd schema must not take the other tools away
                logger.warning("MCP tool %s is left out, since its schema cannot be read: %r", name, e)
        yield list(functions.values())
    finally:
        with contextlib.suppress(Exception):
            asyncio.run_coroutine_threadsafe(connection.leave(), connection.host.loop).result(timeout=10)
        connection.host.retire(cancel=True)
        connection.host.join(5)


class _MCPConnection:
    """The connection that all calls share, made anew after it was lost. Its coroutines run on the loop of `host`."""

    def __init__(self, server: Any, timeout: float):
        from mcp import StdioServerParameters, stdio_client

        self.host = LoopThread("arpo-mcp")
        self.entries: list[dict[str, Any]] = []
        self._timeout = timeout
        self._reopens = True
        if isinstance(server, StdioServerParameters):
            # Its environment may hold secrets
            self._open, self._where = lambda: stdio_client(server), shlex.join([server.command, *server.args])
        elif callable(server) and not hasattr(server, "__aenter__"):
            self._open, self._where = server, getattr(server, "__name__", type(server).__name__)
        else:  # can be entered once
            self._open, self._where, self._reopens = lambda: server, type(server).__name__, False
        self._lost = False
        self._ended = asyncio.Event()
        self._connecting: asyncio.Task | None = None
        self._holding: asyncio.Task | None = None

    async def call(self, name: str, arguments: dict[str, Any]) -> Any:
        session = await self.session()
        connecting = self._connecting
        try:
            return await session.call_tool(name, arguments)
        except Exception as e:
            # Told apart, since only a lost connection may be worth another try
            code = getattr(getattr(e, "error", None), "code", None)
            if code != _CONNECTION_CLOSED and type(e).__name__ not in _CLOSED:
                raise RuntimeError(f"MCP tool {name}: {_cause(e)}") from e
            if connecting is self._connecting:
                self._lost = True
            raise ConnectionError(f"MCP tool {name}: {_cause(e)}") from e

    async def session(self) -> Any:
        """Return the session that is open; calls that come while it is opened wait for the same one."""
        connecting = self._connecting
        failed = connecting is not None and connecting.done() and (self._lost or connecting.exception() is not None)
        if connecting is None or failed and self._reopens:
            self._lost = False
            connecting = self._connecting = asyncio.ensure_future(self._connect())
        return await asyncio.shield(connecting)

    async def leave(self) -> None:
        self._ended.set()
        if self._holding is not None:
            await asyncio.wait({self._holding}, timeout=8)

    async def _connect(self) -> Any:
        await self.leave()
        self._ended = asyncio.Event()
        connected: asyncio.Future = asyncio.get_running_loop().create_future()
        self._holding = asyncio.ensure_future(self._hold(connected, self._ended))
        return await connected

    async def _hold(self, connected: asyncio.Future, ended: asyncio.Event) -> None:
        """Enter the connection, keep it, and leave it: all of it must be done by one task."""
        from mcp import ClientSession

        try:
            async with asyncio.timeout(self._timeout) as clock:
                async with self._open() as (read, write, *_), ClientSession(read, write) as session:
                    await session.initialize()
                    self.entries = await _list_tools(session)
                    clock.reschedule(None)
                    connected.set_result(session)
                    await ended.wait()
        except BaseException as e:
            if not connected.done():
                cause = f"no answer within {self._timeout:g} s" if isinstance(e, TimeoutError) else _cause(e)
                connected.set_exception(ConnectionError(f"No connection to the MCP server ({self._where}): {cause}"))
            elif not isinstance(e, Exception | BaseExceptionGroup):
                raise
            # A server that fell over has been told by the calls; here only its end matters


async def _list_tools(session: Any) -> list[dict[str, Any]]:
    from mcp.types import PaginatedRequestParams

    entries, cursor = [], None
    while True:
        page = await session.list_tools(params=PaginatedRequestParams(cursor=cursor) if cursor else None)
        # The names of the protocol itself are the same in every version of the package
        entries += [entry.model_dump(by_alias=True) for entry in page.tools]
        cursor = page.model_dump(by_alias=True).get("nextCursor")
        if not cursor:
            return entries


def _mcp_function(entry: dict[str, Any], connection: _MCPConnection) -> Callable:
    name = entry["name"]

    async def call(arguments: dict[str, Any]) -> str | list:
        coroutine = connection.call(name, arguments)
        try:
            # The caller's loop is the executor's or TRL's; cancelling there cancels the request
            result = await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, connection.host.loop))
        except Exception as e:
            coroutine.close()
            if connection.host.loop.is_closed():
                raise ConnectionError(f"MCP tool {name}: {_cause(e)}") from e
            raise
        answer = result.model_dump(by_alias=True)
        content = _mcp_content(answer)
        if answer.get("isError"):
            raise RuntimeError(content if isinstance(content, str) else f"MCP tool {name} failed.")
        return content

    return _as_function(name, entry.get("description") or entry.get("title") or name, entry["inputSchema"], call)


def _mcp_content(answer: dict[str, Any]) -> str | list:
    blocks: list[dict[str, Any]] = []
    for block in answer.get("content") or []:
        if block["type"] == "text":
            blocks.append({"type": "text", "text": block["text"]})
        elif block["type"] == "image":
            from PIL import Image

            blocks.append({"type": "image", "image": Image.open(io.BytesIO(base64.b64decode(block["data"])))})
        elif block["type"] == "resource" and "text" in block["resource"]:
            blocks.append({"type": "text", "text": block["resource"]["text"]})
        else:
            blocks.append({"type": "text", "text": f"[{block['type']}: {block.get('uri') or block.get('mimeType')}]"})
    if not blocks and answer.get("structuredContent") is not None:
        return json.dumps(answer["structuredContent"], ensure_ascii=False)
    if any(block["type"] == "image" for block in blocks):
        return blocks
    return "\n".join(block["text"] for block in blocks)


def _cause(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):  # task groups wrap what went wrong
        error = error.exceptions[0]
    return f"{error}" if str(error) else type(error).__name__


def smolagents_tool(smolagent: Any) -> Callable:
    """Return a smolagents tool as a plain function.

    One object serves the calls of all rows at the same time; wrap one that is not thread-safe:
    `tool(smolagents_tool(t), max_concurrency=1)`.

    Args:
        smolagent (`smolagents.Tool`):
            The tool, or anything with its `name`, `description`, `inputs` and `output_type` that can be called.
    """
    missing = [name for name in ("name", "description", "inputs", "output_type") if not hasattr(smolagent, name)]
    if missing or not callable(smolagent):
        raise TypeError(f"smolagents_tool() takes a smolagents.Tool; {smolagent!r} has no {', '.join(missing)}.")
    lock = threading.Lock()

    def call(arguments: dict[str, Any]) -> Any:
        with lock:  # rows that call it for the first time together must not set it up together
            if not getattr(smolagent, "is_initialized", True):
                smolagent.setup()
        result = smolagent(**arguments)
        return [{"type": "image", "image": result}] if smolagent.output_type == "image" else result

    schema = {
        "properties": smolagent.inputs,
        "required": [name for name, spec in smolagent.inputs.items() if not spec.get("nullable")],
    }
    return _as_function(smolagent.name, smolagent.description, schema, call)


def _as_function(name: str, description: str, schema: dict[str, Any], call: Callable[[dict], Any]) -> Callable:
    """Return a function of keyword arguments that looks as `schema` says and passes them to `call` as a dict."""
    properties, required = schema.get("properties") or {}, schema.get("required") or []
    description, documented = _split_docstring(inspect.cleandoc(description))
    original, parameters, lines = {}, [], []
    # A parameter without a default cannot follow one with, so what is required comes first
    for key in sorted(properties, key=lambda key: key not in required):
        spec = _resolve(properties[key], schema)
        parameter = re.sub(r"\W", "_", key)
        if keyword.iskeyword(parameter) or not parameter.isidentifier():
            parameter = f"{parameter}_" if keyword.iskeyword(parameter) else f"_{parameter}"
        while parameter in original:  # such as of a-b, where there is a_b as well
            parameter += "_"
        original[parameter] = key
        hint = _type_hint(spec, schema)
        default: Any = inspect.Parameter.empty
        if key not in required:
            default = spec.get("default")
            hint = hint | None if default is None and hint is not Any else hint
        parameters.append(
            inspect.Parameter(parameter, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)
        )
        text = " ".join(str(spec.get("description") or documented.get(key) or spec.get("title") or key).split())
        fields = ", ".join(spec.get("properties") or {})
        lines.append(f"    {parameter}: {text}" + (f" (an object with {fields})" if fields else ""))
    signature = inspect.Signature(parameters, return_annotation=str)

    def by_original_name(arguments: dict[str, Any]) -> dict[str, Any]:
        # An argument that was left out stays out: the server knows its own default
        free = {
            key: value
            for key, value in arguments.items()
            if schema.get("additionalProperties") and key not in original
        }
        try:
            bound = signature.bind(**{key: value for key, value in arguments.items() if key not in free})
            return {original[key]: value for key, value in bound.arguments.items()} | free
        except TypeError as e:
            raise TypeError(f"{name}() {e}") from None

    async def run_async(**arguments: Any) -> Any:
        return await call(by_original_name(arguments))

    def run(**arguments: Any) -> Any:
        return call(by_original_name(arguments))

    function: Callable = run_async if is_async(call) else run
    function.__name__ = function.__qualname__ = name
    function.__doc__ = description + ("\n\nArgs:\n" + "\n".join(lines) if lines else "")
    function.__signature__ = signature  # type: ignore[attr-defined]
    function.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": str}
    return function


def _split_docstring(text: str) -> tuple[str, dict[str, str]]:
    """Split a description that is a whole docstring, as servers often send, into its summary and argument texts."""
    parts = re.split(r"\n\s*(?:Args|Arguments|Parameters|Returns|Raises|Yields|Example|Examples):\s*\n", f"{text}\n")
    arguments = re.search(r"\n\s*(?:Args|Arguments|Parameters):\s*\n(.*?)(?:\n\s*\n|\Z)", f"{text}\n", re.DOTALL)
    found = re.findall(r"^\s*(\w+)(?: *\([^)]*\))?:\s*(.+)$", arguments.group(1), re.MULTILINE) if arguments else []
    return parts[0].strip(), dict(found)


def _resolve(spec: Any, schema: dict[str, Any]) -> dict[str, Any]:
    """Follow a `$ref` within the schema; what cannot be followed is unrestricted."""
    seen = set()
    while isinstance(spec, dict) and "$ref" in spec and spec["$ref"] not in seen:
        seen.add(spec["$ref"])
        target: Any = schema
        for part in spec["$ref"].removeprefix("#/").split("/"):
            target = target.get(part, {}) if isinstance(target, dict) else {}
        spec = {**target, **{key: value for key, value in spec.items() if key != "$ref"}}
    return spec if isinstance(spec, dict) else {}


def _type_hint(spec: dict[str, Any], schema: dict[str, Any], depth: int = 5) -> Any:
    """Return the type hint that says the most of what a JSON schema says."""
    spec = _resolve(spec, schema)
    if depth == 0:
        return Any
    choices = [spec["const"]] if "const" in spec else spec.get("enum")
    if choices and all(isinstance(choice, str | int | bool | None) for choice in choices):
        return Literal[tuple(choices)]
    options = spec.get("anyOf") or spec.get("oneOf")
    kinds = spec.get("type")
    if options:
        hints = [_type_hint(option, schema, depth - 1) for option in options]
    elif isinstance(kinds, list):
        hints = [_type_hint({**spec, "type": kind}, schema, depth - 1) for kind in kinds]
    elif kinds == "array" and spec.get("items"):
        item = _type_hint(spec["items"], schema, depth - 1)
        hints = [list if item is Any else list[item]]  # type: ignore[valid-type]
    else:
        hints = [_TYPES.get(kinds, Any)]  # type: ignore[arg-type]
    if spec.get("nullable"):
        hints.append(type(None))
    if Any in hints or not hints:
        return Any
    return functools.reduce(operator.or_, hints)
