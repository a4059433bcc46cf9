"""Files of rollout records: what is left out comes back, little is written, and files of earlier versions are read."""

import gzip
import json
import random
from types import SimpleNamespace

import pytest
import torch
import viewer_samples
from scripted import plan, rollout

from arpo_trl.reporting import Reporter
from arpo_trl.rollout.record_files import shortened, write_records
from arpo_trl.rollout.tree import group_parts
from arpo_trl.viewer import render
from arpo_trl.viewer.records import find_steps, group_rows, read_file


def groups(count=3, rows=16, seed=0, segment_tokens=60):
    generator = random.Random(seed)
    made = (viewer_samples.make_group(generator, 0, index, rows, segment_tokens) for index in range(count))
    return [record for group in made for record in group]


def lines(path):
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


@pytest.mark.parametrize("seed", range(20))
def test_what_is_left_out_comes_back(tmp_path, seed):
    """Groups with forks of forks, which share segments and calls with the rows that they left."""
    whole = groups(seed=seed)
    write_records(tmp_path, whole, 0, 0, 1, append=False)
    (path,) = find_steps(tmp_path)[0]
    assert read_file(path) == (whole, 0)


def test_prompts_stand_once_a_group_and_forks_from_where_they_leave(tmp_path):
    whole = groups()
    for record, line in zip(whole, shortened(whole), strict=True):
        assert "tool_mask" not in line
        if record["row"] == 0:
            assert line["prompt_ids"] == record["prompt_ids"] and "begins_like" not in line
            continue
        assert line["prompt_ids"] == []
        if record["kind"] == "fork":
            left = record["fork_token"]
            assert line["begins_like"]["row"] == record["parent"] and line["begins_like"]["completion_ids"] >= left
            assert record["completion_ids"][-len(line["completion_ids"]) :] == line["completion_ids"]
            assert not any(call["shared"] for call in line["tool_calls"])
            assert all(segment["start"] >= left for segment in line["segments"])
    assert sum(record["kind"] == "fork" for record in whole) > 10


def test_a_file_is_less_than_a_tenth_of_whole_lines(tmp_path):
    """Long rows of few words, as of a group of 16 with long results; `benchmarks/host.py` has records of a run."""
    whole = groups(1, segment_tokens=1000)
    write_records(tmp_path, whole, 0, 0, 1, append=False)
    before = sum(len(json.dumps(record)) + 1 for record in whole)
    assert find_steps(tmp_path)[0][0].stat().st_size < before / 10


def test_a_mask_that_the_segments_do_not_tell_is_written(tmp_path):
    whole = groups(1)
    whole[3]["tool_mask"] = [0] * len(whole[3]["tool_mask"])
    write_records(tmp_path, whole, 0, 0, 1, append=False)
    (path,) = find_steps(tmp_path)[0]
    assert ["tool_mask" in line for line in lines(path)].count(True) == 1
    assert read_file(path) == (whole, 0)


def test_a_second_generation_batch_is_appended(tmp_path):
    whole = groups(4)
    first = [record for record in whole if record["prompt_index"] < 2]
    write_records(tmp_path, first, 0, 0, 1, append=False)
    write_records(tmp_path, whole[len(first) :], 0, 0, 1, append=True)
    assert read_file(find_steps(tmp_path)[0][0]) == (whole, 0)


def test_a_step_that_is_done_again_replaces_what_an_earlier_version_wrote(tmp_path):
    viewer_samples.write_run(tmp_path, steps=2)
    assert [path.name for path in find_steps(tmp_path)[1]] == ["step-000001.jsonl"]
    write_records(tmp_path, groups(), 1, 0, 1, append=False)
    names = {step: [path.name for path in paths] for step, paths in find_steps(tmp_path).items()}
    assert names == {0: ["step-000000.jsonl"], 1: ["step-000001.jsonl.gz"]}


def test_the_viewer_shows_whole_records_and_short_ones_alike(tmp_path):
    viewer_samples.save_tokenizer(tmp_path, viewer_samples.WORDS)
    old, new = tmp_path / "old" / "run", tmp_path / "new" / "run"
    viewer_samples.write_run(old)
    for step, (path,) in find_steps(old).items():
        write_records(new, read_file(path)[0], step, 0, 1, append=False)
    assert render(new, tokenizer=str(tmp_path)) == render(old, tokenizer=str(tmp_path))


