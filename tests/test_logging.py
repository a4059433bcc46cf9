"""What a run logs arrives in TensorBoard, trackio and Weights & Biases, which really run here, on this machine alone."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_faults import puppet
from test_faults import settings as puppet_settings
from test_trainer_options import build
from transformers import TrainerCallback
from trl.trainer.utils import print_prompt_completions_sample

from arpo_trl import checks
from arpo_trl.rollout.table import completion_columns, table_row
from arpo_trl.rollout.tree import CallOfRow, Group, Trajectory
from arpo_trl.tools import ToolCall
from arpo_trl.viewer import picture

CALL = '<tool_call>\n{"name": "add", "arguments": %s}\n</tool_call><|im_end|>'
SCRIPT = str(Path(__file__).with_name("logging_script.py"))


@pytest.fixture(scope="module")
def logged(agent_dirs, tmp_path_factory):
    """The folder of a run of three steps, with an evaluation after the third, that logged to all three."""
    folder = tmp_path_factory.mktemp("logging")
    environment = {**os.environ, "TRACKIO_DIR": str(folder / "trackio"), "WANDB_MODE": "offline"}
    environment |= {"WANDB_DIR": str(folder), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, SCRIPT, str(folder), agent_dirs["chat_template"]]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stderr[-6000:]
    return folder


def logs(folder: Path, key: str) -> list[tuple[int, float]]:
    """`(step, value)` of a metric as the trainer keeps them."""
    return [(entry["step"], entry[key]) for entry in json.loads((folder / "logs.json").read_text()) if key in entry]


@pytest.fixture(scope="module")
def events(logged):
    (writer,) = (logged / "run" / "runs").iterdir()
    accumulator = EventAccumulator(str(writer))
    accumulator.Reload()
    return accumulator


# ---------------------------------------------------------------------------------------------- metrics and backends


@pytest.mark.parametrize("name", ["arpo/forks", "arpo/entropy_after_tool", "tools/calls_saved", "tools/add/calls"])
def test_tensorboard_has_the_metrics_under_train_and_eval(events, logged, name):
    expected = logs(logged, name)
    assert len(expected) == 3
    scalars = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
    assert scalars == [(step, pytest.approx(value)) for step, value in expected]
    (evaluated,) = events.Scalars(f"eval/{name}")
    assert (evaluated.step, evaluated.value) == (3, pytest.approx(dict(logs(logged, f"eval_{name}"))[3]))


def test_trackio_has_the_metrics(logged):
    environment = {**os.environ, "TRACKIO_DIR": str(logged / "trackio")}
    values = {}
    for name in ("train/arpo/entropy_after_tool", "train/tools/add/calls"):
        command = [str(Path(sys.executable).with_name("trackio")), "get", "metric", "--json", "--project", "tests"]
        answer = subprocess.run(
            [*command, "--run", "small", "--metric", name],
            env=environment,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert answer.returncode == 0, answer.stderr
        values[name] = [entry["value"] for entry in json.loads(answer.stdout)["values"]]
    assert values["train/arpo/entropy_after_tool"] == [value for _, value in logs(logged, "arpo/entropy_after_tool")]
    assert values["train/tools/add/calls"] == [value for _, value in logs(logged, "tools/add/calls")]


# -------------------------------------------------------------------------------------------- the table of completions


def test_columns_of_rows():
    """Row 1 leaves row 0 after one call, row 2 leaves row 1 after two, row 3 starts afresh; then a group of its own."""
    calls = [CallOfRow(ToolCall("t")) for _ in range(3)]
    first = [
        Trajectory(0, [], calls=calls[:1]),
        Trajectory(1, [], kind="fork", parent=0, calls=calls[:2]),
        Trajectory(2, [], kind="fork", parent=1, calls=calls),
        Trajectory(3, [], kind="supplement"),
    ]
    second = [Trajectory(4, []), Trajectory(5, [], kind="fork", parent=4, calls=calls[:1])]
    groups = [Group(range(4), 1, 4, trajectories=first), Group(range(4, 6), 1, 2, trajectories=second)]
    assert completion_columns(groups) == {
        "kind": ["initial", "fork", "fork", "supplement", "initial", "fork"],
        "fork_depth": [0, 1, 2, 0, 0, 1],
        "calls": [1, 2, 3, 0, 0, 1],
    }


def check_table(table: pd.DataFrame):
    assert len(table) == 4
    assert set(table["kind"]) <= {"initial", "fork", "supplement"} and list(table["kind"]).count("initial") == 2
    assert [depth > 0 for depth in table["fork_depth"]] == [kind == "fork" for kind in table["kind"]]
    # a completion is a list of messages, or its JSON
    messages = [json.loads(row) if isinstance(row, str) else row for row in table["completion"]]
    assert list(table["calls"]) == [sum(message["role"] == "tool" for message in row) for row in messages]


@pytest.mark.parametrize("step", [1, 2])
def test_the_table_on_disk_tells_kind_depth_and_calls(logged, step):
    check_table(pd.read_parquet(logged / "run" / "completions" / f"completions_{step:05d}.parquet"))


def test_the_table_of_weights_and_biases_tells_them_too(logged):
    paths = sorted(logged.glob("wandb/offline-run-*/files/media/table/completions_*.json"), key=os.path.getmtime)
    table = json.loads(paths[0].read_text())
    check_table(pd.DataFrame(table["data"], columns=table["columns"]))


def test_a_reward_functions_own_column_and_a_full_disk_end_no_run(agent_dirs, tokenizer, tmp_path):
    def graded(completions, log_extra, **kwargs):
        log_extra("calls", ["mine"] * len(completions))
        return [float(len(str(completion))) for completion in completions]

    (tmp_path / "trees").touch()  # no folder can be made there
    settings = {"max_steps": 1, "max_completion_length": 60, "log_completions": True, "log_tree_steps": 1}
    trainer = build(agent_dirs, tokenizer, tmp_path, reward_funcs=graded, **settings)
    trainer.train()
    table = pd.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    assert set(table["calls"]) == {"mine"} and {"kind", "fork_depth"} <= set(table.columns)


def messages(arguments, content="3"):
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    return [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": content}]


ODD = [
    *({"a": value} for value in (1, "one", [1], {"b": None}, 123456789012345678901, 1e999, None, True, {})),
    *("{}", "half {", [1, 2], 7, None, ""),
]


def test_a_table_takes_calls_of_any_type(tmp_path):
    """The rows of one table, as pandas and pyarrow write it and as rich prints it."""
    rows = [table_row(messages(arguments)) for arguments in ODD]
    rows += [table_row(messages({}, content)) for content in (None, [{"type": "text", "text": "x"}], 1.5)]
    rows += [table_row([{"role": "assistant", "tool_calls": [call]}]) for call in (None, "add", {"function": "add"})]
    rows += [table_row([{"role": "assistant", "tool_calls": calls}]) for calls in (None, "add", {})]
    pd.DataFrame({"completion": rows}).to_parquet(tmp_path / "table.parquet")
    read = pd.read_parquet(tmp_path / "table.parquet")["completion"]
    arguments = [json.loads(row[0]["tool_calls"][0]["function"]["arguments"]) for row in read[: len(ODD)]]
    assert arguments[:2] == [{"a": 1}, {"a": "one"}] and arguments[4] == {"a": 123456789012345678901}
    assert arguments[9:] == [{}, {"arguments": "half {"}, {"arguments": [1, 2]}, {"arguments": 7}] + [
        {"arguments": None},
        {"arguments": ""},
    ]
    texts = [[message for message in row if isinstance(message.get("tool_calls"), list)] for row in rows]
    print_prompt_completions_sample(["q"] * len(texts), texts, {"r": [0.0] * len(texts)}, [0.0] * len(texts), 0)
    assert [table_row(row) for row in rows] == rows, "a row that is logged twice stays as it is"
    image = [{"role": "user", "content": [{"type": "image", "image": object()}]}]
    assert table_row(image) is image and table_row("text") == "text"


def test_calls_of_different_types_end_no_run_and_their_table_is_written(tokenizer, tmp_path):
    texts = [CALL % arguments for arguments in ('{"a": "one"}', '{"a": 123456789012345678901}', "[1, 2]")]
    args = puppet_settings(tmp_path, per_device_train_batch_size=12, max_steps=1, log_completions=True)
    puppet(tokenizer, args, texts, lambda completions, **kwargs: [0.0] * len(completions)).train()
    table = pd.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    written = {message["tool_calls"][0]["function"]["arguments"] for row in table["completion"] for message in row[:1]}
    assert {json.dumps({"a": "one"}), json.dumps({"a": 123456789012345678901})} <= written


def test_a_table_that_cannot_be_written_ends_no_run(agent_dirs, tokenizer, tmp_path, caplog):
    def graded(completions, log_extra, **kwargs):
        log_extra("note", [1, "one"] * (len(completions) // 2))
        return [float(len(str(completion))) for completion in completions]

    settings = {"max_steps": 1, "max_completion_length": 60, "log_completions": True}
    trainer = build(agent_dirs, tokenizer, tmp_path, reward_funcs=graded, **settings)
    trainer.train()
    assert "A table of completions could not be written (Arrow" in caplog.text
    assert any("reward" in log for log in trainer.state.log_history), "the metrics were logged"


def test_a_backend_that_refuses_metrics_still_ends_the_run(agent_dirs, tokenizer, tmp_path):
    class Refuse(TrainerCallback):
        def on_log(self, args, state, control, **kwargs):
            raise ConnectionError("no such project")

    settings = {"max_steps": 1, "max_completion_length": 60, "log_completions": True}
    trainer = build(agent_dirs, tokenizer, tmp_path, callbacks=[Refuse()], **settings)
    with pytest.raises(ConnectionError):
        trainer.train()


# ------------------------------------------------------------------------------------------------- pictures of trees


@pytest.mark.parametrize("failing", ["arpo_trl.viewer.picture.draw_tree", "arpo_trl.reporting.report_image"])
def test_a_tree_that_cannot_be_drawn_or_uploaded_ends_no_run(
    agent_dirs, tokenizer, tmp_path, monkeypatch, caplog, failing
):
    def fail(*args):
        raise RuntimeError(f"{failing} is broken")

    monkeypatch.setattr(failing, fail)
    trainer = build(agent_dirs, tokenizer, tmp_path, max_steps=1, max_completion_length=60, log_tree_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1
    assert f"A tree could not be written or logged (RuntimeError('{failing} is broken'))" in caplog.text


def test_a_tree_each_two_steps_goes_to_disk_and_to_every_backend(events, logged):
    files = sorted((logged / "run" / "trees").iterdir())
    assert [path.name for path in files] == ["step-000000.png", "step-000002.png"]
    drawn = [np.asarray(Image.open(path).convert("RGB")) for path in files]

    images = events.Images("train/arpo/tree")
    assert [image.step for image in images] == [0, 2]
    for image, expected in zip(images, drawn, strict=True):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(image.encoded_image_string))), expected)
    contents = {path.read_bytes() for path in files}
    assert {path.read_bytes() for path in (logged / "trackio").rglob("*.png")} == contents
    assert {path.read_bytes() for path in logged.glob("wandb/offline-run-*/files/media/images/**/*.png")} == contents


def row(number: int, parent=None, fork_token=None, entropy=0.0, advantage=0.0) -> dict:
    kind = "initial" if parent is None else "fork"
    segments = [{"start": 0, "end": 40, "entropy": 0.0}, {"start": 60, "end": 100, "entropy": entropy}]
    numbers = {"row": number, "parent": parent, "fork_token": fork_token, "advantage": advantage, "step": 7}
    return {**numbers, "kind": kind, "completion_ids": [0] * 100, "segments": segments, "rewards": {"right": 1.0}}


def test_each_row_is_followed_by_its_forks_the_latest_nearest():
    rows = [row(0), row(1), row(2, 0, 60), row(3, 0, 90), row(4, 2, 80)]
    assert [lane["row"] for lane in picture._in_lanes(rows)] == [0, 3, 2, 4, 1]
    assert [lane["row"] for lane in picture._in_lanes(rows[1:])] == [1, 2, 4, 3]  # row 0 was lost


def test_rows_without_a_parent_or_a_score_are_drawn():
    unscored = row(1, 0, 60, advantage=None)
    unscored["rewards"] = {"right": None}
    assert picture.draw_tree([unscored, row(2, advantage=float("nan"))]).startswith(b"\x89PNG")


def test_colours_are_those_of_entropy_and_advantage():
    png = picture.draw_tree([row(0, advantage=1.0), row(1, 0, 60, entropy=2.0, advantage=-1.0)])
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)

    def drawn(colour: str) -> np.ndarray:
        return (np.abs(pixels - np.array(to_rgb(colour)) * 255).max(axis=-1) < 2).nonzero()

    # left of the colour bar: 80 certain tokens of row 0, 40 uncertain ones of its fork, which draws no shared token
    certain, uncertain = (drawn(colour)[1] < 0.85 * pixels.shape[1] for colour in (picture.LOW, picture.HIGH))
    assert certain.sum() / uncertain.sum() == pytest.approx(2, rel=0.1)
    for colour in (picture.POSITIVE, picture.NEGATIVE):
        assert len(drawn(colour)[0]) > 10


def test_no_matplotlib_is_told_before_a_model_is_loaded(tmp_path, monkeypatch, agent_dirs, tokenizer):
    monkeypatch.setattr(checks, "is_matplotlib_available", lambda: False)
    with pytest.raises(ImportError, match=r"log_tree_steps.*pip install 'arpo-trl\[viewer\]'"):
        build(agent_dirs, tokenizer, tmp_path, log_tree_steps=1)


def test_steps_between_trees_are_not_negative(tmp_path, agent_dirs, tokenizer):
    with pytest.raises(ValueError, match="`log_tree_steps` is -1; set it to 0 or more"):
        build(agent_dirs, tokenizer, tmp_path, log_tree_steps=-1)
