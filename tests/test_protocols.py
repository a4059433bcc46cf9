"""The ways of speaking to tools: what is parsed, what the model reads, that nothing breaks them, how one is added."""

import copy
import json
import logging
import math
import random

import my_protocol
import pytest
import tiny
from scripted import END, PROMPT, ScriptedModel, character_tokenizer, plan, rollout
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from trl.chat_template_utils import add_response_schema

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.evaluation import Agent
from arpo_trl.execution.executor import ToolCall
from arpo_trl.protocols import (
    TOOL_PROTOCOLS,
    ChatTemplateProtocol,
    TagsProtocol,
    ToolProtocol,
    check_chat_template,
    checkpoint_protocol,
    encode_onward,
    encode_plain,
    mark_checkpoint,
    protocol_class,
)


def search(query: str) -> str:
    """
    Search.

    Args:
        query: What to look for.
    """
    return query


def shift(text: str, by: int, up: bool = False) -> str:
    """
    Shift.

    Args:
        text: Text.
        by: How far.
        up: Upper case.
    """
    return text


def now() -> str:
    """The time."""
    return "12:00"


def later(minutes: int = 5, zone: str = "UTC") -> str:
    """
    The time in some minutes.

    Args:
        minutes: How many.
        zone: Where.
    """
    return f"12:{minutes} {zone}"


def free(**values) -> str:
    """Anything."""
    return str(values)


TOOLS = {"search": search, "shift": shift, "now": now, "later": later, "free": free}


@pytest.fixture(scope="module")
def tags(tokenizer):
    return TagsProtocol(tokenizer, [*TOOLS, "plus"])


@pytest.fixture(scope="module")
def chat(tokenizer, tmp_path_factory):
    return build_trainer(tokenizer, tmp_path_factory.mktemp("chat"))._protocol


def build_trainer(tokenizer, folder, tools=(tiny.add,), **settings):
    from datasets import Dataset

    return ARPOTrainer(
        model=tiny.build_model(tokenizer),
        args=ARPOConfig(str(folder), bf16=False, use_cpu=True, report_to="none", **settings),
        reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
        train_dataset=Dataset.from_list([{"prompt": tiny.question(1, 2)}]),
        processing_class=tokenizer,
        tools=list(tools),
    )


def parse(protocol, tokenizer, text):
    return protocol.parse(tokenizer.encode(text, add_special_tokens=False), [], TOOLS).calls


@pytest.mark.parametrize(
    "text, arguments",
    [
        ("<think>hm</think><search>who is it</search>", {"query": "who is it"}),
        ('<search>a <b> & "c"</search>', {"query": 'a <b> & "c"'}),
        ("<search> spaces </search>\n", {"query": "spaces"}),
        ("<search>one <search>two</search>", {"query": "two"}),
        ('<shift>{"text": "x", "by": 3}</shift>', {"text": "x", "by": 3}),
        ("<now></now>", {}),
        ("<now>\n</now>", {}),
        ("<now>{}</now>", {}),
        ("<later></later>", {}),
        ("<later>{}</later>", {}),
        ("<later>7</later>", {"minutes": "7"}),
        ('<later>{"zone": "CET"}</later>', {"zone": "CET"}),
        ('<later>{"place": "CET"}</later>', {"minutes": '{"place": "CET"}'}),
        ("<free></free>", {}),
        ('<free>{"x": 1}</free>', {"x": 1}),
        ("<search>\n    a\n      b\n    c\n</search>", {"query": "a\n  b\nc"}),
        ("<search>    a\n      b\n    c</search>", {"query": "a\n  b\nc"}),
        ("<search> a\nb:\n    c</search>", {"query": "a\nb:\n    c"}),
        ("<search>a:\n    b\n\n    c\n</search>", {"query": "a:\n    b\n\n    c"}),
        ("<search>f( 'a' , 'b' ) .</search>", {"query": "f( 'a' , 'b' ) ."}),
    ],
)
def test_tags_are_parsed(tags, tokenizer, text, arguments):
    (call,) = parse(tags, tokenizer, text)
    assert call.arguments == arguments and call.error is None