@pytest.mark.parametrize("kept", [0.3, 0.8, -6])
def test_a_file_that_was_cut_off_is_read_as_far_as_it_goes(tmp_path, kept):
    whole = groups()
    write_records(tmp_path, whole, 0, 0, 1, append=False)
    (path,) = find_steps(tmp_path)[0]
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept) if kept > 0 else kept])
    rows, skipped = read_file(path)
    assert rows == whole[: len(rows)] and skipped == 1
    assert len(rows) > 0 and group_rows([rows])


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"row": 9}, "begins_like names no earlier row of the group"),
        ({"row": []}, "begins_like names no earlier row of the group"),
        ({"completion_ids": 10**9}, "begins_like.completion_ids is not a number of items that row 0 has"),
        ({"segments": -1}, "begins_like.segments is not a number of items that row 0 has"),
        ({"tool_calls": None}, "begins_like.tool_calls is not a number of items that row 0 has"),
    ],
)
def test_a_line_that_begins_like_nothing_is_an_error(tmp_path, change, complaint):
    first, second = list(shortened(groups(1, rows=2)))
    second["begins_like"] |= {"row": 0, **change}
    path = tmp_path / "step-000000.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, (first, second))).encode()))
    with pytest.raises(ValueError, match=f"step-000000.jsonl.gz line 2 is no rollout record: .*{complaint}"):
        read_file(path)


@pytest.mark.parametrize("segments", [[{}], [7], [{"start": 0, "end": "x"}], 3])
def test_segments_that_tell_no_mask_are_an_error(tmp_path, segments):
    (line,) = shortened(groups(1, rows=1))
    path = tmp_path / "step-000000.jsonl"
    path.write_text(json.dumps({**line, "segments": segments}))
    with pytest.raises(ValueError, match="line 1 is no rollout record"):
        read_file(path)


# Of a trainer


def test_every_nth_step_is_written(tmp_path):
    plans = [plan("Ano"), plan("Bno")]
    rollout(tmp_path, plans, [search], 2, 4, max_steps=5, log_rollout_steps=2)
    assert list(find_steps(tmp_path)) == [0, 2, 4]


def test_a_sample_of_groups_is_written_whole(tmp_path):
    settings = {"gradient_accumulation_steps": 4, "max_steps": 2}
    plans = [plan("Ano"), plan("Bno")]
    for name, wanted in (("all", None), ("some", 1)):
        rollout(tmp_path / name, plans, [search], 2, 4, log_rollout_groups=wanted, **settings)

    def rows(name):
        return [row for (path,) in find_steps(tmp_path / name).values() for row in read_file(path)[0]]

    everything, sample = rows("all"), rows("some")
    chosen = {(row["step"], row["prompt_index"]) for row in sample}
    assert len(everything) == 2 * 4 * 4 and [step for step, _ in sorted(chosen)] == [0, 1]
    wanted = [row for row in everything if (row["step"], row["prompt_index"]) in chosen]
    assert [(row["row"], row["completion_ids"]) for row in sample] == [
        (row["row"], row["completion_ids"]) for row in wanted
    ]


@pytest.mark.parametrize("wanted", [1, 2, 5])
def test_processes_sample_the_same_groups(wanted):
    """Three groups of four rows on two processes of six: the second group is on both."""
    args = SimpleNamespace(seed=1, log_rollout_groups=wanted)
    for step in range(10):
        told = []
        for first in (0, 6):
            reporter = Reporter(SimpleNamespace(args=args, state=SimpleNamespace(global_step=step)), [])
            reporter._rewards, reporter._rows = torch.zeros(12, 1), slice(first, first + 6)
            parts = group_parts(first, 6, 4, 2)
            # The first process has the groups 0 and 1, the second has 1 and 2
            told.append({index + first // 6 for index in reporter._sampled_groups(parts, 0)})
        assert len(told[0] | told[1]) == min(wanted, 3)
        assert (1 in told[0]) == (1 in told[1])


def search(query: str) -> str:
    """
    Search.

    Args:
        query: What.
    """
    return query
