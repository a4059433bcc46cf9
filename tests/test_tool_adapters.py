import asyncio
import inspect
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from transformers.utils import get_json_schema

from arpo_trl.tools import ToolCall, ToolExecutor, adapters, tool
from arpo_trl.tools.adapters import _as_function, mcp_tools, smolagents_tool

SERVER = str(Path(__file__).with_name("mcp_server.py"))


@pytest.fixture(scope="module")
def stdio():
    mcp = pytest.importorskip("mcp.server.mcpserver", reason="needs mcp 2, whose server the tests start")
    assert mcp
    from mcp import StdioServerParameters

    return lambda: StdioServerParameters(command=sys.executable, args=[SERVER])


@pytest.fixture(scope="module")
def tools(stdio):
    with mcp_tools(stdio()) as tools:
        yield {tool.__name__: tool for tool in tools}


@pytest.fixture(scope="module")
def executor():
    with ToolExecutor(timeout=30) as executor:
        yield executor


def one(executor, function, **arguments):
    return executor.run([(ToolCall(function.__name__, arguments), function)])[0]


def parameters(function):
    return get_json_schema(function)["function"]["parameters"]


# --- MCP -------------------------------------------------------------------------------------------------------------


def test_mcp_tools_look_like_functions(tools):
    assert set(tools) == {"add", "look-up", "fail", "meet", "hang", "draw", "process_id", "die"}
    assert all(inspect.iscoroutinefunction(tool) for tool in tools.values())
    assert get_json_schema(tools["add"])["function"]["description"] == "Add two numbers."
    assert parameters(tools["add"]) == {
        "type": "object",
        "properties": {
            "a": {"type": "integer", "description": "The first number."},
            "b": {"type": "integer", "description": "The second number."},
        },
        "required": ["a"],
    }
    assert parameters(tools["look-up"]) == {
        "type": "object",
        "properties": {
            "where": {"type": "object", "description": "Place (an object with city, country)"},
            "unit": {"type": "string", "enum": ["celsius", "kelvin"], "description": "Unit"},
            "days": {"type": "array", "items": {"type": "integer"}, "nullable": True, "description": "Days"},
        },
        "required": ["where"],
    }


def test_mcp_tools_answer(tools, executor):
    assert one(executor, tools["add"], a=1, b=2).result == "1 + 2 = 3"
    assert one(executor, tools["add"], a=1).result == "1 + 10 = 11"  # the server's default
    assert one(executor, tools["look-up"], where={"city": "Paris"}, days=[1]).result == "Paris, France: celsius [1]"
    assert asyncio.run(tools["add"](a=4)) == "4 + 10 = 14"  # on any loop, as TRL's


def test_mcp_tools_answer_all_rows_at_once(tools, executor):
    calls = executor.run([(ToolCall("meet", {"count": 32}), tools["meet"]) for _ in range(32)])
    assert [call.result for call in calls] == ["met"] * 32


def test_mcp_errors_are_told(tools, executor):
    call = one(executor, tools["fail"], reason="no such thing")
    assert "no such thing" in call.error and call.error.startswith("RuntimeError: ")
    assert "city" in one(executor, tools["look-up"], where={"town": "Paris"}).error
    assert "integer" in one(executor, tools["add"], a="x").error, "the server checks the types"
    assert one(executor, tools["add"], c=1).error == "TypeError: add() missing a required argument: 'a'"
    assert one(executor, tools["add"], a=1, c=1).error == "TypeError: add() got an unexpected keyword argument 'c'"


def test_mcp_images_are_content_blocks(tools, executor):
    (block,) = one(executor, tools["draw"]).result
    assert block["type"] == "image"
    assert block["image"].convert("RGB").getpixel((0, 0)) == (255, 0, 0)


def test_mcp_tools_take_options(tools, executor):
    call = one(executor, tool(tools["hang"], timeout=0.3))
    assert call.error == "TimeoutError: Tool hang gave no answer within 0.3 s."
    assert one(executor, tools["add"], a=1).result == "1 + 10 = 11"


def test_a_dead_mcp_server_is_an_error_and_started_again_and_nothing_is_left(stdio, executor):
    executor.run([(ToolCall("sleep", {"delay": 0}), asyncio.sleep)])  # its own threads have started
    before = threading.active_count()
    with mcp_tools(stdio()) as tools:
        tools = {tool.__name__: tool for tool in tools}
        pid = int(one(executor, tools["process_id"]).result)
        assert psutil.pid_exists(pid)
        assert one(executor, tools["die"]).error == "ConnectionError: MCP tool die: Connection closed"
        # calls that come together after it share the new one
        calls = executor.run([(ToolCall("process_id"), tools["process_id"]) for _ in range(8)])
        (new,) = {int(call.result) for call in calls}
        assert new != pid and not psutil.pid_exists(pid)
        assert one(executor, tools["add"], a=1).result == "1 + 10 = 11"
        psutil.Process(new).kill()
        assert one(executor, tool(tools["add"], retries=2), a=2).result == "2 + 10 = 12"
        last = int(one(executor, tools["process_id"]).result)
    assert not any(psutil.pid_exists(number) for number in (pid, new, last))
    assert one(executor, tools["add"], a=1).error.startswith("ConnectionError: MCP tool add: ")
    assert threading.active_count() == before