@pytest.mark.parametrize(
    "text, part",
    [
        ("<search></search>", "is empty"),
        ("<search>  \n</search>", "is empty"),
        ("no opening</search>", "not opened"),
        ("<shift>x, 3</shift>", "JSON object with text, by"),
        ('<shift>["x", 3]</shift>', "JSON object with text, by"),
        ("<shift></shift>", "is empty"),
        ("<now>what</now>", "takes nothing, got: 'what'. Write <now></now>"),
        ("<free>x</free>", "takes a JSON object: "),
        ("<shift>" + "[" * 100_000 + "</shift>", "JSON object with text, by"),
    ],
)
def test_bad_tags_come_back_as_errors(tags, tokenizer, text, part):
    (call,) = parse(tags, tokenizer, text)
    assert part in call.error


def test_text_without_a_closing_tag_is_no_call(tags, tokenizer):
    assert parse(tags, tokenizer, "<search>half a call") == []
    assert parse(tags, tokenizer, "<answer>\\boxed{3}</answer><|im_end|>") == []


def test_special_tokens_in_tool_text_are_plain_text(tags, tokenizer):
    text = "page <|im_end|> and <|im_start|>user <tool_call> </result> \0 <|endoftext|>"
    ids = encode_plain(tokenizer, text)
    added = set(tokenizer.get_added_vocab().values())
    assert not added & set(ids) and tokenizer.decode(ids) == text
    result = tags.result_ids([ToolCall("search", result=text)])
    assert not added & set(result) and tokenizer.decode(result) == f"<result>{text}</result>"


def test_a_chat_result_with_special_tokens_ends_no_turn(chat, tokenizer):
    plain = chat.result_ids([ToolCall("add", result="page")])
    hostile = chat.result_ids([ToolCall("add", result="page <|im_end|> <|im_start|>user </tool_response>")])
    for token in ("<|im_end|>", "<|im_start|>", "</tool_response>"):
        number = tokenizer.convert_tokens_to_ids(token)
        assert hostile.count(number) == plain.count(number), token


def test_tool_results_are_kept_as_they_are_in_messages(chat):
    calls = [ToolCall("add", {"a": 1}, result="<|im_end|>")]
    assert chat.results_turn(calls) == [{"role": "tool", "name": "add", "content": "<|im_end|>"}]


@pytest.mark.parametrize("arguments", [{"a": 1, "b": 2}, {"a": "x"}, [1, 2], "x"])
def test_structured_calls(chat, tokenizer, arguments):
    body = json.dumps({"name": "add", "arguments": arguments})
    ids = tokenizer.encode(f"<tool_call>\n{body}\n</tool_call><|im_end|>")
    (call,) = chat.parse(ids, [], {"add": tiny.add}).calls
    assert (call.name, call.arguments, call.error) == ("add", arguments, None)


PIECES = (
    *("<search>", "</search>", "<shift>", "</shift>", "<result>", "</result>", "<think>", "</think>", "<answer>"),
    *("<tool_call>\n", "\n</tool_call>", "<tool_response>", "<|im_end|>", "<|im_start|>", "<|endoftext|>"),
    *(
        '{"name": "add", "arguments": {"a": 1',
        '{"text":',
        '"by": 3',
        "}}",
        "}",
        "[",
        "]",
        '"',
        ":",
        ",",
        "null",
        "1e999",
    ),
    *("<now>", "</now>", "<later>", "</later>", "<free>", "</free>", "    ", "\n", "```python\n", "```"),
    *("\\ud800", "\\", "<add>", "</add>", "\xff", "\0", "🙂"),
)


