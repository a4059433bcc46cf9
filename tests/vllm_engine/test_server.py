"""TRL's server mode, with a `vllm serve` process: all but NCCL, which carries the weights, is the real thing."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import world
from server_weights import send_through_file

from arpo_trl.evaluation import Agent

HERE = Path(__file__).parent
SCRIPT = str(HERE / "server_script.py")
CONFIG = str(HERE.parents[1] / "examples" / "accelerate_configs" / "multi_gpu.yaml")


@pytest.fixture(scope="module", params=["chat_template", "tags"])
def trained(request, agents, server, tmp_path_factory):
    """
    A trainer after two steps, and the checkpoint it began with. The server starts with the other protocol's agent.
    """
    protocol = request.param
    with pytest.MonkeyPatch.context() as patch:
        send_through_file(patch.setattr)
        trainer = world.trainer(
            tmp_path_factory.mktemp(protocol),
            agents[protocol],
            protocol,
            vllm_mode="server",
            vllm_server_base_url=server,
        )
        trainer.train()
        yield trainer, agents[protocol]


def test_steps_with_forks_sample_from_the_present_policy(trained):
    trainer, _ = trained
    steps = [world.records(trainer.args.output_dir, step) for step in range(2)]
    world.check_two_steps(trainer.state.log_history, steps)


def test_logprobs_and_limits_of_rows_that_share_prefixes(trained):
    trainer, checkpoint = trained
    row = world.records(trainer.args.output_dir, 0)[0]
    prompt, completion = row["prompt_ids"], row["completion_ids"]
    contexts = [prompt, prompt, prompt + completion[:12], prompt + completion[:25], *world.STRANGE]
    samples = world.check_samples(trainer, checkpoint, contexts, [3, 40, 7, 60] + [20] * 8)
    assert len(samples[0].ids) == 3


def test_segments_that_come_one_by_one(trained):
    trainer, checkpoint = trained
    assert trainer._schedule == "continuous"
    contexts = [(world.STRANGE[0] * 30)[:508], *world.STRANGE]
    samples = world.check_samples(trainer, checkpoint, contexts, [40] * 9, by_stream=True)
    assert len(samples[0].ids) <= 4, "the server was started with a context of 512 tokens"


def test_a_row_near_the_end_of_the_servers_context_does_not_stop_the_others(trained):
    trainer, checkpoint = trained
    contexts = [(world.STRANGE[0] * 30)[:508], *world.STRANGE]
    samples = world.check_samples(trainer, checkpoint, contexts, [40] * 9)
    assert len(samples[0].ids) <= 4, "the server was started with a context of 512 tokens"
    assert max(len(sample.ids) for sample in samples) > 4


def test_stop_strings_reach_the_server(trained):
    trainer, _ = trained
    if trainer.args.tool_protocol != "tags":
        pytest.skip("the chat template has no stop strings")
    rows = world.records(trainer.args.output_dir, 0)
    calls = [call for row in rows for call in row["tool_calls"]]
    assert calls
    for row in rows:
        for segment in row["segments"]:
            text = trainer.processing_class.decode(row["completion_ids"][segment["start"] : segment["end"] - 1])
            assert "</add>" not in text


def test_the_servers_prefix_cache_is_counted_and_logged(trained):
    trainer, _ = trained
    if trainer.args.tool_protocol == "chat_template":  # prompts of the other are shorter than a block of the cache
        rates = [log["arpo/prefix_cache_hit_rate"] for log in trainer.state.log_history if "loss" in log]
        assert all(0.3 < rate < 1 for rate in rates), rates
    trainer.vllm_generation.vllm_client.reset_prefix_cache()
    trainer._engine.lookups.clear()
    trainer._engine.sample([list(range(10, 310))] * 4, [1] * 4)
    # The first row fills two blocks of 128 tokens, which the other three find
    assert trainer._engine.lookups == {"prefix_cache_queries": 4 * 300, "prefix_cache_hits": 3 * 256}


def test_likely_tokens_are_told_where_entropy_is_read_and_stop_strings_are_found(trained, monkeypatch):
    trainer, _ = trained
    client, asked = trainer.vllm_generation.vllm_client, []
    generate = type(client).generate

    def counted(self, prompts, **settings):
        asked.append((len(prompts), settings["max_tokens"], settings["logprobs"]))
        return generate(self, prompts=prompts, **settings)

    monkeypatch.setattr(type(client), "generate", counted)
    monkeypatch.setattr(trainer._engine, "_entropy_window", 5)
    samples = trainer._engine.sample(world.STRANGE, [60] * 8)
    assert asked[0] == (8, 6, 20) and all(top_k == 0 for _, _, top_k in asked[1:])
    going = [sample for sample in samples if len(sample.ids) > 5]
    assert going and 0 < sum(rows for rows, _, _ in asked[1:])
    trainer.model.eval()
    for context, sample in zip(world.STRANGE, samples, strict=True):
        assert len(sample.entropies) == min(len(sample.ids), 5) and len(sample.ids) <= 60
        told = torch.tensor(sample.logprobs)
        exact = world.sampled(world.exact(trainer.model, context, sample.ids), sample.ids)
        assert (told - exact).abs().max() < world.TOLERANCE, "of the parts as of the whole"
        for stop in trainer._protocol.stop_strings:
            assert stop not in trainer.processing_class.decode(sample.ids[:-1])


def test_evaluation_on_the_server_is_that_on_transformers(trained, server):
    trainer, _ = trained
    trainer.model.eval()
    trainer._engine.sample([[5]], [1])  # brings the server up to date
    rollouts = []
    for model in (server, trainer.model):
        agent = Agent(
            model,
            trainer.processing_class,
            [tiny.add],
            tool_protocol=trainer.args.tool_protocol,
            max_completion_length=world.LONGEST,
            temperature=0.0,
        )
        rollouts.append(agent.rollout([row["prompt"] for row in world.ROWS]))
        agent.close()
    served, transformers = ([(row.completion_ids, row.truncated) for row in rows] for rows in rollouts)
    assert served == transformers
    assert any(row.calls for row in rollouts[0])


@pytest.mark.parametrize("schedule", ["waves", "continuous"])
def test_two_processes_with_different_numbers_of_rows(agents, server, clean_environment, tmp_path, schedule):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "2"]
    command += ["--mixed_precision", "no", "--main_process_port", str(port), "--config_file", CONFIG]
    command += [SCRIPT, str(tmp_path), agents["chat_template"], server, schedule]
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=clean_environment, stdout=output, stderr=output)
        try:
            code = process.wait(400)
        except subprocess.TimeoutExpired:
            code = "a deadlock"
            process.terminate()  # the launcher ends its processes, which have sessions of their own
            process.wait(60)
    assert code == 0, f"{code}: {log.read_text()[-6000:]}"
    facts = [json.loads((tmp_path / f"process-{rank}.json").read_text()) for rank in (0, 1)]
    waves = [facts[rank]["waves"] for rank in (0, 1)]
    if schedule == "waves":
        # Of the three rows that start from the prompt the first process has one, the second two; both are in each wave
        assert waves[0][0] == 1 and waves[1][0] == 2 and len(waves[0]) == len(waves[1])
    else:
        assert waves == [[], []], "no batch is sampled"
    logs = [log for log in facts[0]["logs"] if "loss" in log]
    assert len(logs) == 2
    for step, log in enumerate(logs):
        assert 0 < log["sampling/sampling_logp_difference/max"] < world.TOLERANCE, (
            "each got the answers to its own rows"
        )
        parts = [world.records(tmp_path, step, f"-rank{rank}") for rank in (0, 1)]
        assert [row["row"] for part in parts for row in part] == list(range(8))
        assert log["arpo/initial"] == 3 and log["arpo/forks"] + log["arpo/supplements"] == 5
        assert 0 < log["arpo/prefix_cache_hit_rate"] < 1
    assert sum(log["arpo/forks"] for log in logs) > 0
