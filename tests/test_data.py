import csv
import json
import random
import re
import sys
from pathlib import Path

import numpy
import pytest
import tiny
from datasets import Dataset

from arpo_trl.data import (
    CHAT_SYSTEM_PROMPT,
    TOOL_SCHEMAS,
    convert_rl_row,
    load_cold_start,
    load_rl,
    repair_answer,
    repair_counts,
    repair_text,
    report,
    sharegpt_messages,
    suspect_truths,
    tags_sft_features,
    trace_messages,
    unread_truths,
)
from arpo_trl.data.files import read_rows, to_dataset
from arpo_trl.evaluation.benchmarks import load_benchmark

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

DATA = Path(__file__).parents[1] / ".." / "shared" / "data"
TRAIN = DATA / "arpo_rl_reasoning_10k.parquet"
needs_data = pytest.mark.skipif(not TRAIN.is_file(), reason=f"{TRAIN.name} is not there")

TRACE = (
    "<think>Who?</think><search> capital of France </search><result> Paris <|im_end|> <think>x</think> </result>\n"
    "<think>Add.</think>\n<python>\nprint(1)\n  </python>\n<result>\n1\n</result>"
    r"<think>Done.</think><answer>It is \boxed{Paris}.</answer>"
)


def rl_row(**fields) -> dict:
    row = {
        "data_source": "set",
        "prompt": [
            {"role": "system", "content": "Put it in \\[ \x08oxed{answer} \\]."},
            {"role": "user", "content": "What is \x0crac{4}{2}?"},
        ],
        "ability": "math",
        "reward_model": {"ground_truth": " 2,", "style": "rule"},
        "extra_info": {"index": 7},
        "metadata": None,
    }
    return row | fields


# Repairs


@pytest.mark.parametrize(
    ("damaged", "repaired", "repairs"),
    [
        ("in \x08oxed{}", r"in \boxed{}", 1),
        ("\x08oxed{\x0crac{1}{2}}", r"\boxed{\frac{1}{2}}", 2),
        ("\x08egin{cases}", r"\begin{cases}", 1),
        ("in\x0cfinite di\x0bfference", "infinite difference", 1),
        ("a\r\nb\rc", "a\nb\nc", 1),
        ("a\xa0b\u200bc", "a bc", 2),
        ("tab\tand\nline stay, and so does é", "tab\tand\nline stay, and so does é", 0),
    ],
)
def test_repair_text(damaged, repaired, repairs):
    text, names = repair_text(damaged)
    assert text == repaired
    assert len(names) == repairs
    assert repair_text(text) == (text, [])


@pytest.mark.parametrize(
    ("damaged", "repaired"),
    [
        (" 2 ", "2"),
        ("\n(1, 2)\n", "(1, 2)"),
        ("0.2,", "0.2"),
        ("1986.\n\\end{aligned}", "1986"),
        (r"\begin{cases} a \end{cases}", r"\begin{cases} a \end{cases}"),
        (r"3\\%", r"3\%"),
        (r"a \\ b", r"a \\ b"),
        (r"\$950", r"\$950"),
        (" ", ""),
    ],
)
def test_repair_answer(damaged, repaired):
    assert repair_answer(damaged)[0] == repaired
    assert repair_answer(repaired) == (repaired, [])


# Reinforcement learning


def test_rl_row_for_both_protocols():
    tags = convert_rl_row(rl_row())
    assert tags["prompt"][0]["content"] == r"Put it in \[ \boxed{answer} \]."
    assert tags["prompt"][1] == {"role": "user", "content": r"What is \frac{4}{2}?"}
    assert (tags["answer"], tags["ability"], tags["data_source"], tags["index"]) == ("2", "math", "set", 7)
    assert tags["question"] == r"What is \frac{4}{2}?"
    assert tags["repairs"] == [
        r"system message: `\x08oxed` → `\boxed`",
        r"user message: `\x0crac` → `\frac`",
        "ground truth: white space around it removed",
        "ground truth: comma at its end removed",
    ]
    chat = convert_rl_row(rl_row(), protocol="chat_template")
    assert chat["prompt"][0] == {"role": "system", "content": CHAT_SYSTEM_PROMPT}
    assert "<search>" not in CHAT_SYSTEM_PROMPT
    assert chat["prompt"][1] == tags["prompt"][1]
    with pytest.raises(ValueError, match="protocol='xml' is unknown"):
        convert_rl_row(rl_row(), protocol="xml")