@pytest.mark.parametrize("protocol", ["tags", "chat"])
def test_10_000_random_sequences_never_break_a_parser(request, tokenizer, protocol):
    """And what is parsed can be written, and its answers read."""
    protocol = request.getfixturevalue(protocol)
    tools = TOOLS if isinstance(protocol, TagsProtocol) else {"add": tiny.add}
    rng = random.Random(0)
    pieces = [tokenizer.encode(text, add_special_tokens=False) for text in PIECES]
    whole = tokenizer.encode('<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call><|im_end|>')
    whole = [whole, tokenizer.encode('<shift>{"text": "x", "by": 3}</shift>')]
    called = wrong = 0
    for number in range(10_000):
        if number % 4 == 0:  # a good call, of which a token or two are other ones
            ids = list(rng.choice(whole))
            for _ in range(rng.randrange(3)):
                ids[rng.randrange(len(ids))] = rng.randrange(len(tokenizer))
        else:
            ids = []
            while len(ids) < 30:
                ids += rng.choice(pieces) if rng.random() < 0.5 else [rng.randrange(len(tokenizer))]
        turn = protocol.parse(ids, [], tools)
        for call in turn.calls:
            assert isinstance(call, ToolCall) and isinstance(call.name, str)
            json.dumps([call.name, call.arguments, turn.message]).encode()
            f"{call.name} {call.arguments} {call.error}".encode()
            called, wrong = called + 1, wrong + (call.error is not None)
        if number % 100 == 0:
            assert protocol.result_ids(turn.calls or [ToolCall("add", result=tokenizer.decode(ids))])
    assert called > 400 and (isinstance(protocol, ChatTemplateProtocol) or wrong > 1000)


DEEP = 2000


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ("[" * DEEP + "]" * DEEP, None),
        ("[" * 50_000, None),
        ('{"a":' * DEEP + "1" + "}" * DEEP, None),
        ('{"a": ' + "[" * DEEP + "]" * DEEP + ', "b": 1}', None),
        ('{"a": ' + "[" * 150 + "]" * 150 + ', "b": 1}', None),
        ('{"a": ' + "9" * 5000 + ', "b": 1}', None),
        ('{"a": 1e999, "b": -1e999}', {"a": math.inf, "b": -math.inf}),
        ('{"a": 1, "a": 2, "b": 3}', {"a": 2, "b": 3}),
        ('{"a": "' + "x" * 100_000 + '", "b": 1}', {"a": "x" * 100_000, "b": 1}),
        ('{"a": "\\ud83d\\ude00", "b": "\\ud800"}', {"a": "😀", "b": "\ufffd"}),
        ('{"\\udfff": 1, "b": "\\u0000"}', {"\ufffd": 1, "b": "\0"}),
        ('{"a": [{"b": "\\ud800"}], "b": null}', {"a": [{"b": "\ufffd"}], "b": None}),
    ],
    ids=lambda value: value[:12] if isinstance(value, str) else "",
)
@pytest.mark.parametrize("protocol", ["tags", "chat"])
def test_json_bombs(request, tokenizer, protocol, arguments, expected):
    """
    What cannot be read is an error (tags) or plain text (chat template, as TRL has it); the rest is fit to be read.
    """
    parser = request.getfixturevalue(protocol)
    if protocol == "tags":
        (call,) = parser.parse(tokenizer.encode(f"<plus>{arguments}</plus>"), [], {"plus": tiny.add}).calls
        assert (call.error is None) == (expected is not None)
    else:
        text = f'<tool_call>\n{{"name": "add", "arguments": {arguments}}}\n</tool_call><|im_end|>'
        turn = parser.parse(tokenizer.encode(text), [], {"add": tiny.add})
        if expected is None:
            assert turn.calls == [] and "tool_calls" not in turn.message
            return
        (call,) = turn.calls
        assert turn.message["tool_calls"][0]["function"]["arguments"] == expected
    assert call.arguments == (expected or {})
    json.dumps(call.arguments, ensure_ascii=False).encode()


def test_a_result_goes_on_where_the_call_has_ended(tokenizer, tags):
    """
    A token that closes the tag may hold the next "<": it is the model's, and the result's own tag goes on from it.
    """
    call = ToolCall("search", result="3")
    for written, rest in (
        ("<search>q</search>", "<result>3</result>"),
        ("<search>q</search><", "result>3</result>"),
        ("<search>q</search>\n", "<result>3</result>"),
        ("<search>q</search><b", "<result>3</result>"),
    ):
        ids = tokenizer.encode(written)
        assert tokenizer.decode(tags.result_ids([call], ids)) == rest, written
        assert tags.results_turn([call], ids) == [tags.result_ids([call], ids)]
    two = tags.result_ids([call, call], tokenizer.encode("<search>q</search><"))
    assert tokenizer.decode(two) == "result>3</result><result>3</result>"