def test_leaving_ends_the_server(stdio, executor):
    with mcp_tools(stdio()) as tools:
        tools = {tool.__name__: tool for tool in tools}
        pid = int(one(executor, tools["process_id"]).result)
        hanging = executor.submit(ToolCall("hang"), tools["hang"])
    assert not psutil.pid_exists(pid)
    assert hanging.result(timeout=20).error is not None


def test_a_server_that_does_not_start_is_told():
    pytest.importorskip("mcp")
    from mcp import StdioServerParameters

    before, children = set(threading.enumerate()), psutil.Process().children()
    for arguments in (["-c", "raise SystemExit(1)"], ["-c", "import time; time.sleep(3600)"]):
        with pytest.raises(ConnectionError, match="No connection to the MCP server"):
            with mcp_tools(StdioServerParameters(command=sys.executable, args=arguments), timeout=1):
                pass
    with pytest.raises(ConnectionError, match="No connection to the MCP server"):
        with mcp_tools(StdioServerParameters(command="no-such-program")):
            pass
    assert set(threading.enumerate()) <= before
    assert children == psutil.Process().children()


def test_mcp_over_http(stdio, executor):
    pytest.importorskip("mcp.client.streamable_http")
    from mcp.client.streamable_http import streamable_http_client

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, SERVER, str(port)], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        with mcp_tools(streamable_http_client(f"http://127.0.0.1:{port}/mcp")) as tools:
            tools = {tool.__name__: tool for tool in tools}
            assert one(executor, tools["add"], a=1).result == "1 + 10 = 11"
    finally:
        server.kill()
        server.wait()


def test_a_transport_that_can_be_opened_again_is(stdio, executor):
    from mcp import stdio_client

    with mcp_tools(lambda: stdio_client(stdio())) as tools:
        tools = {tool.__name__: tool for tool in tools}
        first = one(executor, tools["process_id"]).result
        assert one(executor, tools["die"]).error.startswith("ConnectionError")
        assert one(executor, tools["process_id"]).result not in (first, None)
    with mcp_tools(stdio_client(stdio())) as tools:
        tools = {tool.__name__: tool for tool in tools}
        for _ in range(2):
            assert one(executor, tools["die"]).error.startswith("ConnectionError: MCP tool die: ")


def test_tools_that_cannot_be_offered_do_not_take_the_others_away(stdio, executor, monkeypatch, caplog):
    listed = adapters._list_tools

    async def with_odd_ones(session):
        entries = await listed(session)
        return [*entries, entries[0], {"name": "odd", "description": "", "inputSchema": {"properties": [1]}}]

    monkeypatch.setattr(adapters, "_list_tools", with_odd_ones)
    with mcp_tools(stdio()) as tools:
        names = [tool.__name__ for tool in tools]
    assert len(names) == len(set(names)) == 8 and "odd" not in names
    assert [record.message.split(",")[0] for record in caplog.records] == [
        f"The MCP server offers tool {names[0]} twice; the second one is left out.",
        "MCP tool odd is left out",
    ]


# --- schemas ---------------------------------------------------------------------------------------------------------


def test_schemas_of_all_kinds():
    schema = {
        "properties": {
            "class": {"type": "string"},
            "max-results": {"type": "integer", "default": 5},
            "1st": {"type": ["number", "null"]},
            "any": {},
            "either": {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "string"}}]},
            "tree": {"$ref": "#/$defs/Tree"},
            "fixed": {"const": "x"},
        },
        "required": ["class"],
        "$defs": {"Tree": {"type": "object", "properties": {"left": {"$ref": "#/$defs/Tree"}}}},
    }
    function = _as_function("web.search", "Search.", schema, lambda arguments: arguments)
    assert function.__name__ == "web.search"
    assert parameters(function)["properties"] == {
        "class_": {"type": "string", "description": "class"},
        "max_results": {"type": "integer", "description": "max-results"},
        "_1st": {"type": "number", "nullable": True, "description": "1st"},
        "any": {"description": "any"},
        "either": {
            "anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "string"}}],
            "nullable": True,
            "description": "either",
        },
        "tree": {"type": "object", "nullable": True, "description": "tree (an object with left)"},
        "fixed": {"type": "string", "enum": ["x"], "nullable": True, "description": "fixed"},
    }
    # the original names come back, and what was left out stays out
    assert function(class_="c", max_results=3) == {"class": "c", "max-results": 3}