def test_rl_row_with_several_truths_keeps_them_all():
    row = rl_row(reward_model={"ground_truth": ["Paris ", "Lutetia"]}, ability="qa")
    assert convert_rl_row(row)["answer"] == ["Paris", "Lutetia"]


@pytest.mark.parametrize(
    ("truth", "expected"),
    [
        ("Paris", "Paris"),
        ({"target": ["Paris", "City of Paris"]}, ["Paris", "City of Paris"]),
        ({"target": numpy.array(["Paris"], dtype=object)}, ["Paris"]),
        ({"target": "Paris"}, ["Paris"]),
        ({"answers": ["Paris"], "target": None}, ["Paris"]),
        ({"ground_truth": ["Paris"]}, ["Paris"]),
        (numpy.array(["Paris", "Lutetia"], dtype=object), ["Paris", "Lutetia"]),
        ([["Paris"], "Lutetia"], ["Paris", "Lutetia"]),
        ('["Paris", "Lutetia"]', ["Paris", "Lutetia"]),  # Skywork's lists are JSON
        ('{"target": ["Paris"]}', ["Paris"]),
        ('{"inputs": ["1"], "outputs": ["2"]}', '{"inputs": ["1"], "outputs": ["2"]}'),  # PRIME's tests of programs
        ("[1, 2]", "[1, 2]"),  # an interval
        (5, "5"),
        (5.5, "5.5"),
        (None, ""),
        ([], []),
    ],
    ids=str,
)
def test_a_ground_truth_of_any_published_shape_is_the_listed_answers(truth, expected):
    from arpo_trl.rewards import arpo_reward

    row = convert_rl_row(rl_row(reward_model={"style": "rule", "ground_truth": truth}, ability="fact-reasoning"))
    assert row["answer"] == expected
    columns = {"answer": [row["answer"]] * 2, "ability": [row["ability"]] * 2}
    says = [rf"<think>t</think><answer>\boxed{{{answer}}}</answer>" for answer in ("Paris", "target")]
    assert arpo_reward(says, **columns) == [float("Paris" in expected), 0.0] if expected else [None, None]


def test_parquet_of_search_r1_holds_the_listed_answers(tmp_path):
    rows = [rl_row(reward_model={"ground_truth": {"target": [name]}}, metadata="m") for name in ("Paris", "Rome")]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    assert load_rl(tmp_path / "rows.parquet")["answer"] == [["Paris"], ["Rome"]]


@pytest.mark.parametrize(
    ("truths", "expected"),
    [
        (["004", ["a", "b"]], [["004"], ["a", "b"]]),
        (["1e5", "true"], ["1e5", "true"]),
        ([5, "x"], ["5", "x"]),
        ([5, 5.5], ["5", "5.5"]),
        ([None, "5"], ["", "5"]),
        ([None, ["5"]], [[], ["5"]]),
        ([{"target": ["a"]}, "b"], [["a"], ["b"]]),
        ([10**30, 1], [str(10**30), "1"]),
    ],
    ids=str,
)
def test_truths_of_several_types_in_one_column_are_kept_as_written(tmp_path, truths, expected):
    from common import load_questions

    rl = write_jsonl(tmp_path / "rl.jsonl", [rl_row(reward_model={"ground_truth": truth}) for truth in truths])
    assert load_rl(rl)["answer"] == expected
    assert load_questions(str(rl), "train")["answer"] == expected
    rows = [{"prompt": "q", "answer": truth} for truth in truths]
    questions = load_questions(str(write_jsonl(tmp_path / "q.jsonl", rows)), "train")
    assert questions["answer"] == [None if answer == "" else answer for answer in expected]


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"reward_model": None}, "`reward_model` is 'None': expected a dict that holds"),
        ({"reward_model": {"style": "rule"}}, "expected a dict that holds the accepted answers under `ground_truth`"),
        ({"reward_model": {"ground_truth": {"target": 98, "numbers": [1]}}}, "keys 'target', 'numbers', which do not"),
        ({"prompt": None}, "`prompt` is 'None': expected a list of messages"),
        ({"prompt": []}, "`prompt` is '.*': expected a list of messages"),
        ({"prompt": ["q"]}, "`prompt` holds the message 'q': expected a role and a content, both text"),
        ({"prompt": [{"role": "user", "content": 5}]}, "expected a role and a content, both text"),
    ],
)
def test_a_row_that_cannot_be_converted_is_named(tmp_path, fields, told):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(rl_row()) + "\n\n" + json.dumps(rl_row(**fields)) + "\n")
    with pytest.raises(ValueError, match=f"rows.jsonl, line 3: .*{told}"):
        load_rl(path)
    Dataset.from_list([rl_row(metadata="m")]).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "list.json").write_text(json.dumps([rl_row(), rl_row(**fields)]))
    with pytest.raises(ValueError, match=f"list.json, row 1: .*{told}"):
        load_rl(tmp_path / "list.json")