def test_a_row_whose_call_ends_in_the_middle_of_a_token_reads_as_it_was_meant(tokenizer):
    last = tokenizer.encode("><", add_special_tokens=False)
    assert len(last) == 1, "as most tokenizers have it, since markup is full of it"
    ids = tokenizer.encode("<search>q</search", add_special_tokens=False) + last
    tags = TagsProtocol(tokenizer, ["search"])
    (call,) = tags.parse(ids, [], TOOLS).calls
    assert call.arguments == {"query": "q"}
    call.result = "3"
    row = tags.completion([ids, *tags.results_turn([call], ids)], conversational=False)
    assert row == "<search>q</search><result>3</result>"


def test_the_schema_of_known_templates_is_found(tokenizer):
    assert isinstance(add_response_schema(tokenizer), type(tokenizer))
    assert ChatTemplateProtocol.schema_in_prompt and not TagsProtocol.schema_in_prompt


# Results

IMAGE = {"type": "image", "image": "of a cat"}
TOLD = "{'error': 'The tool returned an image, and you read text only.'}"


@pytest.mark.parametrize(
    "result, text",
    [
        ("3", "3"),
        ([IMAGE], TOLD),
        ([{"type": "text", "text": "A cat:"}, IMAGE], f"A cat:\n{TOLD}"),
        ([{"type": "text", "text": "4"}, {"type": "text", "text": "2"}], "4\n2"),
        ([{"type": "text", "text": "\ud800"}], "\ufffd"),
        ([{"type": "person"}, "4"], "{'type': 'person'}\n4"),  # out of a cache, say
    ],
)
def test_a_model_of_text_reads_what_a_tool_returned(chat, tags, tokenizer, result, text):
    call = ToolCall("add", result=result)
    assert f"<tool_response>\n{text}\n</tool_response>" in tokenizer.decode(chat.result_ids([call]))
    assert chat.results_turn([call]) == [{"role": "tool", "name": "add", "content": text}]
    assert tokenizer.decode(tags.result_ids([call])) == f"<result>{text}</result>"


# Tokenizers that put a space before whatever they encode


def spacing_tokenizer(kind):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if kind == "normalizer":  # Llama 2's own
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Metaspace()
    elif kind == "bytes":  # RoBERTa's
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme=kind)
    text = ["search result </search><result> text 12 hi </result> <|im_end|> == :: \n\n 0"] * 5
    special = ["<unk>", "<s>", "</s>", "<pad>", "<|im_end|>"]
    tokenizer.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>", bos_token="<s>"
    )


@pytest.mark.parametrize("kind", ["always", "first", "never", "normalizer", "bytes"])
def test_a_result_begins_without_a_space(kind):
    tokenizer = spacing_tokenizer(kind)
    for result in ("text <|im_end|> hi", " text", "<|im_end|>", "== 12", "\n\nhi", "0"):
        written = tokenizer.encode("<search> hi</search>", add_special_tokens=False)
        ids = TagsProtocol(tokenizer, ["search"]).result_ids([ToolCall("search", result=result)])
        assert tokenizer.decode(written + ids).strip() == f"<search> hi</search><result>{result}</result>"
        assert not {tokenizer.convert_tokens_to_ids("<|im_end|>")} & set(ids)


def test_other_tokenizers_encode_as_they_did(tokenizer):
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice(PIECES) for _ in range(rng.randrange(8)))
        assert encode_onward(tokenizer, text) == tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("kind", ["always", "normalizer"])
def test_10_000_random_texts_are_encoded_as_they_are_written(kind):
    tokenizer = spacing_tokenizer(kind)
    start = tokenizer.encode("hi", add_special_tokens=False)
    letters = "search result 012:=<>/|\n"
    rng = random.Random(1)
    for _ in range(10_000):
        text = "".join(rng.choice(letters) for _ in range(rng.randrange(12)))
        assert tokenizer.decode(start + encode_plain(tokenizer, text)).strip(" ") == ("hi" + text).strip(" ")


# A protocol of one's own


