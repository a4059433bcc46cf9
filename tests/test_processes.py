"""Two real processes under `accelerate launch` (gloo, CPU), and a run that is killed with SIGKILL."""

import contextlib
import gzip
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from processes_script import resumable
from transformers import AutoModelForCausalLM

from arpo_trl.rollout.metrics import CALL_KINDS
from arpo_trl.rollout.record import call_kind
from arpo_trl.viewer.records import read_file

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "examples" / "accelerate_configs"
SCRIPT = str(ROOT / "tests" / "processes_script.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "DS_ACCELERATOR": "cpu"}


def launch(config: str, scenarios: str, folder: Path, checkpoint: str, timeout: int = 400) -> dict[str, "Run"]:
    """Run scenarios on two processes with a config of `examples/`; a deadlock ends with the time-out."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    options = f"--num_processes 2 --mixed_precision no --main_process_port {port}".split()
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *options]
    command += ["--config_file", str(CONFIGS / config), SCRIPT, scenarios, str(folder), checkpoint]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=ENVIRONMENT)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = "a deadlock"
            process.terminate()  # the launcher ends its processes, which have sessions of their own
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(40)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    assert code == 0, f"{code}: {(folder / 'log').read_text()[-6000:]}"
    return {name: Run(folder / name) for name in scenarios.split(",")}


class Run:
    """What a scenario left behind."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.facts = [json.loads((folder / f"process-{rank}.json").read_text()) for rank in (0, 1)]
        self.weights = [torch.tensor(facts["weights"] or []) for facts in self.facts]
        self.logs = [log for log in self.facts[0]["logs"] if "loss" in log]

    def records(self, rank: int, step: int = 0) -> list[dict]:
        return read_file(self.folder / "rollouts" / f"step-{step:06d}-rank{rank}.jsonl.gz")[0]

    def tree(self, rank: int) -> list[tuple]:
        return [(record["row"], record["kind"], record["parent"]) for record in self.records(rank)]


@pytest.fixture(scope="module")
def runs(agent_dirs, tmp_path_factory):
    names = "split,uneven,hang,eager,continuous,contrast,agent-whole,agent-split,agent-shared,agent-stock"
    names += ",multimodal,images"
    return launch("multi_gpu.yaml", names, tmp_path_factory.mktemp("ddp"), agent_dirs["chat_template"])


@pytest.fixture(scope="module", params=["fsdp2", "deepspeed_zero2", "deepspeed_zero3"])
def sharded(request, agent_dirs, tmp_path_factory):
    if request.param.startswith("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    folder, names = tmp_path_factory.mktemp(request.param), "uneven,agent-whole,agent-split"
    if request.param != "deepspeed_zero3":  # under which transformers builds no such model from a config
        names += ",images"
    return request.param, launch(f"{request.param}.yaml", names, folder, agent_dirs["chat_template"])


def test_a_group_split_over_both_makes_the_trees_of_its_parts(runs):
    """Rows 0–2 here and 3–5 there, N = 3: one initial trajectory here (3·3//6), two there; a budget of 3 each."""
    run = runs["split"]
    # Here: A forks once at its only result, then the last row starts from the prompt
    assert run.tree(0) == [(0, "initial", None), (1, "fork", 0), (2, "supplement", None)]
    # There: B and C ask in the same wave for the one row left, and C is less sure than B
    assert run.tree(1) == [(3, "initial", None), (4, "initial", None), (5, "fork", 4)]
    # Here: to the call, to the end, the fork, and two for the supplement. There: to the call, to the end, the fork,
    # and two in which it has nothing to do but to join with a row of its own
    assert [facts["batches"] for facts in run.facts] == [[1, 1, 1, 1, 1], [2, 2, 1, 1, 1]]


def test_waves_of_unequal_length_and_a_process_with_nothing_to_do(runs):
    run = runs["uneven"]
    for rank in (0, 1):
        assert [kind for _, kind, _ in run.tree(rank)] == ["initial"] * 2 + ["supplement"] * 2
    assert [len(record["tool_calls"]) for record in run.records(0)] == [3] * 4
    assert [len(record["tool_calls"]) for record in run.records(1)] == [0] * 4
    # Four waves of two rows, twice, here; two waves there, and six in which it joins with a row of its own
    assert [facts["batches"] for facts in run.facts] == [[2] * 8, [2, 2, 1, 1, 1, 1, 1, 1]]


def test_text_on_a_multimodal_checkpoint_whose_vision_tower_gets_no_gradient(runs):
    run = runs["multimodal"]
    for rank in (0, 1):
        assert [kind for _, kind, _ in run.tree(rank)] == ["initial"] * 2 + ["fork"] * 2
        assert all(record["tool_calls"][0]["error"] is None for record in run.records(rank))
    here, there = run.weights
    assert torch.equal(here, there) and run.logs[0]["grad_norm"] > 0


def check_images(run: Run):
    """The script has compared what each process scores with the model, each row and its images alone."""
    for rank, in_prompt in ((0, 1), (1, 0)):
        records = run.records(rank)
        assert [record["kind"] for record in records] == ["initial"] * 2 + ["fork"] * 2
        for record in records:
            shown = [block for call in record["tool_calls"] for block in call["result"] if block["type"] == "image"]
            assert len(record["tool_calls"]) == 2 - rank and len(record["images"]) == in_prompt + len(shown)
    counts = [{len(record["images"]) for record in run.records(rank)} for rank in (0, 1)]
    assert len(counts[0]) > 1 and counts[1] == {0, 1}
    assert all(torch.isfinite(torch.tensor(log["loss"])) and log["grad_norm"] > 0 for log in run.logs)


def test_images_here_and_there_where_not_every_row_has_some(runs):
    check_images(runs["images"])
    assert torch.equal(*runs["images"].weights)


def test_a_tool_that_hangs_on_one_process(runs):
    run = runs["hang"]
    for step in (0, 1):
        here, there = run.records(0, step), run.records(1, step)
        assert [record["row"] for record in here + there] == [0, 1, 2, 3]
        assert all(call["error"] is None for record in here for call in record["tool_calls"])
        assert all("gave no answer within 1 s" in call["error"] for record in there for call in record["tool_calls"])
    assert [log["tools/s/failures"] for log in run.logs] == [2, 2]
    assert all(log["tools/s/seconds_max"] >= 1 for log in run.logs), "the maximum is over both"


def test_the_continuous_schedule_on_two_processes(runs):
    run = runs["continuous"]
    for step in (0, 1):
        for rank, calls in ((0, 3), (1, 1)):
            records = run.records(rank, step)
            assert [record["row"] for record in records] == [0, 1, 2, 3]
            assert all([call["result"] for call in record["tool_calls"]] == ["found"] * calls for record in records)
        assert any(record["kind"] == "fork" for record in run.records(1, step))
    # No process samples because another one does: the rows of its own are all that its batches hold
    for rank, segments in ((0, 2 * 4 * 4), (1, None)):
        records = [record for step in (0, 1) for record in run.records(rank, step)]
        own = sum(
            segment["start"] >= (record["fork_token"] or 0) for record in records for segment in record["segments"]
        )
        assert sum(run.facts[rank]["batches"]) == own and own == (segments or own)
    assert torch.equal(*run.weights)


def test_the_eager_schedule_on_two_processes(runs):
    run = runs["eager"]
    for step in (0, 1):
        for rank in (0, 1):
            records = run.records(rank, step)
            assert [record["row"] for record in records] == [0, 1, 2, 3]
            assert all([call["result"] for call in record["tool_calls"]] == ["found"] * 2 for record in records)
    # A row that waits for its tool does not hold up the other process, which takes part in every wave all the same
    assert len(run.facts[0]["batches"]) == len(run.facts[1]["batches"])
    assert torch.equal(*run.weights)


def test_rewards_in_the_midst_of_a_rollout_and_forks_that_differ(runs):
    """A group with one reward here, one that is filled there: both score together, and sample forks anew together."""
    run = runs["contrast"]
    assert [record["kind"] for record in run.records(0)] == ["initial"] * 2
    there = run.records(1)
    assert len(there) == 6 and {record["kind"] for record in there} > {"initial"}
    assert sum(record["advantage"] for record in there) == pytest.approx(0.0, abs=1e-3)
    assert len({record["rewards"]["length"] for record in there}) == 2
    assert run.logs[0]["arpo/idle"] == 2.0, "four of the rows of two groups"
    assert torch.equal(*run.weights)


@pytest.mark.parametrize("name", ["split", "uneven", "hang", "agent-whole", "agent-split"])
def test_metrics_are_those_of_all_processes(runs, name):
    run = runs[name]
    for step, log in enumerate(run.logs):
        records = run.records(0, step) + run.records(1, step)
        calls = [call for record in records for call in record["tool_calls"]]
        kinds = Counter(map(call_kind, calls))
        assert {kind: log[f"tools/calls_{kind}"] for kind in CALL_KINDS} == {kind: kinds[kind] for kind in CALL_KINDS}
        assert log["tools/calls_made"] == len(calls) >= kinds["executed"] > 0
        size = 1 + max(record["row"] for record in records)
        for kind, metric in (("initial", "initial"), ("fork", "forks"), ("supplement", "supplements")):
            per_group = sum(record["kind"] == kind for record in records) * size / len(records)
            assert log[f"arpo/{metric}"] == pytest.approx(per_group)


def check_agent(run: Run, split: bool):
    for step in (0, 1):
        groups = defaultdict(list)
        for rank in (0, 1):
            for record in run.records(rank, step):
                groups[record["prompt_index"] if split else (rank, record["prompt_index"])].append(record)
        assert len(groups) == (1 if split else 4)
        for group in groups.values():
            assert [record["row"] for record in group] == list(range(8 if split else 4)), "a whole group, in order"
            assert len({tuple(record["prompt_ids"]) for record in group}) == 1
            assert sum(record["kind"] == "initial" for record in group) == (4 if split else 2)
            assert sum(record["advantage"] for record in group) == pytest.approx(0, abs=1e-3)
            for record in group:
                if record["kind"] == "fork":
                    parent, shared = group[record["parent"]], record["fork_token"]
                    assert record["completion_ids"][:shared] == parent["completion_ids"][:shared]
        first = [record["completion_ids"] for record in run.records(0, step) + run.records(1, step)]
        assert len({tuple(ids) for ids in first}) > len(first) // 4, "the processes sample on their own"
    assert torch.equal(*run.weights), "both processes hold the same weights"
    assert all(torch.isfinite(torch.tensor(log["loss"])) and log["grad_norm"] > 0 for log in run.logs)


@pytest.mark.parametrize("name", ["agent-whole", "agent-split"])
def test_an_agent_trains_on_whole_and_on_split_groups(runs, name):
    check_agent(runs[name], split=name == "agent-split")


def test_prefix_sharing_leaves_the_weights_as_they_are(runs):
    shared, stock = runs["agent-shared"].weights[0], runs["agent-stock"].weights[0]
    assert torch.allclose(shared, stock, atol=1e-5)
    assert not torch.equal(shared, stock), "prefixes were shared"
    told = [
        [{name: log[name] for name in log if name.startswith("arpo/") and "fraction" in name} for log in facts["logs"]]
        for facts in runs["agent-shared"].facts
    ]
    assert told[0] == told[1], "of the tokens of both processes"
    assert told[0][0]["arpo/packed_token_fraction"] == 1 and told[0][0]["arpo/computed_token_fraction"] < 1


def test_sharding_does_what_data_parallel_does(runs, sharded):
    config, sharded_runs = sharded
    if "images" in sharded_runs:
        check_images(sharded_runs["images"])
    for name in ("uneven", "agent-whole", "agent-split"):
        run = sharded_runs[name]
        facts = run.facts[0]
        assert facts["distributed"] == ("FSDP" if config == "fsdp2" else "DEEPSPEED")
        assert facts["sharded"] == (config != "deepspeed_zero2"), "ZeRO-2 shards gradients and optimiser state alone"
        assert [facts["batches"] for facts in run.facts] == [facts["batches"] for facts in runs[name].facts]
        for rank in (0, 1):
            assert run.tree(rank) == runs[name].tree(rank)
    for name in ("agent-whole", "agent-split"):
        run = sharded_runs[name]
        check_agent(run, split=name == "agent-split")
        saved = AutoModelForCausalLM.from_pretrained(run.folder / "final")
        saved = torch.cat([parameter.detach().flatten() for parameter in saved.parameters()])
        assert torch.allclose(saved, runs[name].weights[0], atol=1e-4), "`save_model` writes whole weights"


def test_the_accelerate_configs_hold_only_what_accelerate_knows():
    known = {action.dest for action in launch_command_parser()._actions}
    paths = sorted(CONFIGS.glob("*.yaml"))
    assert [path.stem for path in paths] == ["deepspeed_zero2", "deepspeed_zero3", "fsdp2", "multi_gpu"]
    for path in paths:
        config = yaml.safe_load(path.read_text())
        own = {"compute_environment", "distributed_type", "fsdp_config", "deepspeed_config"}
        assert set(config) - own <= known
        assert {*config.get("fsdp_config", {}), *config.get("deepspeed_config", {})} <= known


def test_a_run_that_was_killed_ends_with_the_weights_of_one_that_was_not(agent_dirs, tmp_path):
    checkpoint, folder = agent_dirs["chat_template"], tmp_path / "victim"
    folder.mkdir()
    with (tmp_path / "log").open("wb") as log:
        command = [sys.executable, SCRIPT, "victim", str(tmp_path), checkpoint]
        environment = {**ENVIRONMENT, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment)
        try:
            deadline = time.monotonic() + 180
            while not (folder / "in-step-3").exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == -signal.SIGKILL, (tmp_path / "log").read_text()[-6000:]
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2"]
    # What a kill in the middle of writing leaves: the step is done, and recorded, once more
    (folder / "rollouts" / "step-000002.jsonl.gz").write_bytes(gzip.compress(b'{"step": 2, "prompt_ind')[:-4])

    resumed = resumable(folder, checkpoint)
    resumed.train(resume_from_checkpoint=True)
    whole = resumable(tmp_path / "whole", checkpoint)
    whole.train()
    assert resumed.state.global_step == whole.state.global_step == 4
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name

    def recorded(folder):
        paths = sorted((folder / "rollouts").iterdir())
        lines = [(path.name, record) for path in paths for record in read_file(path)[0]]
        return [(name, record["row"], record["kind"], record["completion_ids"]) for name, record in lines]

    assert recorded(folder) == recorded(tmp_path / "whole"), "also of the steps before the kill"
