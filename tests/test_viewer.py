"""The rollout viewer: reading records, making the page, and the page itself in headless Chromium."""

import base64
import copy
import gzip
import itertools
import json
import math
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from viewer_samples import WORDS, make_group, open_browser, save_tokenizer, write_run

from arpo_trl.viewer import page as viewer_page
from arpo_trl.viewer import render, show
from arpo_trl.viewer.records import find_steps, group_rows, read_file, step_metrics

HOSTILE = [
    "<script>window.pwned = 1</script>",
    '</script><script>window.pwned = 1</script><img src=x onerror="window.pwned = 1">',
    "<!-- <script> ${window.pwned = 1} $data",
    "</textarea></style></pre></title><iframe srcdoc='<script>parent.pwned=1</script>'></iframe>",
    "\u2028\u2029 & &lt;b&gt; \u202e reversed \U0001f600 'quoted' \"twice\" `back`",
]


def record(row=0, completion=10, segments=((0, 10),), calls=(), **changes):
    """A record with zeros for tokens and readings that tell segments apart."""
    return {
        "step": 0,
        "prompt_index": 0,
        "row": row,
        "kind": "initial",
        "parent": None,
        "fork_token": None,
        "prompt_ids": [1, 2],
        "completion_ids": [0] * completion,
        "tool_mask": [1] * completion,
        "segments": [
            {"start": start, "end": end, "entropy": 0.5 + index, "entropy_gap": index or None}
            | {"branch_probability": None, "forks": None}
            for index, (start, end) in enumerate(segments)
        ],
        "tool_calls": list(calls),
        "truncated": False,
        "rewards": {"accuracy": 1.0},
        "advantage": 0.0,
        "shared_advantages": None,
    } | changes


def call(name="search", result="found", **changes):
    filled = {"name": name, "arguments": {"query": "q"}, "result": result, "error": None, "seconds": 1.0}
    return filled | {"cached": False, "shared": False} | changes


def write(run_dir, name, records, tail=""):
    folder = run_dir / "rollouts"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(each) + "\n" for each in records) + tail, encoding="utf-8")


# ------------------------------------------------------------------------------------------------------- records


def test_steps_come_in_order_with_their_ranks(tmp_path):
    for name in (
        "step-000010-rank1.jsonl",
        "step-000010-rank0.jsonl",
        "step-000010-rank10.jsonl",
        "step-000002.jsonl",
    ):
        write(tmp_path, name, [record()])
    write(tmp_path, "notes.txt", [])

    names = {step: [path.name for path in paths] for step, paths in find_steps(tmp_path).items()}

    ranks = ["step-000010-rank0.jsonl", "step-000010-rank1.jsonl", "step-000010-rank10.jsonl"]
    assert list(names.items()) == [(2, ["step-000002.jsonl"]), (10, ranks)]
    assert find_steps(tmp_path / "rollouts").keys() == names.keys()  # the folder itself will do