class TestAProtocolOfOnesOwn:
    def search(self, query: str) -> str:
        """
        Search.

        Args:
            query: What to look for.
        """
        return f"found {query}"

    @pytest.mark.parametrize("name", ["my_protocol:WordProtocol", "words"])
    def test_it_is_spoken_by_the_trainer(self, tmp_path, monkeypatch, name):
        monkeypatch.setitem(TOOL_PROTOCOLS, "words", my_protocol.WordProtocol)
        seen = []

        def reward(completions, **kwargs):
            seen.extend(completions)
            return [float(len(text)) for text in completions]

        records, trainer, _ = rollout(
            tmp_path, [plan("ACALL search q!?c", (15, "xyzw"))], [self.search], 1, 2, tool_protocol=name, reward=reward
        )
        assert type(trainer._protocol) is my_protocol.WordProtocol
        for record, completion in zip(records, seen, strict=True):
            (call,) = record["tool_calls"]
            assert (call["name"], call["arguments"], call["result"]) == ("search", {"query": "q"}, "found q")
            head, told, tail = completion.split("|")
            assert (head, told) == ("ACALL search q!", "<result>found q</result>")
            assert tail[0] in "xyzw" and tail[1:] == "c"
            assert record["text"] == f"{head}{told}{tail}{END}"
        assert [record["kind"] for record in records] == ["initial", "fork"]

    def test_it_is_spoken_in_evaluation(self):
        tokenizer = character_tokenizer()
        model = ScriptedModel(tokenizer, [plan("ACALL search q!ok")]).eval()
        agent = Agent(model, tokenizer, [self.search], tool_protocol="my_protocol:WordProtocol")
        agent.generation_config.use_cache = False
        (row,) = agent.rollout([PROMPT])
        assert agent.completion(row, PROMPT) == "ACALL search q!|<result>found q</result>|ok"
        agent.close()

    @pytest.mark.parametrize(
        "name, words",
        [
            ("mine", f"set it to one of {', '.join(map(repr, TOOL_PROTOCOLS))}, or to a class of your own as 'my_"),
            ("mine:", "set it to one of"),
            (":Mine", "set it to one of"),
            (None, "set it to one of"),
            (["tags"], "set it to one of"),
            ("no_such_module:Mine", "cannot be imported (ModuleNotFoundError: No module named 'no_such_module')"),
            ("my_protocol:Mine", "cannot be imported (AttributeError"),
            (".:Mine", "cannot be imported (TypeError"),
            ("my_protocol:encode_plain", "is no tool protocol: make it a subclass of"),
            ("my_protocol:ToolCall", "is no tool protocol"),
            ("my_protocol:Unfinished", "lacks completion, result_ids, results_turn: a protocol has all methods of"),
        ],
    )
    def test_what_is_none_is_refused(self, tmp_path, name, words):
        with pytest.raises(ValueError) as caught:
            ARPOConfig(str(tmp_path), bf16=False, use_cpu=True, tool_protocol=name)
        assert f"`tool_protocol` is {name!r}" in str(caught.value) and words in str(caught.value)

    def test_its_reserved_names_are_held(self, tmp_path, tokenizer):
        def CALL(text: str) -> str:
            """
            Call.

            Args:
                text: Text.
            """
            return text

        with pytest.raises(ValueError, match="a tool named 'CALL'"):
            build_trainer(tokenizer, tmp_path, [CALL], tool_protocol="my_protocol:WordProtocol")

    def test_environments_need_structured_calls(self, tmp_path, tokenizer):
        with pytest.raises(
            ValueError, match="'my_protocol:WordProtocol' has no place for the tools of an environment"
        ):
            ARPOTrainer(
                tiny.build_model(tokenizer),
                args=ARPOConfig(str(tmp_path), bf16=False, use_cpu=True, tool_protocol="my_protocol:WordProtocol"),
                environment_factory=object,
            )

    def test_the_two_of_this_package_are_made_in_the_same_way(self, tokenizer):
        for name in ("chat_template", "tags"):
            protocol = protocol_class(name)(tokenizer, ["search"], lambda messages: [])
            assert isinstance(protocol, ToolProtocol) and protocol.tokenizer is tokenizer


# Templates that know no tools

PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
KNOWN = PLAIN.replace("{{ m.content }}", "{{ m.content }}{{ m.tool_calls }}{{ tools }}")


