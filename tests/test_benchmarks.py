"""The loaders of the 13 benchmarks, each on a hand-made file in the published format with odd rows in it."""

import base64
import csv
import json
from pathlib import Path

import pytest
from datasets import Dataset, Features, Image, Value

from arpo_trl.evaluation import benchmarks
from arpo_trl.evaluation.benchmarks import BENCHMARKS, decrypt_row, find_source, load_benchmark, scorers, system_prompt


def encrypt(text: str, key: str) -> str:
    """As xbench writes it."""
    data, mask = text.encode(), key.encode()
    return base64.b64encode(bytes(byte ^ mask[i % len(mask)] for i, byte in enumerate(data))).decode()


CANARY = "a canary key"

# name → rows of a file, and the (question, accepted answers) that come of them
PUBLISHED = {
    "aime24": (
        [
            {"id": 60, "problem": "Find $n$.", "solution": "…", "answer": "033", "url": "https://…", "year": "2024"},
            {"id": 61, "problem": "  Find $m$.\n", "solution": "…", "answer": 204, "url": None, "year": "2024"},
        ],
        [("Find $n$.", ["033"]), ("Find $m$.", ["204"])],
    ),
    "aime25": (
        [{"problem": "Bases?", "answer": "70", "id": "0"}, {"problem": "Area?", "answer": 588.0, "id": "1"}],
        [("Bases?", ["70"]), ("Area?", ["588"])],
    ),
    "math500": (
        [
            {"problem": "Polar?", "solution": "…", "answer": "\\left( 3, \\frac{\\pi}{2} \\right)", "level": 2},
            {"question": "In the authors' copy?", "answer": "p - q"},
            {"problem": "No answer column?", "solution": "So it is $\\boxed{\\frac{1}{2}}$."},
        ],
        [
            ("Polar?", ["\\left( 3, \\frac{\\pi}{2} \\right)"]),
            ("In the authors' copy?", ["p - q"]),
            ("No answer column?", ["\\frac{1}{2}"]),
        ],
    ),
    "gsm8k": (
        [
            {"question": "Eggs?", "answer": "16 - 3 = <<16-3=13>>13.\n#### 13"},
            {"question": "Dollars?", "answer": "A lot.\n#### 1,080"},
            {"question": "Below zero?", "answer": "Cold.\n####-7 "},
            {"question": "Prepared by somebody?", "answer": 18},
        ],
        [("Eggs?", ["13"]), ("Dollars?", ["1080"]), ("Below zero?", ["-7"]), ("Prepared by somebody?", ["18"])],
    ),
    "math": (
        [
            {
                "problem": "Solve.",
                "level": "Level 1",
                "type": "Algebra",
                "solution": "First \\boxed{1}, then \\boxed{x^{2}}.",
            },
            {"problem": "Broken?", "level": "Level ?", "type": "Geometry", "solution": "It is \\boxed{3"},
        ],
        [("Solve.", ["x^{2}"]), ("Broken?", [])],
    ),
    "hotpotqa": (
        [
            {"id": "dev_0", "question": "Who?", "golden_answers": ["Frank Lowy"], "metadata": {"type": "bridge"}},
            {"_id": "5a8b", "question": "Yes or no?", "answer": "yes", "supporting_facts": [["Ed Wood", 0]]},
        ],
        [("Who?", ["Frank Lowy"]), ("Yes or no?", ["yes"])],
    ),
    "2wiki": (
        [
            {"id": "dev_0", "question": "Where?", "golden_answers": ["New York City", "NYC", "New York City", ""]},
            {"_id": "8813", "question": "Which film?", "answer": "Hypocrite", "answer_id": None, "evidences": []},
        ],
        [("Where?", ["New York City", "NYC"]), ("Which film?", ["Hypocrite"])],
    ),
    "musique": (
        [
            {
                "id": "2hop__1",
                "question": "Country?",
                "answer": "US",
                "answer_aliases": ["USA", "US"],
                "answerable": True,
            },
            {"id": "2hop__2", "question": "When?", "answer": "1989", "answer_aliases": [], "answerable": True},
            {"id": "dev_2", "question": "FlashRAG's?", "golden_answers": ["Green"]},
        ],
        [("Country?", ["US", "USA"]), ("When?", ["1989"]), ("FlashRAG's?", ["Green"])],
    ),
    "bamboogle": (
        [{"Question": "President?", "Answer": "James Madison"}, {"question": "Year?", "golden_answers": [1812]}],
        [("President?", ["James Madison"]), ("Year?", ["1812"])],
    ),
    "gaia": (
        [
            {"task_id": "a", "Question": "Zip code?", "Level": "2", "Final answer": "34689", "file_name": ""},
            {"task_id": "b", "Question": "In the sheet?", "Level": 1, "Final answer": "4", "file_name": "b.xlsx"},
            {"task_id": "c", "Question": "Private?", "Level": 3, "Final answer": "?", "file_name": None},
            {"id": 1, "task_id": "d", "Question": "The authors' copy?", "answer": "a, b", "Level": "2"},
        ],
        [("Zip code?", ["34689"]), ("Private?", []), ("The authors' copy?", ["a, b"])],
    ),
    "hle": (
        [
            {"id": "1", "question": "Which?\nA. x\nB. y", "image": "", "answer": "B", "answer_type": "multipleChoice"},
            {"id": "2", "question": "What is shown?", "image": "data:image/jpeg;base64,…", "answer": "A cat"},
            {"id": "3", "question": "Value?", "image": None, "answer": "$\\sqrt{2}$", "answer_type": "exactMatch"},
        ],
        [("Which?\nA. x\nB. y", ["B"]), ("Value?", ["$\\sqrt{2}$"])],
    ),
    "webwalker": (
        [
            {"question": "Deadline?", "answer": "March 21, 2025.", "root_url": "https://…", "info": {"hop": "multi"}},
            {"Question": "截止日期？", "Answer": "10月27日", "Root_Url": "https://…", "Info": None},
        ],
        [("Deadline?", ["March 21, 2025."]), ("截止日期？", ["10月27日"])],
    ),
    "xbench": (
        [
            {
                "id": 1,
                "prompt": encrypt("差约为多少元？", CANARY),
                "answer": encrypt("161.27元", CANARY),
                "canary": CANARY,
            },
            {"id": 2, "prompt": "Decrypted before?", "answer": "1234", "canary": CANARY},
            {"question": "The authors' copy?", "answer": ["12"]},
        ],
        [("差约为多少元？", ["161.27元"]), ("Decrypted before?", ["1234"]), ("The authors' copy?", ["12"])],
    ),
}