def test_parameters_that_become_the_same_name():
    schema = {"properties": {"a_b": {"type": "integer"}, "a-b": {"type": "string"}, "a.b": {}}, "required": ["a-b"]}
    function = _as_function("f", "F.", schema, lambda arguments: arguments)
    assert list(parameters(function)["properties"]) == ["a_b", "a_b_", "a_b__"]
    # what is required comes first
    assert function(a_b="x", a_b_=1, a_b__=2) == {"a-b": "x", "a_b": 1, "a.b": 2}


def test_arguments_that_a_schema_leaves_free():
    schema = {"properties": {"a-b": {"type": "integer"}}, "required": ["a-b"], "additionalProperties": True}
    function = _as_function("f", "F.", schema, lambda arguments: arguments)
    assert function(a_b=1, x=2) == {"a-b": 1, "x": 2}
    with pytest.raises(TypeError, match="missing a required argument: 'a_b'"):
        function(x=2)
    closed = _as_function("f", "F.", schema | {"additionalProperties": False}, lambda arguments: arguments)
    with pytest.raises(TypeError, match="unexpected keyword argument 'x'"):
        closed(a_b=1, x=2)


def test_a_tool_without_parameters():
    function = _as_function("now", "Tell the time.", {"type": "object"}, lambda arguments: arguments)
    assert parameters(function) == {"type": "object", "properties": {}}
    assert function() == {}


def test_a_description_that_is_a_docstring():
    description = """Search the web.

    Takes its time.

    Args:
        query (str): What to look for.
        k: How many.

    Returns:
        str: What was found.
    """
    schema = {"properties": {"query": {"type": "string", "title": "Query"}, "k": {"type": "integer"}}}
    described = get_json_schema(_as_function("search", description, schema, dict))["function"]
    assert described["description"] == "Search the web.\n\nTakes its time."
    assert described["parameters"]["properties"]["query"]["description"] == "What to look for."
    assert described["parameters"]["properties"]["k"]["description"] == "How many."


# --- smolagents ------------------------------------------------------------------------------------------------------


class Stand:
    """Anything with the attributes of a smolagents tool."""

    name = "repeat"
    description = "Repeat a word."
    inputs = {
        "word": {"type": "string", "description": "The word."},
        "times": {"type": "integer", "description": "How often.", "nullable": True},
    }
    output_type = "string"
    is_initialized = False
    set_up = 0

    def setup(self):
        self.set_up += 1
        time.sleep(0.05)
        self.is_initialized = True

    def __call__(self, word, times=2):
        if not word:
            raise ValueError("the word is empty")
        return word * times


def test_smolagents_tools_are_duck_typed(executor):
    stand = Stand()
    repeat = smolagents_tool(stand)
    assert repeat.__name__ == "repeat" and not inspect.iscoroutinefunction(repeat)
    assert parameters(repeat) == {
        "type": "object",
        "properties": {
            "word": {"type": "string", "description": "The word."},
            "times": {"type": "integer", "nullable": True, "description": "How often."},
        },
        "required": ["word"],
    }
    calls = executor.run([(ToolCall("repeat", {"word": "ab"}), repeat) for _ in range(8)])
    assert [call.result for call in calls] == ["abab"] * 8
    assert stand.set_up == 1  # though all rows called it for the first time together
    assert one(executor, repeat, word="a", times=3).result == "aaa"
    assert one(executor, repeat, word="").result == str({"error": "the word is empty"})
    with pytest.raises(TypeError, match="takes a smolagents.Tool; .* has no name, description, inputs, output_type"):
        smolagents_tool(print)


def test_smolagents_tools(executor):
    smolagents = pytest.importorskip("smolagents")

    @smolagents.tool
    def shout(text: str, mark: str = "!") -> str:
        """Shout a text.

        Args:
            text: What to shout.
            mark: What to end with.
        """
        return text.upper() + mark

    function = smolagents_tool(shout)
    described = get_json_schema(function)["function"]
    assert (described["name"], described["description"]) == ("shout", "Shout a text.")
    assert described["parameters"]["properties"]["text"] == {"type": "string", "description": "What to shout."}
    assert one(executor, function, text="hey").result == "HEY!"
    assert one(executor, function, text="hey", mark="?").result == "HEY?"

    answer = smolagents_tool(smolagents.FinalAnswerTool())
    assert one(executor, answer, answer={"x": 1}).result == "{'x': 1}"