def test_load_rl_from_every_kind_of_file(tmp_path):
    rows = Dataset.from_list([rl_row(metadata="m")] * 3)
    rows.to_parquet(tmp_path / "rows.parquet")
    rows.to_json(tmp_path / "rows.jsonl")
    for name in ("rows.parquet", "rows.jsonl"):
        loaded = load_rl(str(tmp_path / name))
        assert set(loaded.column_names) == {"prompt", "answer", "question", "ability", "data_source", "index"}
        assert loaded["answer"] == ["2", "2", "2"]
        assert loaded[0]["prompt"][0]["content"] == r"Put it in \[ \boxed{answer} \]."
    (tmp_path / "rows.csv").write_text("a")
    with pytest.raises(ValueError, match="unknown suffix '.csv': use .parquet, .json or .jsonl"):
        load_rl(tmp_path / "rows.csv")
    with pytest.raises(ValueError, match="lacks the columns ability, data_source, prompt, reward_model"):
        Dataset.from_list([{"a": 1}]).to_json(tmp_path / "other.jsonl")
        load_rl(tmp_path / "other.jsonl")


def test_a_name_that_is_no_file_is_looked_for_on_the_hub(monkeypatch):
    asked = []

    def load_dataset(path, split):
        asked.append((path, split))
        return Dataset.from_list([rl_row(metadata="m")])

    monkeypatch.setattr("arpo_trl.data.sources.load_dataset", load_dataset)
    assert load_rl("someone/some-set", split="validation")["answer"] == ["2"]
    assert asked == [("someone/some-set", "validation")]


@needs_data
def test_all_published_rows_convert():
    for protocol in ("tags", "chat_template"):
        rows = load_rl(TRAIN, protocol)
        assert len(rows) == 10_000
        assert sum(name == "math" for name in rows["ability"]) == 5_000
        assert [row["role"] for row in rows[0]["prompt"]] == ["system", "user"]
        text = json.dumps(rows["prompt"][:]) + json.dumps(rows["answer"][:])
        assert "\\b" not in text.replace("\\\\", "")  # no backspace in any string
        assert "\\f" not in text.replace("\\\\", "")
        assert r"\\boxed{" in text
        assert [i for i, answer in enumerate(rows["answer"]) if answer != answer.strip() or not answer] == [5274]


@needs_data
def test_every_published_truth_scores_one_against_itself_but_the_empty_one():
    pytest.importorskip("math_verify")
    from arpo_trl.rewards import exact_match_reward, math_reward

    rows = load_rl(TRAIN)
    for ability, reward in (("math", math_reward), ("qa", exact_match_reward)):
        answers = [row["answer"] for row in rows if row["ability"] == ability]
        completions = [rf"<think></think><answer>\boxed{{{answer}}}</answer>" for answer in answers]
        rewards = reward(completions, answer=answers)
        assert [answer for answer, value in zip(answers, rewards, strict=True) if value != 1] == (
            [""] if ability == "math" else []
        )


