"""What the model reads of a tool's return value, whatever its type."""

import dataclasses

import numpy
import pandas
import pytest
import tool_samples
import torch

from arpo_trl.tools import ToolCall, ToolExecutor, tool


@dataclasses.dataclass
class Point:
    x: int


BLOCK = {"type": "text", "text": "4"}
IMAGE = {"type": "image", "image": "of a cat"}


@pytest.mark.parametrize(
    "result, read",
    [
        ([{"type": "person", "name": "Ada"}], "[{'type': 'person', 'name': 'Ada'}]"),
        ([BLOCK, BLOCK], [BLOCK, BLOCK]),
        ([BLOCK, "2"], "[{'type': 'text', 'text': '4'}, '2']"),
        ([{"type": "text", "text": "4", "page": 3}], "[{'type': 'text', 'text': '4', 'page': 3}]"),
        ([{"type": "text", "text": 4}], "[{'type': 'text', 'text': 4}]"),
        ([{"type": "image", "width": 3}], "[{'type': 'image', 'width': 3}]"),
        ([{"type": ["text"], "text": "4"}], "[{'type': ['text'], 'text': '4'}]"),
        ([BLOCK, IMAGE], [BLOCK, IMAGE]),
        ([], "[]"),
        ({"type": "text", "text": "4"}, "{'type': 'text', 'text': '4'}"),
        (numpy.arange(3), "[0 1 2]"),
        ([numpy.arange(2)], "[array([0, 1])]"),
        (numpy.float64(0.5), "0.5"),
        (torch.tensor([1, 2]), "tensor([1, 2])"),
        (pandas.DataFrame({"a": [1], "b": [2]}), "   a  b\n0  1  2"),
        (pandas.Series([1]), "0    1\ndtype: int64"),
        (Point(3), "Point(x=3)"),
        ("é".encode(), "é"),
        (b"\xff", "b'\\xff'"),
        ({4}, "{4}"),
        (None, "None"),
        ((1, 2), "(1, 2)"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_any_result_is_read_as_text(result, read):
    def answers():
        return result

    async def answers_later():
        return result

    with ToolExecutor(timeout=5) as executor:
        calls = executor.run([(ToolCall("answers"), answers), (ToolCall("answers_later"), answers_later)])
    for call in calls:
        assert (call.result, call.error) == (read, None)


def test_a_worker_process_answers_as_a_thread_does():
    with ToolExecutor(timeout=60) as executor:
        (call,) = executor.run([(ToolCall("entities"), tool(tool_samples.entities, process=True))])
    assert (call.result, call.error) == ("[{'type': 'person', 'name': 'Ada'}]", None)