def test_a_missing_run_and_a_run_without_records_are_told_apart(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run_dir='.*nowhere' is not a directory"):
        render(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no rollout records .*log_rollouts=True"):
        render(tmp_path)


def test_half_written_lines_are_skipped_and_counted(tmp_path):
    half = json.dumps(record(row=1))[:-7]
    write(tmp_path, "step-000000.jsonl", [record(row=0)], tail=half)
    rows, skipped = read_file(tmp_path / "rollouts" / "step-000000.jsonl")
    assert ([row["row"] for row in rows], skipped) == ([0], 1)

    write(tmp_path, "step-000000.jsonl", [], tail=half)
    with pytest.raises(ValueError, match=r"no rollout record could be read.*step-000000.jsonl: 1 line skipped"):
        render(tmp_path)


def test_a_file_of_something_else_is_an_error(tmp_path):
    write(tmp_path, "step-000000.jsonl", [record(), {"row": 1, "prompt_index": 0}])
    with pytest.raises(ValueError, match=r"step-000000.jsonl line 2 is no rollout record: it lacks kind, parent"):
        render(tmp_path)


def nested(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


def blocks(page):
    """What the page unpacks, as a browser reads it: its JSON has no NaN and no infinity."""

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    packed = re.findall(r'<script type="text/plain" id="[^"]+">([^<]*)</script>', page)
    return [json.loads(gzip.decompress(base64.b64decode(block)), parse_constant=refuse) for block in packed]


@pytest.mark.parametrize(
    "text, complaint",
    [
        ('{"arguments": ' + "[" * 100_000, "it cannot be read"),
        ('{"arguments": ' + "9" * 5000 + "}", "it cannot be read"),
        ("[1, 2]", "it is no object"),
        ("null", "it is no object"),
        (json.dumps(record(row="1")), "row is not a whole number of 0 or more"),
        (json.dumps(record(row=True)), "row is not a whole number"),
        (json.dumps(record(kind=["fork"])), "kind is not one of initial, fork, supplement"),
        (json.dumps(record(row=1, kind="fork", parent=1, fork_token=0)), "parent of a fork is not an earlier row"),
        (json.dumps(record(row=1, kind="fork", parent=2, fork_token=0)), "parent of a fork is not an earlier row"),
        (json.dumps(record(row=1, kind="fork", parent=0, fork_token=11)), "fork_token of a fork is not a place"),
        (json.dumps(record(prompt_ids=[1, -2])), "prompt_ids is not a list of whole numbers"),
        (json.dumps(record(completion_ids=[1.5] * 10)), "completion_ids is not a list of whole numbers"),
        (json.dumps(record(segments=[(0, 11)])), r"segments\[0\] is not a stretch of completion_ids"),
        (json.dumps(record(segments=[(4, 8), (2, 10)])), r"segments\[1\] is not a stretch of completion_ids"),
        (json.dumps(record(calls=[{"name": "x"}])), r"tool_calls\[0\] lacks arguments, result"),
        (json.dumps(record(calls=[call(name=None)])), r"tool_calls\[0\].name is not a string"),
        (json.dumps(record(rewards=[1.0])), "rewards is not an object of numbers"),
        (json.dumps(record(rewards={"right": "1"})), "rewards is not an object of numbers"),
        (json.dumps(record(advantage="1")), "advantage is not a number"),
        (json.dumps(record(advantage=10**400)), "advantage is not a number"),
        (json.dumps(record(shared_advantages=[{}])), "shared_advantages is not a list of objects"),
        (json.dumps(record(calls=[call(arguments=nested(400))])), "nested less than 200 levels deep"),
        (json.dumps(record(question=1, answer="x")), "question is not a string"),
        (json.dumps(record(example={"answer": 1})), "example is not an object of strings"),
        (json.dumps(record(out_of_turns=1)), "out_of_turns is not true or false"),
    ],
)
def test_a_record_of_something_else_is_one_sentence(tmp_path, text, complaint):
    write(tmp_path, "step-000000.jsonl", [record()], tail=text + "\n")
    with pytest.raises(ValueError, match=f"step-000000.jsonl line 2 is no rollout record: .*{complaint}") as caught:
        render(tmp_path)
    assert "\n" not in str(caught.value)


def test_numbers_that_a_browser_cannot_read_are_no_number(tmp_path):
    text = json.dumps(record(advantage=math.nan, calls=[call(arguments={"a": math.inf, "b": [-math.inf]})]))
    write(tmp_path, "step-000000.jsonl", [], tail=text.replace("0.5", "1e999") + "\n")
    _, (group,) = blocks(render(tmp_path))
    (row,) = group["rows"]
    assert row["advantage"] is None and row["parts"][0]["entropy"] is None
    assert row["parts"][-1]["calls"][0]["arguments"] == {"a": None, "b": [None]}


def test_answers_of_any_type_are_shown_as_text(tmp_path):
    row = record(question="q", answer=[1, {"a": 2}, "x"], prediction={"y": [3]})
    write(tmp_path, "step-000000.jsonl", [row, record(question="q", row=1)])
    _, (group,) = blocks(render(tmp_path))
    assert group["answer"] == ["1", '{"a": 2}', "x"] and group["rows"][0]["prediction"] == '{"y": [3]}'


def test_any_change_of_a_record_is_a_page_or_one_sentence(tmp_path):
    generator = random.Random(0)
    odd = [None, True, -1, 0, 3, 10**30, 1.5, 1e300, math.nan, math.inf, "", "x", "\ud800", [], {}, [[]], {"a": [1]}]
    write_run(tmp_path, steps=1, groups=1, rows=4)
    path = tmp_path / "rollouts" / "step-000000.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    pages = 0
    for _ in range(1500):
        changed = copy.deepcopy(rows)
        place = generator.choice(changed)
        while True:
            key = generator.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if not place[key] or not isinstance(place[key], dict | list) or generator.random() < 0.3:
                break
            place = place[key]
        if generator.random() < 0.1:
            del place[key]
        else:
            place[key] = generator.choice(odd)
        path.write_text("".join(json.dumps(row) + "\n" for row in changed))
        try:
            blocks(render(tmp_path))
            pages += 1
        except ValueError as error:
            assert "is no rollout record: " in str(error) and "\n" not in str(error)
    assert 100 < pages < 1400


def test_parts_of_a_group_on_several_processes_are_joined():
    def part(prompt, *rows, index=0):
        return [record(row=row, prompt_ids=[prompt], prompt_index=index) for row in rows]

    def shape(groups):
        return [(group[0]["prompt_ids"][0], [row["row"] for row in group]) for group in groups]

    # rank 0 ends inside group 8, rank 1 goes on with it
    ranks = [part(7, 1, 0, 2) + part(8, 0, index=1), part(8, 1, 2) + part(9, 0, 1, 2, index=1)]
    assert shape(group_rows(ranks)) == [(7, [0, 1, 2]), (8, [0, 1, 2]), (9, [0, 1, 2])]
    # the same prompt twice is two groups
    assert shape(group_rows([part(7, 0, 1), part(7, 0, 1)])) == [(7, [0, 1]), (7, [0, 1])]
    # two generation batches of one step, each numbered from 0, over two processes
    ranks = [part(7, 0) + part(7, 0), part(7, 1) + part(7, 1)]
    assert shape(group_rows(ranks)) == [(7, [0, 1]), (7, [0, 1])]


def test_metrics_count_what_is_shared_once():
    parent = record(
        tool_mask=[1] * 4 + [0] * 2 + [1] * 4,
        segments=[(0, 4), (6, 10)],
        calls=[call(seconds=3.0)],
        rewards={"accuracy": 1.0, "format": 1.0},
    )
    fork = record(
        row=1,
        kind="fork",
        parent=0,
        fork_token=6,
        segments=[(0, 4), (6, 10)],
        calls=[call(seconds=3.0, shared=True), call("python", error="no such module")],
        rewards={"accuracy": 0.0, "format": None},
        truncated=True,
    )
    parent["segments"][0]["entropy"] = fork["segments"][0]["entropy"] = 0.5
    parent["segments"][1]["entropy"], fork["segments"][1]["entropy"] = 1.0, 2.0

    metrics = step_metrics([[parent, fork]])

    expected = {
        "rewards/accuracy/mean": 0.5,
        "rewards/format/mean": 1.0,  # null does not count
        "arpo/initial": 1,
        "arpo/forks": 1,
        "arpo/entropy_initial": 0.5,
        "arpo/entropy_after_tool": 1.5,
        "tools/calls_executed": 2,
        "tools/calls_made": 3,
        "tools/calls_shared": 1,
        "tools/calls_merged": 0,  # of records from before calls were merged
        "tools/search/calls": 1,
        "tools/python/failures": 1,
        "completions/mean_length": 9,  # model tokens: 8 and, for this test, 10
        "completions/truncated": 0.5,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


def test_a_step_tells_of_its_trees_as_training_does():
    rows = [
        record(segments=[(0, 4), (6, 10)], rewards={"a": 1.0, "b": 1.0}, advantage=1.0, out_of_turns=False),
        record(1, kind="fork", parent=0, fork_token=6, segments=[(0, 4), (6, 10)], out_of_turns=False),
        record(3, rewards={"a": -1.0}, truncated=True, out_of_turns=True, advantage=-1.0),  # row 2 was lost
    ]
    metrics = step_metrics([rows])
    expected = {
        "arpo/reward/initial": 0.5,
        "arpo/reward/fork": 1,
        "arpo/advantage/initial": 0,
        "arpo/reward_variance_within_trees": 2 * 0.5**2 / 3,
        "arpo/reward_variance_between_trees": (2 * (1.5 - 2 / 3) ** 2 + (1 + 2 / 3) ** 2) / 3,
        "arpo/forks_at_result/1": 1,
        "arpo/forks_like_parent": 1,
        "completions/cut_by_turns": 1 / 3,
        "frac_reward_zero_std": 0,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    del rows[0]["out_of_turns"]
    assert "completions/cut_by_turns" not in step_metrics([rows])  # an older record does not tell
    evaluated = step_metrics([[record(question="q", score=1.0)]])
    assert not any(name.startswith("arpo/reward") for name in evaluated)


# -------------------------------------------------------------------------------------------------------- the page


def parts_of(*rows):
    """The pieces of each row as the page gets them, token ids for text."""
    return [row["parts"] for row in viewer_page._group(list(rows), None)["rows"]]


def test_a_fork_brings_only_what_is_its_own():
    parent = record(completion=12, segments=[(0, 4), (6, 12)], calls=[call(result="a")])
    calls = [call(result="a", shared=True), call(result="b")]
    fork = record(
        row=1, kind="fork", parent=0, fork_token=6, completion=14, segments=[(0, 4), (6, 9), (11, 14)], calls=calls
    )

    first, second = parts_of(parent, fork)

    assert [(part["kind"], part["start"], part["end"]) for part in first] == [
        ("model", 0, 4),
        ("tool", 4, 6),
        ("model", 6, 12),
    ]
    assert [(part["kind"], part["start"], part["end"]) for part in second] == [
        ("model", 6, 9),
        ("tool", 9, 11),
        ("model", 11, 14),
    ]
    assert [each["result"] for each in second[1]["calls"]] == ["b"]
    (alone,) = parts_of(fork)  # its parent's line was lost: all of it is shown
    assert [part["start"] for part in alone] == [0, 4, 6, 9, 11]


def test_calls_are_placed_at_the_stretch_that_answers_them():
    a, b, c = call(result="alpha"), call(result="beta"), call(result="gamma")
    place = viewer_page._place_calls
    assert place([a, b], ["x", "y"]) == ([[a], [b]], [])  # one each, whatever the text
    assert place([a, b, c], ["alpha and beta", "gamma"]) == ([[a, b], [c]], [])
    assert place([a, b, c], ["alpha", "beta gamma"]) == ([[a], [b, c]], [])
    assert place([a, b], ["alpha"]) == ([[a]], [b])  # the row ended before it read b
    assert place([a, b, c], ["1 2", "3 4"]) == ([[a], [b]], [c])  # token ids only: in order
    assert place([a], []) == ([], [a])


def test_a_call_that_the_row_never_read_is_shown_at_its_end():
    ((model, unread),) = parts_of(record(calls=[call(result="late")]))
    assert (unread["kind"], unread["start"], unread["end"]) == ("tool", 10, 10)
    assert unread["calls"][0]["result"] == "late"


def test_previews_leave_out_what_all_prompts_share():
    prompts = ["system: be brief\nuser: who built it?\nassistant:", "system: be brief\nuser: where is it?\nassistant:"]
    groups = [{"prompt": prompt} for prompt in prompts]
    viewer_page._add_previews(groups)
    assert [group["preview"] for group in groups] == ["who built it?", "where is it?"]
    framed = "<|im_start|>user\nWho wrote {}?<|im_end|>\n<|im_start|>assistant\n"
    for frame in (framed, "[INST] Be brief. [/INST] Who wrote {}?</s>", "Who wrote {}?"):
        groups = [{"prompt": frame.format(work)} for work in ("Emma", "Persuasion")]
        viewer_page._add_previews(groups)
        assert [group["preview"] for group in groups] == ["Who wrote Emma?", "Who wrote Persuasion?"]
    (alone,) = ({"prompt": "a" * 500 + "the question"},)
    viewer_page._add_previews([alone])
    assert alone["preview"].endswith("the question") and len(alone["preview"]) == 300


def test_trees_are_kept_for_evenly_spaced_steps(tmp_path):
    write_run(tmp_path, steps=7, groups=1, rows=4)
    keep = viewer_page._steps_with_trees
    assert keep(find_steps(tmp_path), 28) == set(range(7))
    assert keep(find_steps(tmp_path), 16) == {0, 2, 4, 6}
    assert keep(find_steps(tmp_path), 10) == {0, 3, 6}
    for step in (0, 6):
        (tmp_path / "rollouts" / f"step-{step:06d}.jsonl").write_text("")  # a full disk leaves empty files
    assert re.findall(r'id="(step-\d+)"', render(tmp_path, max_trajectories=1)) == ["step-1"]
    with pytest.raises(ValueError, match="max_trajectories=0 must be at least 1"):
        render(tmp_path, max_trajectories=0)


def test_the_page_holds_no_byte_of_a_record_as_html(tmp_path):
    lone_surrogate = "\ud800"  # JSON can hold it, UTF-8 cannot
    write(tmp_path, "step-000000.jsonl", [record(calls=[call(result=text) for text in (*HOSTILE, lone_surrogate)])])
    text = render(tmp_path)
    assert "pwned" not in text and "reversed" not in text


def test_a_tokenizer_that_cannot_be_loaded_is_named(tmp_path):
    write(tmp_path, "step-000000.jsonl", [record()])
    with pytest.raises(ValueError, match=r"tokenizer='.*missing' could not be loaded"):
        render(tmp_path, tokenizer=str(tmp_path / "missing"))


def command_line(*arguments):
    command = [sys.executable, "-m", "arpo_trl.viewer", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_command_line(tmp_path):
    write(tmp_path, "step-000000.jsonl", [record()])
    made = command_line(tmp_path)
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    failed = command_line(tmp_path / "nowhere", "-o", tmp_path / "x.html")
    assert failed.returncode == 1 and not (tmp_path / "x.html").exists()
    assert failed.stderr.count("\n") == 1 and "is not a directory" in failed.stderr


# ----------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser():
    if shutil.which("chromium") is None:
        pytest.skip("needs chromium on the PATH (Debian: apt-get install chromium)")
    pytest.importorskip("playwright", reason="needs playwright")
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def sample_run(tmp_path_factory):
    """A run with a tokenizer, three steps of two groups, and a half-written last line."""
    run_dir = tmp_path_factory.mktemp("sample-run")
    write_run(run_dir, steps=3, groups=2, rows=8)
    save_tokenizer(run_dir, list(dict.fromkeys(WORDS)))
    with (run_dir / "rollouts" / "step-000002.jsonl").open("a") as file:
        file.write('{"step": 2, "prompt_index": 2, "row": 0, "comp')
    return run_dir


@pytest.fixture(scope="module")
def sample_page(sample_run):
    path = sample_run / "report.html"
    path.write_text(render(sample_run), encoding="utf-8")
    return path


@pytest.fixture
def visit(browser):
    """Open a page at an address; afterwards, nothing must have gone wrong and nothing else been asked for."""
    pages, problems = [], []

    def open_page(path: Path, address: str = "", scheme: str = "light", width: int = 1440):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text))
        page.on("request", lambda request: request.url.startswith("file:") or problems.append(request.url))
        page.goto(f"{path.as_uri()}#{address}")
        page.wait_for_selector("body[data-ready]")
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert problems == []


def test_a_click_shows_the_segment(visit, sample_run, sample_page):
    page = visit(sample_page, "step=1&group=1")
    rows = group_rows([read_file(sample_run / "rollouts" / "step-000001.jsonl")[0]])[1]
    fork = next(row for row in rows if row["kind"] == "fork" and row["segments"][-1]["entropy_gap"])
    segment = fork["segments"][-1]

    label = f"Model, tokens {segment['start']}–{segment['end']} · entropy {segment['entropy']:.3f}".rstrip("0")
    page.locator(f'#tree [aria-label^="{label}"]').click()

    words = list(dict.fromkeys(WORDS))
    ids = fork["completion_ids"][segment["start"] : segment["end"]]
    card = page.locator(".card.current")
    assert card.locator("pre").text_content().split() == [words[i] if i < len(words) else f"w{i}" for i in ids]
    assert "gap" in card.locator(".facts").text_content()
    facts = page.locator("#transcript .sides .facts").first.text_content()
    assert f"fork of row {fork['parent']} at token {fork['fork_token']}" in facts
    assert f"row={fork['row']}" in page.url and f"token={segment['start']}" in page.url  # a link leads back here


def test_a_click_on_a_tool_result_shows_the_call(visit, tmp_path):
    shown = call(result="42", arguments={"code": "print(6 * 7)"}, cached=True, seconds=0.25)
    write(tmp_path, "step-000000.jsonl", [record(segments=[(0, 4), (6, 10)], calls=[shown])])
    (tmp_path / "report.html").write_text(render(tmp_path), encoding="utf-8")
    page = visit(tmp_path / "report.html")

    page.locator("#tree .result").click()

    card = page.locator(".card.current")
    assert card.locator("h3").text_content() == "search"
    assert card.locator("pre.given").text_content() == "print(6 * 7)"
    assert card.locator("pre.answer").text_content() == "42"
    assert "0.25 s · from cache" in card.locator(".facts").first.text_content()
    assert "token ids are shown" in page.locator("#notes").text_content()


def test_every_row_is_a_branch_that_starts_where_it_forked(visit, sample_run, sample_page):
    page = visit(sample_page, "step=0&group=0")
    rows = group_rows([read_file(sample_run / "rollouts" / "step-000000.jsonl")[0]])[0]
    forks = [row for row in rows if row["kind"] == "fork"]
    assert page.locator("#tree .name").count() == len(rows) == page.locator("#tree .leaf").count()
    assert page.locator("#tree path.fork").count() == len(forks) > 0
    own = sum(len([s for s in row["segments"] if s["start"] >= (row["fork_token"] or 0)]) for row in rows)
    assert page.locator("#tree .segment").count() == own  # what is shared is drawn once


def test_colour_and_thickness_follow_the_entropy(visit, tmp_path):
    write(tmp_path, "step-000000.jsonl", [record(segments=[(0, 4), (6, 10)], calls=[call()])])  # 0.5 and 1.5 nats
    (tmp_path / "report.html").write_text(render(tmp_path), encoding="utf-8")
    page = visit(tmp_path / "report.html")

    def drawn(position):
        segment = page.locator("#tree .segment").nth(position)
        return float(segment.get_attribute("height")), segment.evaluate("(e) => getComputedStyle(e).fill")

    (thin, pale), (thick, strong) = drawn(0), drawn(1)
    assert thin < thick and pale != strong
    page.locator("#measure").select_option("gap")
    assert "unread" in page.locator("#tree .segment").first.get_attribute("class")  # a first segment has no gap
    assert page.locator("#legend").text_content().startswith("≤ −1")


def test_the_keyboard_alone_is_enough(visit, sample_page):
    page = visit(sample_page, "step=0&group=0&row=0&token=0")
    page.locator('#tree [tabindex="0"]').focus()
    page.keyboard.press("ArrowRight")
    assert page.locator(".card.current").get_attribute("class").split()[1] == "tool"
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowDown")
    assert "row=0&" not in page.url + "&" and "token=0" in page.url
    assert page.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"
    page.locator("#next-step").press("Enter")
    page.locator("#step-name", has_text="step 1 (").wait_for()
    page.locator("#groups button").nth(1).press("Enter")
    assert "group=1" in page.url
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, select, input, [role=button]')]"
        ".filter((e) => !(e.ariaLabel || e.textContent.trim() || e.labels?.length)).map((e) => e.outerHTML)"
    )
    assert unnamed == []


def test_filters_by_reward_and_tool(visit, tmp_path):
    rows = [
        record(0, segments=[(0, 4), (6, 10)], calls=[call("search")], rewards={"accuracy": 1.0, "format": 0.5}),
        record(
            1, segments=[(0, 4), (6, 10)], calls=[call("python", error="x")], rewards={"accuracy": 0.0, "format": 1}
        ),
        record(2, rewards={"accuracy": -1.0, "format": None}),
        record(0, prompt_index=1, rewards={"accuracy": -1.0, "format": None}),
    ]
    write(tmp_path, "step-000000.jsonl", rows)
    (tmp_path / "report.html").write_text(render(tmp_path), encoding="utf-8")
    page = visit(tmp_path / "report.html")

    def left():
        dimmed = page.locator("#tree .name.out").all_text_contents()
        return sorted({"0", "1", "2"} - {name.strip("└ ") for name in dimmed}), page.locator("#groups li").count()

    assert left() == (["0", "1", "2"], 2)
    page.locator("#reward-min").fill("1")  # of the sum
    assert left() == (["0", "1"], 1)
    page.locator("#reward").select_option("accuracy")
    assert left() == (["0"], 1)
    assert page.locator("#matches").text_content() == "1 of 4 trajectories match"
    page.locator("#reward-min").fill("")
    for choice, expected in [("tool python", ["1"]), ("failed", ["1"]), ("tool search", ["0"]), ("none", ["2"])]:
        page.locator("#tool").select_option(choice)
        assert left()[0] == expected


def test_two_rows_side_by_side_share_what_came_before_the_fork(visit, tmp_path):
    parent = record(completion=12, segments=[(0, 4), (6, 12)], calls=[call(result="a")])
    fork = record(1, kind="fork", parent=0, fork_token=6, segments=[(0, 4), (6, 10)], calls=[call(shared=True)])
    write(tmp_path, "step-000000.jsonl", [parent, fork])
    (tmp_path / "report.html").write_text(render(tmp_path), encoding="utf-8")
    page = visit(tmp_path / "report.html", "row=0")

    page.locator("#other").select_option("1")

    assert page.locator("#transcript > .card").count() == 2  # the first segment and the tool result, once
    sides = page.locator("#transcript .side")
    assert [sides.nth(side).locator(".card").count() for side in (0, 1)] == [1, 1]
    assert "tokens 6–12" in sides.nth(0).text_content() and "tokens 6–10" in sides.nth(1).text_content()


def test_a_metric_over_the_steps(visit, sample_run, sample_page):
    page = visit(sample_page, "step=1")
    rows = read_file(sample_run / "rollouts" / "step-000001.jsonl")[0]
    executed = sum(not (each["shared"] or each["cached"]) for row in rows for each in row["tool_calls"])
    page.locator("#metric").select_option("tools/calls_executed")
    assert page.locator("#metric-value").text_content() == f"{executed} at step 1"
    assert page.locator("#chart circle").count() == 3
    box = page.locator("#chart").bounding_box()
    page.mouse.click(box["x"] + box["width"] - 14, box["y"] + 50)  # the last point
    page.locator("#step-name", has_text="step 2 (").wait_for()


def test_the_right_answer_stands_over_the_rows(visit, tmp_path):
    example = {"answer": '["Paris", "paris"]', "level": "<b>3</b>"}
    group = [record(example=example, truncated=True, out_of_turns=True), record(1, example=None)]
    write(tmp_path, "step-000000.jsonl", [*group, record(prompt_index=1, truncated=True, out_of_turns=False)])
    (tmp_path / "report.html").write_text(render(tmp_path), encoding="utf-8")
    page = visit(tmp_path / "report.html", "row=0")
    assert page.locator(".example dt").all_text_contents() == ["answer", "level"]
    assert page.locator(".example dd").all_text_contents() == ['["Paris", "paris"]', "<b>3</b>"]
    assert "cut at the call limit" in page.locator("#transcript").text_content()
    page.locator("#groups button").nth(1).click()
    assert page.locator(".example").count() == 0
    assert "cut at the length limit" in page.locator("#transcript").text_content()


def test_distributions_of_a_step(visit, tmp_path):
    """ΔH −1, 0.25 and 1; P 0.05, 1 and 1; forks of row 0 at its first result, of that one at its second."""

    def segments(*gaps):
        readings = zip((0, 4, 8), (3, 7, 10), (None, *gaps), strict=False)
        probabilities = {-1: 0.05, 0.25: 1.0, 1: 1.0}
        return [
            {"start": start, "end": end, "entropy": 0.5, "entropy_gap": gap}
            | {"branch_probability": probabilities.get(gap), "forks": None}
            for start, end, gap in readings
        ]

    rows = [record(completion=10) | {"segments": segments(-1, 1)}]
    rows.append(record(1, kind="fork", parent=0, fork_token=4) | {"segments": segments(0.25)})
    rows.append(record(2, kind="fork", parent=1, fork_token=8, completion=12) | {"segments": segments(0.25, None)})
    write(tmp_path, "step-000000.jsonl", rows)
    (tmp_path / "report.html").write_text(render(tmp_path), encoding="utf-8")
    page = visit(tmp_path / "report.html")
    page.locator("#distributions summary").click()

    figures = page.locator("#histograms figure")
    titles = [figures.nth(i).locator("b").text_content() for i in range(figures.count())]
    assert titles == ["Entropy gap ΔH", "Branch probability P", "Forks by depth", "Forks by tool result"]
    told = [
        [
            label
            for bar in figures.nth(i).locator("rect").all()
            if not (label := bar.get_attribute("aria-label")).split(": ")[1].startswith("0 ")
        ]
        for i in range(4)
    ]
    assert told == [
        ["−1 to −0.83: 1 segment", "0.17 to 0.33: 1 segment", "0.83 to 1: 1 segment"],
        ["0 to 0.1: 1 decision", "0.9 to 1: 2 decisions"],
        ["1: 1 fork", "2: 1 fork"],
        ["1: 1 fork", "2: 1 fork"],
    ]
    assert "mean 0.68 · std 0.45" in figures.nth(1).text_content()
    heights = [float(bar.get_attribute("height")) for bar in figures.nth(1).locator("rect").all()]
    assert heights[-1] == pytest.approx(2 * heights[0])


def test_a_step_without_forks_or_readings_shows_no_distributions(visit, tmp_path):
    write(tmp_path, "step-000000.jsonl", [record()])
    (tmp_path / "report.html").write_text(render(tmp_path), encoding="utf-8")
    assert not visit(tmp_path / "report.html").locator("#distributions").is_visible()


def test_a_metric_and_its_value_stay_on_one_line(visit, tmp_path):
    write_run(tmp_path, steps=12, groups=1, rows=8)
    (tmp_path / "report.html").write_text(render(tmp_path), encoding="utf-8")
    page = visit(
        tmp_path / "report.html", "step=11&row=0&other=5&metric=arpo%2Freward_variance_between_trees", width=1280
    )
    select, value, panel = (page.locator(name).bounding_box() for name in ("#metric", "#metric-value", "#metrics"))
    assert page.locator("#metric-value").text_content().endswith(" at step 11")
    assert value["height"] < 30 and select["y"] <= value["y"] + value["height"] / 2 <= select["y"] + select["height"]
    assert value["x"] + value["width"] <= panel["x"] + panel["width"]


def test_a_half_written_line_leaves_one_visible_note(visit, sample_page):
    page = visit(sample_page)
    assert page.locator("#notes").is_visible()
    assert page.locator("#notes").text_content().count("skipped") == 1
    assert "step-000002.jsonl: 1 line skipped" in page.locator("#notes").text_content()


def test_scripts_in_records_do_not_run(visit, tmp_path):
    run_dir = tmp_path / "<img src=x onerror=window.pwned=1>"
    calls = [call(text, text, arguments={text: text, "__proto__": text}, error=f"!{text}") for text in HOSTILE]
    segments = [(2 * i, 2 * i + 1) for i in range(len(HOSTILE) + 1)]
    hostile = record(
        segments=segments,
        completion=2 * len(HOSTILE) + 1,
        completion_ids=[i // 2 % len(HOSTILE) for i in range(2 * len(HOSTILE) + 1)],
        calls=calls,
        prompt_ids=list(range(len(HOSTILE))),
        rewards={HOSTILE[0]: 1.0, HOSTILE[1]: 0.0, "__proto__": 0.5},
    )
    write(run_dir, "step-000000.jsonl", [hostile])
    save_tokenizer(run_dir, HOSTILE)
    (tmp_path / "report.html").write_text(render(run_dir), encoding="utf-8")
    page = visit(tmp_path / "report.html")

    for piece in page.locator("#tree .piece").all():
        piece.hover()
        piece.click()
    for metric in page.locator("#metric option").all_text_contents():
        page.locator("#metric").select_option(metric)

    assert page.evaluate("window.pwned") is None
    assert page.locator("img, iframe, textarea").count() == 0
    assert page.locator(".card.model pre").all_text_contents()[: len(HOSTILE)] == HOSTILE  # every character is there
    assert page.locator(".card.tool h3").all_text_contents() == HOSTILE
    assert page.locator(".card.tool pre.answer").all_text_contents() == HOSTILE
    assert page.locator("h1").text_content() == run_dir.name


def test_the_policy_stops_what_the_page_did_not_bring(browser, sample_page):
    page = browser.new_page()
    page.goto(sample_page.as_uri())
    page.wait_for_selector("body[data-ready]")
    page.evaluate(
        "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.pwned = 1\">');"
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.pwned = 1'}))"
    )
    blocked = page.evaluate("fetch('http://localhost:9/').then(() => 'sent', (error) => 'refused')")
    assert (page.evaluate("window.pwned"), blocked) == (None, "refused")
    page.close()


def test_five_thousand_trajectories_open(visit, tmp_path):
    write_run(tmp_path, steps=5, groups=100, rows=10, segment_tokens=20)
    (tmp_path / "report.html").write_text(render(tmp_path), encoding="utf-8")
    page = visit(tmp_path / "report.html", "step=4&group=99&row=9")
    assert page.locator("#matches").text_content() == "1000 trajectories"
    assert page.locator("#groups li").count() == 100
    assert page.locator("#row").input_value() == "9"


@pytest.mark.parametrize("scheme, width", [("light", 1440), ("dark", 1440), ("light", 1100), ("dark", 700)])
def test_nothing_overlaps_and_all_is_legible(visit, sample_page, scheme, width):
    page = visit(sample_page, "step=1&row=0&other=5", scheme, width)
    assert page.evaluate("document.documentElement.classList.contains('dark')") == (scheme == "dark")
    page.locator("#distributions summary").click()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for container in ("#tree", "#chart", "#histograms", "header", "nav .bar", "#legend", "#middle > .bar"):
        inside = f"{container} text, {container} :is(label, button, output, h1, #legend > span):not(label *)"
        boxes = [box for each in page.locator(inside).all() if (box := each.bounding_box())]
        for one, two in itertools.combinations(boxes, 2):
            apart = one["x"] + one["width"] <= two["x"] + 1 or two["x"] + two["width"] <= one["x"] + 1
            below = one["y"] + one["height"] <= two["y"] + 3 or two["y"] + two["height"] <= one["y"] + 3
            assert apart or below, (container, one, two)
    # WCAG 2 AA: 4.5 between a text and what it stands on
    faint = page.evaluate(
        """() => {
          const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d", { willReadFrequently: true });
          const rgba = (colour) => {
            canvas.clearRect(0, 0, 1, 1);
            canvas.fillStyle = colour;
            canvas.fillRect(0, 0, 1, 1);
            return canvas.getImageData(0, 0, 1, 1).data;
          };
          const light = (colour) => rgba(colour).slice(0, 3).reduce((sum, part, i) => {
            const value = part / 255;
            return sum + [0.2126, 0.7152, 0.0722][i] * (value > 0.04045 ? ((value + 0.055) / 1.055) ** 2.4 : value / 12.92);
          }, 0);
          const under = (e) => rgba(getComputedStyle(e).backgroundColor)[3] === 255 ? e : under(e.parentElement);
          const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), faint = new Set();
          while (walker.nextNode()) {
            const e = walker.currentNode.parentElement, style = getComputedStyle(e);
            if (!walker.currentNode.data.trim() || !e.checkVisibility() || e.closest("script, style, option")) continue;
            const pair = [light(e.closest("svg") ? style.fill : style.color), light(getComputedStyle(under(e)).backgroundColor)];
            const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
            if (ratio < 4.5) faint.add(`${e.tagName}.${e.getAttribute("class")} ${ratio.toFixed(2)}`);
          }
          return [...faint];
        }"""
    )
    assert faint == []
    page.locator("#theme").click()
    assert page.evaluate("document.documentElement.classList.contains('dark')") == (scheme == "light")


def test_a_notebook_shows_the_page_in_a_frame_of_its_own(browser, sample_run, tmp_path, monkeypatch):
    pytest.importorskip("IPython", reason="needs IPython")
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append(data["text/html"]))
    show(sample_run)
    (tmp_path / "notebook.html").write_text(f"<!doctype html><meta charset=utf-8>{shown[0]}", encoding="utf-8")
    page = browser.new_page()
    page.goto((tmp_path / "notebook.html").as_uri())
    frame = page.frame_locator("iframe")
    frame.locator("body[data-ready]").wait_for(state="attached")
    frame.locator("#tree .segment").first.click()
    assert frame.locator(".card.current").count() == 1
    page.close()


def test_the_sample_records_have_forks_of_forks():
    """What the other tests look at is worth looking at."""
    rows = {row["row"]: row for row in make_group(random.Random(0), 0, 0, 16, 60)}
    forks = [row for row in rows.values() if row["kind"] == "fork"]
    assert any(rows[row["parent"]]["kind"] == "fork" for row in forks)
    for row in forks:
        parent = rows[row["parent"]]
        assert row["completion_ids"][: row["fork_token"]] == parent["completion_ids"][: row["fork_token"]]