@needs_data
def test_published_numbers_are_not_their_negatives():
    pytest.importorskip("math_verify")
    from arpo_trl.rewards import math_reward

    truths = [row["answer"] for row in load_rl(TRAIN) if row["ability"] == "math"][::8]
    numbers = [truth for truth in truths if truth.removeprefix("-").replace(".", "").strip("0").isdigit()]
    assert len(numbers) > 300
    negated = [number[1:] if number.startswith("-") else f"-{number}" for number in numbers]
    completions = [rf"<answer>\boxed{{{number}}}</answer>" for number in negated]
    assert math_reward(completions, answer=numbers) == [0.0] * len(numbers)


@needs_data
def test_docs_show_what_was_repaired_and_what_is_not_read():
    """The tables of docs/data.md, checked on the rows they name and on a sample of all others."""
    pytest.importorskip("math_verify")
    docs = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    rows = list(Dataset.from_parquet(str(TRAIN)))
    for name, count in repair_counts(rows).items():
        assert f"| {name} | {count:,} |" in docs
    for index, answer in suspect_truths(rows):
        assert f"| {index} | `{answer}` |" in docs
    assert "Accepted against itself as mathematics: 4,973 of 5,000." in docs
    unread = docs.partition("The others:")[2].partition("Damaged at the source")[0]
    listed = [int(line.split("|")[1]) for line in unread.splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert len(listed) == 27
    assert [index for index, *_ in unread_truths([rows[i] for i in listed])] == listed
    assert {index for index, *_ in unread_truths(rows[::10])} <= set(listed)


def test_report_names_row_truth_outcome_and_reason(tmp_path):
    pytest.importorskip("math_verify")
    truths = ["2", "(37", "", r"\{x|x=2k\}"]
    rows = [
        rl_row(reward_model={"ground_truth": truth}, extra_info={"index": i}, metadata="m")
        for i, truth in enumerate(truths)
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    text = report(tmp_path / "rows.parquet")
    assert "4 rows, 4 of mathematics" in text
    assert r"| system message: `\x08oxed` → `\boxed` | 4 |" in text
    assert "as mathematics: 1 of 4.\nThe others:" in text
    assert "| 1 | `(37` | accepted as text | cut off at the source |" in text
    assert "| 2 | (empty) | not scored | empty at the source |" in text
    assert r"| 3 | `\{x\|x=2k\}` | accepted as text | set in builder notation |" in text
    assert text.endswith("| 1 | `(37` |")


# Cold start


def test_both_spellings_of_a_turn():
    published = {
        "system": "Put it in \x08oxed{}.",
        "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
    }
    other = {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert sharegpt_messages(published) == [{"role": "system", "content": r"Put it in \boxed{}."}, *turns]
    assert sharegpt_messages(other | {"system": None}) == turns
    mixed = [{"from": "human", "value": "q", "role": None}, {"role": "assistant", "content": "a", "from": None}]
    assert sharegpt_messages({"conversations": mixed}) == turns
    twice = [{"from": "system", "value": "again"}, *published["conversations"]]
    assert sharegpt_messages(published | {"conversations": twice}) == sharegpt_messages(published)
    with pytest.raises(ValueError, match="role 'observation'"):
        sharegpt_messages({"conversations": [{"from": "observation", "value": "x"}]})


def test_trace_becomes_calls_and_results():
    assert trace_messages(TRACE) == [
        {
            "role": "assistant",
            "content": "<think>Who?</think>",
            "tool_calls": [
                {"type": "function", "function": {"name": "search", "arguments": {"query": "capital of France"}}}
            ],
        },
        {"role": "tool", "name": "search", "content": "Paris <|im_end|> <think>x</think>"},
        {
            "role": "assistant",
            "content": "<think>Add.</think>",
            "tool_calls": [{"type": "function", "function": {"name": "python", "arguments": {"code": "print(1)"}}}],
        },
        {"role": "tool", "name": "python", "content": "1"},
        {"role": "assistant", "content": "<think>Done.</think>\n\nIt is \\boxed{Paris}."},
    ]
    overshot = trace_messages("<search>q</search><<result>r</result>a")
    assert overshot == trace_messages("<search>q</search><result>r</result>a")
    call, told, said = trace_messages(
        "<python>\n    for i in (1, 2):\n        print(i)\n</python><result>\n   a  b\n0  1  "
        "2\n</result><answer>3</answer>"
    )
    assert call["tool_calls"][0]["function"]["arguments"] == {"code": "for i in (1, 2):\n    print(i)"}
    assert (told["content"], said["content"]) == ("   a  b\n0  1  2", "3")
    assert trace_messages("just text") == [{"role": "assistant", "content": "just text"}]
    assert trace_messages("a <result> in text </result>") == [
        {"role": "assistant", "content": "a <result> in text </result>"}
    ]


def write_cold_start(folder: Path) -> Path:
    rows = [
        {
            "system": "Use <search>.",
            "conversations": [{"from": "human", "value": "Capital?"}, {"from": "gpt", "value": TRACE}],
        },
        {
            "system": "Use <search>.",
            "conversations": [
                {"from": "human", "value": "One?"},
                {"from": "gpt", "value": r"<think>a</think><answer>\boxed{1}</answer>"},
                {"from": "human", "value": "Two?"},
                {"from": "gpt", "value": r"<think>b</think><answer>\boxed{2}</answer>"},
            ],
        },
    ]
    path = folder / "sft.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def text_under_loss(tokenizer, ids, mask) -> str:
    return tokenizer.decode([token for token, own in zip(ids, mask, strict=True) if own])


def test_tags_features_put_loss_on_model_text_alone(tokenizer, tmp_path):
    rows = load_cold_start(write_cold_start(tmp_path))
    assert [row["messages"][-1]["content"][-10:] for row in rows] == [TRACE[-10:], "}</answer>", "}</answer>"]
    assert [len(row["messages"]) for row in rows] == [3, 3, 5]
    features = tags_sft_features(tokenizer, rows[0]["messages"])
    ids, mask = features["input_ids"], features["completion_mask"]
    learned = text_under_loss(tokenizer, ids, mask)
    first, rest = TRACE.split("<result>", 1)
    second, last = rest.split("</result>", 1)[1].split("<result>", 1)
    assert learned == first + second + last.split("</result>", 1)[1] + "<|im_end|>"
    prompt = tokenizer.apply_chat_template(rows[0]["messages"][:-1], add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(ids) == prompt + TRACE + "<|im_end|>"
    # the page's "<|im_end|>" is text: the only end of turn after the prompt is the last token
    assert ids[mask.index(1) :].count(tokenizer.eos_token_id) == 1
    assert mask[-1] == 1


def test_tags_features_are_the_tokens_of_a_rollout(tokenizer):
    """A trace cut where the protocol cuts it: model text and result encoded apart."""
    from arpo_trl.protocols import TagsProtocol
    from arpo_trl.tools import ToolCall

    result = TagsProtocol(tokenizer, ["search"]).result_ids([ToolCall("search", result="Paris <|im_end|>")])
    question = [{"role": "user", "content": "q"}]
    text = "<search>q</search><result>Paris <|im_end|></result>so"
    features = tags_sft_features(tokenizer, [*question, {"role": "assistant", "content": text}])
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)["input_ids"]
    called, said = tokenizer.encode("<search>q</search>"), tokenizer.encode("so")
    assert features["input_ids"] == [*prompt, *called, *result, *said, tokenizer.eos_token_id]
    with pytest.raises(ValueError, match="last message must be the assistant turn"):
        tags_sft_features(tokenizer, question)


def sft_labels(tokenizer, dataset, folder, **options) -> list[str]:
    """What TRL's SFTTrainer puts loss on, as text."""
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(str(folder), report_to="none", use_cpu=True, max_length=None, packing=False, **options)
    trainer = SFTTrainer(
        tiny.build_model(tokenizer, layers=1), args, train_dataset=dataset, processing_class=tokenizer
    )
    batch = next(iter(trainer.get_train_dataloader()))
    return [tokenizer.decode([label for label in row.tolist() if label != -100]) for row in batch["labels"]]


def test_sft_trainer_learns_no_tool_output_in_either_protocol(tokenizer, tmp_path):
    path = write_cold_start(tmp_path)
    tags = load_cold_start(path).select([0])
    features = tags.map(lambda row: tags_sft_features(tokenizer, row["messages"]), remove_columns=["messages"])
    [learned] = sft_labels(tokenizer, features, tmp_path / "tags", completion_only_loss=True)
    assert r"<search> capital of France </search>" in learned and r"\boxed{Paris}" in learned
    assert "<result>" not in learned and "Capital?" not in learned

    chat = load_cold_start(path, protocol="chat_template").select([0])
    assert chat[0]["messages"][0]["content"] == CHAT_SYSTEM_PROMPT
    assert chat[0]["messages"][2:] == trace_messages(TRACE)  # no argument of the other tool slips in as None
    assert json.loads(chat[0]["tools"]) == TOOL_SCHEMAS
    [learned] = sft_labels(tokenizer, chat, tmp_path / "chat", assistant_only_loss=True)
    assert '{"name": "search", "arguments": {"query": "capital of France"}}' in learned
    assert r"\boxed{Paris}" in learned
    assert "tool_response" not in learned and "<think>x</think>" not in learned and "Capital?" not in learned


def test_load_cold_start_refuses_what_it_is_not(tmp_path):
    Dataset.from_list([{"messages": []}]).to_json(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match="no column `conversations`"):
        load_cold_start(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match="protocol='xml' is unknown"):
        load_cold_start(write_cold_start(tmp_path), protocol="xml")


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": None},
        {"conversations": ["q"]},
        {"conversations": [{"from": "human", "value": 5}]},
        {"conversations": [{"from": ["human"], "value": "q"}]},
        {"system": 5, "conversations": []},
    ],
)
def test_a_cold_start_row_that_cannot_be_converted_is_named(tmp_path, row):
    path = write_jsonl(
        tmp_path / "rows.jsonl", [json.loads(write_cold_start(tmp_path).read_text().split("\n")[0]), row]
    )
    with pytest.raises(ValueError, match="rows.jsonl, line 2: .*expected"):
        load_cold_start(path)


# Damaged files


def test_marks_and_halves_of_characters_in_text_files(tmp_path):
    path = tmp_path / "rows.jsonl"
    text = json.dumps(rl_row(data_source="\ud83d and \ude00, \U0001f600"))
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load_rl(path)["data_source"] == ["\ufffd and \ufffd, \U0001f600"]
    path.write_bytes(text.encode("utf-16"))
    with pytest.raises(ValueError, match="rows.jsonl, line 1 is no UTF-8 text .*: save the file as UTF-8"):
        load_rl(path)


def test_fields_of_a_csv_file_may_be_long(tmp_path):
    limit = csv.field_size_limit()
    path = tmp_path / "rows.csv"
    path.write_text('\ufeffquestion,answer\n"' + "x" * 200_000 + '\u2028\r\n",1\n', encoding="utf-8", newline="")
    assert read_rows(path) == [{"question": "x" * 200_000 + "\u2028\r\n", "answer": "1"}]
    assert csv.field_size_limit() == limit
    path.write_text("question,answer\nWho, then?,1\n")
    with pytest.raises(ValueError, match="rows.csv, line 2 has more fields than the header: put quotes"):
        read_rows(path)


def test_a_column_of_several_types_is_named(tmp_path):
    rows = [{"prompt": "q", "answer": "1", "level": "easy"}, {"prompt": "q", "answer": "1", "level": 3}]
    with pytest.raises(ValueError, match="rows.jsonl: the values of the column `level` are not of one type"):
        to_dataset(rows, tmp_path / "rows.jsonl")


def test_json_that_is_nested_without_end_is_told(tmp_path):
    path = tmp_path / "rows.jsonl"
    for text in ("[" * 100_000, '{"a":' * 900 + "1" + "}" * 900, "9" * 5000, "{}" * 2, "3"):
        path.write_text(text)
        with pytest.raises(ValueError, match="rows.jsonl"):
            load_rl(path)


def test_a_damaged_file_is_one_clear_error_at_worst(tmp_path):
    """Random damage to files of each kind: either the file still loads, or the error names it."""
    rng = random.Random(0)
    junk = [
        b"null",
        b"1e999",
        b"[]",
        b"{}",
        b"[[",
        rb'"\ud800"',
        b"\xff",
        b"\x00",
        b"\xef\xbb\xbf",
        b"[null]",
        b'{"a":1}',
    ]
    junk += [b'"', b"\n", b"\r", b",", b"true", b"9" * 5000, b"-", b'{"target":[1,2.5,null]}', b"9" * 23]
    Dataset.from_list([rl_row(metadata="m")] * 2).to_parquet(tmp_path / "seed.parquet")
    rl = "\n".join(json.dumps(rl_row(reward_model={"ground_truth": truth})) for truth in ("1", ["a", "b"])).encode()
    seeds = [
        (".jsonl", rl, load_rl),
        (".json", b"[" + rl.replace(b"\n", b",") + b"]", load_rl),
        (".parquet", (tmp_path / "seed.parquet").read_bytes(), load_rl),
        (".jsonl", write_cold_start(tmp_path).read_bytes(), load_cold_start),
        (".csv", b'question,answer\n"A, b?",#### 1\nB?,2\n', lambda path: load_benchmark("gsm8k", path)),
        (".jsonl", b'{"question": "A?", "answer": "#### 1"}\n' * 2, lambda path: load_benchmark("gsm8k", path)),
    ]
    loaded = 0
    for number in range(1200):
        suffix, data, load = seeds[number % len(seeds)]
        path = tmp_path / f"rows{suffix}"
        start = rng.randrange(len(data))
        inserted = rng.choice([*junk, bytes([rng.randrange(256)]), b""])
        if number >= len(seeds):  # the first ones are whole
            values = list(re.finditer(rb'"[^"\\]*"|\d+|\n', data))
            found = rng.choice(values) if values and rng.random() < 0.5 else None
            start, end = found.span() if found else (start, start + rng.randrange(3))
            data = data[:start] + inserted + data[end:]
        path.write_bytes(data)
        try:
            load(path)
            loaded += 1
        except ValueError as error:
            assert number >= len(seeds) and str(path) in str(error), error
    assert 100 < loaded < 1100


# The recipe for cold-start data


def sampled(scores, answers, calls=None, truncated=None, errors=None) -> dict:
    calls = calls or [["a"]] * len(scores)
    errors = errors or [None] * len(scores)
    return {
        "index": 0,
        "scores": scores,
        "truncated": truncated or [False] * len(scores),
        "completions": [[{"role": "assistant", "content": answer}] for answer in answers],
        "tool_calls": [
            [{"name": "search", "arguments": {"query": query}, "error": error} for query in queries]
            for queries, error in zip(calls, errors, strict=True)
        ],
    }


@pytest.mark.parametrize(
    ("record", "keep", "expected"),
    [
        (sampled([0, 1, 1.1], ["a", "b", "c"]), 9, [1, 2]),
        (sampled([1, 1, 1], ["same", "same", "other"]), 9, [0, 2]),  # each trace once
        (sampled([1, 1], ["longer", "short"]), 1, [1]),
        (
            sampled([1, 1, 1], ["1", "22", "333"], [["a"], ["a"], ["b"]]),
            2,
            [0, 2],
        ),  # other calls before a third wording
        (sampled([1, 1], ["a", "b"], truncated=[True, False]), 9, [1]),
        (sampled([1, 1], ["a", "b"], errors=["timed out", None]), 9, [1]),
        (sampled([1, 1], ["a", "b"], calls=[[], ["a"]]), 9, [1]),
        (sampled([0.9], ["a"]), 9, []),
    ],
)
def test_rejection_sampling_keeps_right_traces_that_differ(record, keep, expected):
    from make_cold_start_data import select

    assert select(record, min_score=1.0, min_calls=1, keep=keep) == expected


def test_a_trace_that_could_not_be_scored_is_not_kept():
    from make_cold_start_data import select

    record = {"completions": ["a", "b"], "scores": [None, 1.0], "truncated": [False] * 2, "tool_calls": [[], []]}
    assert select(record, min_score=1.0, min_calls=0, keep=2) == [1]


def memorise(tokenizer, conversations: list[list[dict]], steps: int = 120):
    """A model that has learnt these conversations of the tags protocol by heart, from the features that we make."""
    import torch

    model = tiny.build_model(tokenizer, layers=1)
    rows = [tags_sft_features(tokenizer, messages) for messages in conversations]
    length = max(len(row["input_ids"]) for row in rows)
    input_ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    labels = torch.full((len(rows), length), -100)
    for i, row in enumerate(rows):
        ids, mask = torch.tensor(row["input_ids"]), torch.tensor(row["completion_mask"])
        input_ids[i, : len(ids)] = ids
        labels[i, : len(ids)] = ids.masked_fill(mask == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = model(input_ids=input_ids, labels=labels, attention_mask=input_ids != tokenizer.pad_token_id).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_recipe_samples_keeps_right_traces_and_writes_what_sft_learns(tokenizer, tmp_path):
    """A model that knows the answers to two questions and is wrong about a third."""
    from make_cold_start_data import ColdStartDataArguments, main
    from sft_cold_start import load_traces

    known = []
    for a, b, answer in [(1, 2, 3), (4, 4, 8), (2, 5, 1)]:
        trace = (
            f'<think>Add.</think><add>{{"a": {a}, "b": {b}}}</add><result>{a + b}</result>'
            f"<think>So.</think><answer>\\boxed{{{answer}}}</answer>"
        )
        known.append(tiny.question(a, b) + [{"role": "assistant", "content": trace}])
    memorise(tokenizer, known).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    questions = [{"prompt": messages[:1], "answer": answer} for messages, answer in zip(known, "387", strict=True)]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    args = ColdStartDataArguments(
        model_name_or_path=str(tmp_path / "model"),
        dataset_name=str(tmp_path / "questions.jsonl"),
        tools=["tiny.add"],
        num_generations=4,
        min_calls=1,
        max_completion_length=120,
        temperature=0.2,
        output_path=str(tmp_path / "traces.jsonl"),
    )
    kept = main(args)
    assert [row["messages"] for row in kept] == known[:2]
    written = load_traces(args.output_path, protocol="tags")
    assert written["messages"][:] == known[:2]
    features = written.map(lambda row: tags_sft_features(tokenizer, row["messages"]), remove_columns="messages")
    learned = sft_labels(tokenizer, features, tmp_path / "sft", completion_only_loss=True)
    assert all("<add>" in text and "</answer>" in text and "<result>" not in text for text in learned)

    samples = Path(f"{args.output_path}.samples.jsonl")
    before = samples.read_text()
    assert len(before.splitlines()) == 3 * 4, "a line a completion"
    assert main(args) == kept
    assert samples.read_text() == before  # started again, it asks nothing again


def test_recipe_writes_calls_and_tool_schemas_for_the_chat_template(tokenizer, tmp_path):
    from types import SimpleNamespace

    from make_cold_start_data import ColdStartDataArguments, traces
    from sft_cold_start import load_traces

    conversation = tiny.conversation(1, 2)
    conversation[2]["content"] = "3 <|im_end|> <tool_call>"
    record = {
        "index": 0,
        "scores": [1.0],
        "truncated": [False],
        "completions": [conversation[1:]],
        "tool_calls": [[{"name": "add", "arguments": {"a": 1, "b": 2}, "error": None}]],
    }
    agent = SimpleNamespace(tokenizer=tokenizer, tools={"add": tiny.add})
    args = ColdStartDataArguments(tool_protocol="chat_template")
    [row] = traces([record], [conversation[:1]], agent, args)
    assert row["messages"][2]["content"].replace("\u200b", "") == "3 <|im_end|> <tool_call>"
    assert json.loads(row["tools"])[0]["function"]["name"] == "add"
    (tmp_path / "traces.jsonl").write_text(json.dumps(row))
    written = load_traces(str(tmp_path / "traces.jsonl"), protocol="chat_template")
    [learned] = sft_labels(tokenizer, written, tmp_path / "sft", assistant_only_loss=True)
    # two turns, two ends: the one in the tool's answer is plain text and carries no loss
    assert learned.count("<|im_end|>") == 2
    assert '"arguments": {"a": 1, "b": 2}' in learned and "It is 3." in learned and "tool_response" not in learned