def write_lines(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def asked(rows):
    return [(row["question"], row["answer"]) for row in rows]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_local_file_in_the_published_format(name, tmp_path):
    rows, expected = PUBLISHED[name]
    loaded = load_benchmark(name, write_lines(tmp_path / f"{name}.jsonl", rows), system_prompt="Think.")

    assert asked(loaded) == expected
    for row in loaded:
        question = {"role": "user", "content": row["question"]}
        assert row["prompt"] == [{"role": "system", "content": "Think."}, question]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_accepted_answers_score_and_others_do_not(name):
    _, expected = PUBLISHED[name]
    answers = [answers for _, answers in expected]
    boxed = [rf"<answer>\boxed{{{row[-1] if row else 'x'}}}</answer>" for row in answers]
    score, correct = scorers(name)

    wanted = [1.0 if row else None for row in answers]
    assert score(completions=boxed, answer=answers) == correct(completions=boxed, answer=answers) == wanted
    wrong = [r"<answer>\boxed{no such thing}</answer>"] * len(answers)
    assert not any(correct(completions=wrong, answer=answers))


def test_short_answers_get_partial_credit_and_open_ones_a_judge():
    score, correct = scorers("hotpotqa")
    columns = {"completions": [r"<answer>\boxed{Sir Frank Lowy}</answer>"], "answer": [["Frank Lowy"]]}
    assert score(**columns) == [pytest.approx(0.8)] and correct(**columns) == [0.0]  # 2 · 2 / (3 + 2)

    def judge(**columns):
        return [1.0]

    assert scorers("gaia", judge) == (judge, judge)
    assert judge not in scorers("gsm8k", judge) + scorers("musique", judge)


def test_other_formats_of_a_file(tmp_path):
    rows, expected = [{"question": "A?", "answer": "#### 1"}, {"question": "B?\u2028C?", "answer": "#### 2"}], None
    expected = [("A?", ["1"]), ("B?\u2028C?", ["2"])]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    write_lines(tmp_path / "lines.json", rows)
    Dataset.from_list(rows).to_parquet(tmp_path / "table.parquet")
    with (tmp_path / "table.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["question", "answer"])
        writer.writeheader()
        writer.writerows(rows)
    for name in ("list.json", "lines.json", "table.parquet", "table.csv"):
        assert asked(load_benchmark("gsm8k", tmp_path / name)) == expected, name
    assert asked(load_benchmark("gsm8k", tmp_path / "table.csv", max_questions=1)) == expected[:1]


def test_files_are_found_in_the_data_dir(tmp_path):
    row = {"question": "A?", "answer": "#### 1"}
    write_lines(tmp_path / "gsm8k.jsonl", [row])
    write_lines(tmp_path / "math500" / "test.jsonl", [{"problem": "B?", "answer": "2"}])
    for subject in ("algebra", "geometry"):
        rows = [{"problem": f"{subject}?", "solution": r"\boxed{3}"}]
        for split in ("train", "test"):
            write_lines(tmp_path / "math" / subject / f"{split}-00000-of-00001.jsonl", rows)
    gaia = {"Question": "D?", "Final answer": "4", "file_name": ""}
    for split in ("validation", "test"):
        write_lines(tmp_path / "gaia" / "2023" / split / "metadata.jsonl", [gaia | {"Question": split}])
        write_lines(tmp_path / "gaia" / "2023" / split / "metadata.level1.jsonl", [gaia])
        (tmp_path / "gaia" / "2023" / split / "attached.csv").write_text("x\n1\n")
    write_lines(tmp_path / "hle" / "one.jsonl", [{"question": "E?", "answer": "5"}])
    write_lines(tmp_path / "hle" / "two.jsonl", [{"question": "E?", "answer": "5"}])

    def load(name):
        return asked(load_benchmark(name, find_source(name, tmp_path)))

    assert load("gsm8k") == [("A?", ["1"])] and load("math500") == [("B?", ["2"])]
    assert load("math") == [("algebra?", ["3"]), ("geometry?", ["3"])]
    assert load("gaia") == [("validation", ["4"])]
    assert find_source("aime24", tmp_path) is None and find_source("aime24", None) is None
    with pytest.raises(ValueError, match=r"must hold a file of the split 'test' \(it holds: one.jsonl, two.jsonl\)"):
        load("hle")
    with pytest.raises(ValueError, match="data_dir='.*nowhere' is not a folder"):
        find_source("hle", tmp_path / "nowhere")


def test_2wiki_reads_the_aliases_beside_it(tmp_path):
    rows = [
        {"question": "A?", "answer": "US", "answer_id": "Q30"},
        {"question": "B?", "answer": "x", "answer_id": None},
    ]
    write_lines(
        tmp_path / "2wiki" / "id_aliases.json", [{"Q_id": "Q30", "aliases": ["USA"], "demonyms": ["American"]}]
    )
    path = write_lines(tmp_path / "2wiki" / "dev.json", rows)
    expected = [("A?", ["US", "USA", "American"]), ("B?", ["x"])]
    assert asked(load_benchmark("2wiki", path)) == asked(load_benchmark("2wiki", path.parent)) == expected


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_hub_is_asked_for_the_split_and_every_configuration(name, monkeypatch):
    benchmark = BENCHMARKS[name]
    calls = []

    def load_dataset(hub_id, name, split):
        calls.append((hub_id, name, split))
        columns = {"problem": "Q?", "question": "Q?", "Question": "Q?", "prompt": "Q?", "answer": "#### 1"}
        columns |= {"golden_answers": ["1"], "Final answer": "1", "image_preview": None}
        features = {key: Value("string") for key in columns} | {"golden_answers": [Value("string")]}
        return Dataset.from_list([columns], features=Features(features | {"image_preview": Image()}))

    monkeypatch.setattr(benchmarks, "load_dataset", load_dataset)
    assert len(load_benchmark(name)) == len(benchmark.configs)
    assert calls == [(benchmark.hub_id, config, benchmark.split) for config in benchmark.configs]
    calls.clear()
    load_benchmark(name, "team/copy")
    assert calls == [("team/copy", None, benchmark.split)]


def test_what_cannot_be_read_is_told(tmp_path):
    with pytest.raises(ValueError, match="There is no benchmark 'gsm9k': choose from aime24, "):
        load_benchmark("gsm9k")
    with pytest.raises(ValueError, match="GSM8K: .*gone.jsonl does not exist"):
        load_benchmark("gsm8k", tmp_path / "gone.jsonl")
    with pytest.raises(ValueError, match="GAIA could not be loaded from gaia-benchmark/GAIA .*Accept its conditions"):
        load_benchmark("gaia")  # the tests are offline
    path = write_lines(tmp_path / "a.jsonl", [{"question": "A?", "answer": "1"}, {"prompt": "B?", "answer": "2"}])
    with pytest.raises(
        ValueError, match=r"GSM8K, row 1 of .* has no question: .* question, problem is .*prompt, answer"
    ):
        load_benchmark("gsm8k", path)
    with pytest.raises(ValueError, match="GAIA: no row of .* has an answer"):
        load_benchmark("gaia", write_lines(tmp_path / "b.jsonl", [{"Question": "A?", "Final answer": "?"}]))
    path.write_text('{"question": "A?", "answer": "1"}\n{"question"')
    with pytest.raises(ValueError, match="a.jsonl line 2 is no JSON"):
        load_benchmark("gsm8k", path)
    path.write_text('["question"]\n')
    with pytest.raises(ValueError, match="a.jsonl must hold one JSON object a row"):
        load_benchmark("gsm8k", path)


def test_answers_of_every_shape_are_read_and_others_name_their_row(tmp_path):
    trivia = {"value": "Paris", "aliases": ["City of Paris"], "type": "WikipediaEntity"}
    rows = [{"question": "A?", "golden_answers": trivia}, {"question": "B?", "golden_answers": [["x"], 5.0]}]
    path = write_lines(tmp_path / "a.jsonl", rows)
    assert asked(load_benchmark("hotpotqa", path)) == [("A?", ["Paris", "City of Paris"]), ("B?", ["x", "5"])]
    write_lines(path, [rows[0], {"question": "B?", "golden_answers": {"city": "Paris"}}])
    with pytest.raises(
        ValueError, match="HotpotQA, row 1 of .*a.jsonl: A ground truth is a dict with the keys 'city'"
    ):
        load_benchmark("hotpotqa", path)


def test_decryption_by_hand():
    # "Hi" is 48 69, "ab" is 61 62: XOR 29 0b, in base64 KQs=
    assert decrypt_row({"prompt": "KQs=", "answer": "KQs=", "canary": "ab"})["prompt"] == "Hi"
    plain = {"prompt": "Hi there", "answer": "KQs=", "canary": "ab"}
    assert decrypt_row(plain) == plain


def test_the_system_prompt_teaches_the_tools_of_the_protocol():
    tags = system_prompt("tags", ["search", "python"])
    assert all(word in tags for word in ("<search>", "</python>", "<result>", "<answer>", r"\boxed{}"))
    assert "<result>" not in system_prompt("tags", [])
    assert "<search>" not in system_prompt("chat_template", ["search"])


def test_published_questions_go_through_the_loaders(tmp_path):
    source = Path(__file__).parents[2] / "shared" / "data" / "arpo_rl_valid.parquet"
    if not source.exists():
        pytest.skip(f"the published data is not at {source}")
    rows = Dataset.from_parquet(str(source), cache_dir=str(tmp_path)).to_list()
    for name, ability, number in (("math500", "math", 100), ("hotpotqa", "qa", 80)):
        own = [row for row in rows if row["ability"] == ability]
        lines = [
            {"question": row["extra_info"]["question"], "answer": row["reward_model"]["ground_truth"]} for row in own
        ]
        loaded = load_benchmark(name, write_lines(tmp_path / f"{name}.jsonl", lines))
        answers = [row["answer"] for row in loaded]
        assert len(loaded) == number and all(answers)
        boxed = [rf"<answer>\boxed{{{row[0]}}}</answer>" for row in answers]
        assert scorers(name)[1](completions=boxed, answer=answers) == [1.0] * number
