"""Code as models write it: fenced, indented as a whole, or as it should be."""

import json
import random

import pytest
from loopback import Loopback, http

from arpo_trl.source_code import source_code, trimmed, unindented
from arpo_trl.tools.python import PythonSandbox
from arpo_trl.tools.python.remote import RemoteSandbox


@pytest.mark.parametrize(
    "text, code",
    [
        ("```python\nprint(1)\n```", "print(1)"),
        ("\n```\nprint(1)\n```  \n", "print(1)"),
        ("```py3\n  if 1:\n    print(1)\n```", "if 1:\n  print(1)"),
        ("    ```python\n    print(1)\n    ```", "print(1)"),
        ("```python\nprint(1)", "print(1)"),
        ("````\ns = '''\n```\n'''\n````", "s = '''\n```\n'''"),
        ("```python\n```", ""),
        ("    x = 2\n    print(x)", "x = 2\nprint(x)"),
        ("\n\tif 1:\n\t\tprint(1)\n", "if 1:\n\tprint(1)"),
        (" x = 1\nprint(x)", "x = 1\nprint(x)"),
        ("s = '''\n  \n```\n'''", "s = '''\n  \n```\n'''"),
        ("x = 1\n\n    \ny = 2", "x = 1\n\n    \ny = 2"),
        ("", ""),
        ("```", "```"),
    ],
)
def test_code_comes_out_of_its_fence_and_indentation(text, code):
    assert source_code(text) == code


def test_fenced_and_indented_code_runs():
    sandbox = PythonSandbox(sandbox="rlimits", timeout=20)
    assert sandbox.python("```python\nprint(1 + 1)\n```") == "2"
    assert sandbox.python("    x = 2\n    print(x)") == "2"
    sandbox.close()


def test_a_remote_sandbox_is_sent_the_code_alone():
    answer = {"status": "Success", "message": "", "run_result": {"status": "Finished", "stdout": "2", "stderr": ""}}
    answer["run_result"]["return_code"] = 0
    with Loopback({"/run_code": http(json.dumps(answer))}) as server:
        assert RemoteSandbox(server.url).python("```python\nprint(1 + 1)\n```") == "2"
        (request,) = server.requests
    assert "run_cell('print(1 + 1)')" in json.loads(request.body)["code"]


def test_10_000_random_texts_are_read_as_code():
    rng = random.Random(0)
    pieces = ["```", "`", "````", "python", "\n", "    ", "\t", "\r\n", "x = 1", "'", '"""', "#", "\0", "\ud800", ""]
    for _ in range(10_000):
        text = "".join(rng.choice(pieces) for _ in range(rng.randrange(14)))
        code = source_code(text)
        assert len(code) <= len(text) and code == code.strip()


@pytest.mark.parametrize(
    "text, without_blanks, without_indentation",
    [
        (" a ", "a", "a"),
        ("\n   a  b\n0  1  2\n", "   a  b\n0  1  2", "a  b\n0  1  2"),
        ("\n  \n  a\n    b\n ", "  a\n    b", "a\n  b"),
        ("", "", ""),
        (" \n ", "", ""),
    ],
)
def test_blank_lines_and_common_indentation_come_off(text, without_blanks, without_indentation):
    assert trimmed(text) == without_blanks
    assert unindented(text) == without_indentation