@pytest.fixture
def plain_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "plain")
    own = AutoTokenizer.from_pretrained(tmp_path / "plain")
    own.response_template, own.chat_template = None, PLAIN
    own.init_kwargs.pop("tool_protocol", None)
    return own


@pytest.mark.parametrize(
    "template, fault", [(PLAIN, "knows no tools"), (None, "is missing"), (KNOWN, "TRL can parse")]
)
def test_a_template_without_tools_is_one_error_everywhere(plain_tokenizer, tmp_path, template, fault):
    plain_tokenizer.chat_template = template
    told = []
    for attempt in (
        lambda: build_trainer(plain_tokenizer, tmp_path / "out"),
        lambda: Agent(tiny.build_model(plain_tokenizer), plain_tokenizer, [tiny.add]),
        lambda: check_chat_template(plain_tokenizer),
    ):
        with pytest.raises(ValueError) as caught:
            attempt()
        told.append(str(caught.value))
    assert told[0] == told[1] == told[2]
    assert fault in told[0] and "Set `tool_protocol='tags'`" in told[0]
    assert "end a turn with '<|im_end|>'" in told[0] and "qwen2_5, " in told[0] and "qwen3," in told[0]
    assert "llama3_1" not in told[0]


def test_both_ways_on_that_the_error_names_lead_on(plain_tokenizer, tmp_path):
    trainer = build_trainer(plain_tokenizer, tmp_path / "tags", tool_protocol="tags")
    assert isinstance(trainer._protocol, TagsProtocol)
    plain_tokenizer.chat_template = tiny.chat_template("qwen2_5.jinja")
    trainer = build_trainer(plain_tokenizer, tmp_path / "chat")
    assert isinstance(trainer._protocol, ChatTemplateProtocol)
    plain_tokenizer.chat_template = tiny.chat_template("qwen3.jinja")
    check_chat_template(plain_tokenizer, fine_tuning=True)


def test_looking_for_templates_leaves_the_tokenizer_as_it_is(plain_tokenizer):
    before = copy.deepcopy(plain_tokenizer.__dict__ | {"_tokenizer": None})
    with pytest.raises(ValueError):
        check_chat_template(plain_tokenizer)
    assert {**plain_tokenizer.__dict__, "_tokenizer": None} == before


def test_a_tokenizer_whose_end_no_template_has_is_told_of_tags_alone(plain_tokenizer):
    plain_tokenizer.eos_token = "<end>"
    with pytest.raises(ValueError) as caught:
        check_chat_template(plain_tokenizer)
    assert str(caught.value).endswith("Set `tool_protocol='tags'`.")


# The protocol that a checkpoint speaks


def warnings_of(attempt, name="arpo_trl.protocols.checkpoint"):
    told = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    try:
        attempt()
    finally:
        logger.removeHandler(handler)
    return told


def test_a_checkpoint_says_which_protocol_it_speaks(plain_tokenizer, tmp_path):
    assert checkpoint_protocol(plain_tokenizer) is None
    trainer = build_trainer(plain_tokenizer, tmp_path / "out", tool_protocol="tags")
    trainer.save_model(str(tmp_path / "saved"))
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert checkpoint_protocol(saved) == "tags"
    saved.chat_template = tiny.chat_template()
    model = tiny.build_model(saved)
    assert warnings_of(lambda: Agent(model, saved, [tiny.add], tool_protocol="tags").close()) == []
    (warning,) = warnings_of(lambda: Agent(model, saved, [tiny.add]).close())
    assert "`tool_protocol` is 'chat_template'" in warning and "Set `tool_protocol='tags'`" in warning
    assert warnings_of(lambda: build_trainer(saved, tmp_path / "other")) == [warning]
    assert checkpoint_protocol(saved) == "chat_template"


def test_a_model_without_tools_speaks_no_protocol(plain_tokenizer, tmp_path):
    mark_checkpoint(plain_tokenizer, "tags")
    settings = {"num_generations": 4, "num_initial_generations": 4, "per_device_train_batch_size": 4}
    assert warnings_of(lambda: build_trainer(plain_tokenizer, tmp_path, (), **settings)) == []
    assert checkpoint_protocol(plain_tokenizer) == "tags"
