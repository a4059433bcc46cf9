"""A turn is parsed from the end of its context: the same turn as from all of it, whatever the context holds."""

import random

import pytest
import tiny

from arpo_trl.protocols import ChatTemplateProtocol

TURNS = [
    'I look.\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 22}}\n</tool_call><|im_end|>',
    "It is 3.<|im_end|>",
    "<|im_start|>assistant\nIt is 3.",
    "<tool_call> <|im_start|>",
]


@pytest.fixture(scope="module")
def protocol(tokenizer):
    from trl.chat_template_utils import add_response_schema

    return ChatTemplateProtocol(add_response_schema(tokenizer), ["add"], None)


def contexts(tokenizer):
    start = tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)
    rng = random.Random(0)
    long = [rng.randrange(3, len(tokenizer)) for _ in range(5000)]
    for far in (0, 1, 40, 62, 63, 64, 500, 4000):
        yield pytest.param(long + start + long[:far] if far else long + start, id=f"{far} tokens after the start")
    yield pytest.param(start, id="the start alone")
    yield pytest.param([token for token in long if token not in start], id="no start")
    yield pytest.param([], id="nothing")


@pytest.mark.parametrize("turn", TURNS)
def test_turns_are_those_of_the_whole_context(protocol, tokenizer, turn, monkeypatch):
    ids = tokenizer.encode(turn, add_special_tokens=False)
    tools = {"add": tiny.add}
    for case in contexts(tokenizer):
        (context,) = case.values
        found = protocol.parse(ids, context, tools)
        with monkeypatch.context() as whole:
            whole.setattr(ChatTemplateProtocol, "turn_prefix", lambda self, context: context)
            assert protocol.parse(ids, context, tools) == found, case.id


def test_a_long_context_is_not_decoded(protocol, tokenizer):
    start = tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)
    assert len(protocol.turn_prefix([7] * 30_000 + start)) <= 64


def test_a_schema_is_made_once_for_each_function(protocol, monkeypatch):
    made = []
    from arpo_trl.protocols import chat_template

    original = chat_template.get_json_schema
    monkeypatch.setattr(chat_template, "get_json_schema", lambda tool: made.append(tool) or original(tool))

    def double(x: int) -> int:
        """
        Double.

        Args:
            x: A number.
        """
        return 2 * x

    for _ in range(3):
        (schema,) = protocol._schemas({"double": double})
    assert made == [double] and schema["function"]["name"] == "double"
