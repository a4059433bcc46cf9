"""`make reproduce`: its arithmetic by hand, its verdicts, its page, and that the same seed gives the same curve."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import demo_world  # noqa: E402
import reproduce  # noqa: E402
import reproduce_report as report  # noqa: E402
from demo import CPU  # noqa: E402
from reproduce import ARMS, COMMON, GRID, SEEDS  # noqa: E402

from arpo_trl import ARPOConfig  # noqa: E402


def made_up(world="easy", arm="arpo", seed=0, accuracies=(0.5, 0.7, 0.8), calls=10, compared_at=2):
    """A run of one step between two evaluations, each of which executes `calls` calls."""
    steps = len(accuracies) - 1
    step = {"calls_executed": calls, "calls_shared": 2, "tokens_sampled": 100, "cpu_seconds": 1.0}
    step |= {"forks_after_call": {} if arm == "grpo" else {"1": 3, "2": 1}}
    evaluations = [
        {"step": i, "accuracy": value, **{f"pass@{k}": value for k in (1, 3, 5)}} for i, value in enumerate(accuracies)
    ]
    entropy = {"before": 2, "mean": [0.1, 0.1, 0.4, 0.2], "tokens": [20, 20, 20, 20]}
    return {
        "world": world,
        "arm": arm,
        "seed": seed,
        "compared_at": compared_at,
        "steps": [step] * steps,
        "evaluations": evaluations,
        "entropy_before": entropy,
        "entropy_after": entropy,
    }


# Arithmetic


def test_isotonic_pools_what_falls():
    assert report.isotonic([1, 3, 2, 4]) == [1, 2.5, 2.5, 4]
    assert report.isotonic([3, 2, 1]) == pytest.approx([2] * 3)
    assert report.isotonic([0.1, 0.2]) == [0.1, 0.2]


def test_first_reach_reads_between_the_points():
    assert report.first_reach([0, 10, 20], [0.5, 0.7, 0.8], 0.6) == pytest.approx(5)
    assert report.first_reach([0, 10, 20], [0.5, 0.7, 0.8], 0.8) == 20
    assert report.first_reach([0, 10, 20], [0.5, 0.8, 0.8], 0.8) == 10  # the start of the plateau
    assert report.first_reach([0, 10], [0.5, 0.7], 0.71) == math.inf


def test_cost_ratio_by_hand():
    grpo = made_up(arm="grpo", accuracies=(0.5, 0.6, 0.8), calls=20)  # 0.8 after 40 calls
    arpo = made_up(accuracies=(0.5, 0.8, 0.8), calls=10)  # 0.8 after 10
    assert report.cost_ratio(arpo, grpo, "calls_executed") == pytest.approx(10 / 40)
    assert report.cost_ratio(grpo, grpo, "calls_executed") == 1
    # half of GRPO's gain is 0.65: GRPO has it after 20 + 20 · 0.05 / 0.2 = 25 calls, ARPO after 10 · 0.15 / 0.3 = 5
    assert report.cost_ratio(arpo, grpo, "calls_executed", 0.5) == pytest.approx(5 / 25)
    assert report.cost_ratio(made_up(accuracies=(0.5, 0.6, 0.7)), grpo, "calls_executed") == math.inf


def test_arms_are_compared_at_one_step_and_may_train_on():
    grpo = made_up(arm="grpo", accuracies=(0.5, 0.6, 0.8), calls=20)
    longer = made_up(accuracies=(0.5, 0.6, 0.7, 0.9), calls=10)
    assert report.final(longer) == 0.7 and report.total(longer, "calls_executed") == 20
    # 0.8 lies half way between the evaluations after 20 and 30 calls; GRPO had it after 40
    assert report.cost_ratio(longer, grpo, "calls_executed") == pytest.approx(25 / 40)
    # As a base it ends where it is compared: 0.7, after 20 calls. GRPO has that after 30
    assert report.cost_ratio(grpo, longer, "calls_executed") == pytest.approx(30 / 20)


def test_a_median_of_many_that_never_arrive_is_infinite():
    assert report.median([0.4, math.inf, 0.5]) == 0.5
    assert report.median([0.4, math.inf, math.inf]) == math.inf
    assert report.median([0.4, math.inf]) == math.inf


def test_an_interval_holds_its_value_and_repeats():
    estimate = report.estimate([0.1, 0.2, 0.3, 0.4, 0.5])
    assert estimate["value"] == pytest.approx(0.3)
    # t of 4 degrees of freedom · standard deviation / √5
    assert estimate["high"] - 0.3 == pytest.approx(2.776 * 0.1581139 / 5**0.5, rel=1e-4) == 0.3 - estimate["low"]
    middle = report.estimate([0.1, 0.2, 0.3, 0.4, 0.5], report.median)
    assert middle["value"] == 0.3 and 0.1 <= middle["low"] < 0.3 < middle["high"] <= 0.5
    assert middle == report.estimate([0.1, 0.2, 0.3, 0.4, 0.5], report.median)
    one = report.estimate([0.1])
    assert one["low"] == -math.inf and one["high"] == math.inf


# Verdicts


def runs_of(*runs) -> report.Runs:
    collected = report.Runs()
    for run in runs:
        collected.setdefault((run["world"], run["arm"]), {})[run["seed"]] = run
    return collected


def test_half_of_the_calls_is_decided_by_median_and_interval():
    base = [made_up(arm="grpo", seed=seed, accuracies=(0.5, 0.6, 0.8), calls=20) for seed in range(3)]
    fast = [made_up(seed=seed, accuracies=(0.5, 0.8, 0.8)) for seed in range(3)]
    assert report.calls_claim(runs_of(*base, *fast), "easy", "arpo")[0] is True
    # one seed that never arrives leaves the median at a quarter, but the interval reaches infinity
    slow = made_up(seed=2, accuracies=(0.5, 0.6, 0.6))
    assert report.calls_claim(runs_of(*base, *fast[:2], slow), "easy", "arpo")[0] is False
    assert report.calls_claim(runs_of(*base), "easy", "arpo")[0] is None


def test_where_an_arm_stands_that_trained_on():
    base = [made_up(arm="grpo", seed=seed, accuracies=(0.5, 0.6, 0.8), calls=20) for seed in range(2)]
    longer = [made_up(seed=seed, accuracies=(0.5, 0.6, 0.7, 0.85)) for seed in range(2)]
    said = report.trained_on(runs_of(*base, *longer), "easy", "arpo")
    # 3 steps of 10 calls against 2 of 20; 0.85 against 0.8
    assert "to step 3 it has executed 0.75 of them and is +5.0 (+5.0 to +5.0) points above" in said
    assert report.trained_on(runs_of(*base, made_up()), "easy", "arpo") == ""


def test_how_accuracy_was_read_is_told_in_numbers():
    run = made_up()
    for entry, sampled in zip(run["evaluations"], (0.9, 0.68, 0.84), strict=True):
        entry |= {"sampled": sampled, "otherwise": 0.02 * entry["step"]}
    said = report.measured([run])
    assert "3.0 % of the answers (median of 2 evaluations), 4 % in the one run" in said  # 0.02 and 0.04; not the start
    assert "+1.0 points away, with a standard deviation of 3.0" in said  # 0.68 − 0.7 and 0.84 − 0.8
    assert report.measured([made_up()]) == ""


def test_entropy_has_to_beat_the_control():
    entropy = [made_up(seed=seed, accuracies=(0.5, 0.7, 0.8 + seed / 100)) for seed in range(3)]
    same = [made_up(arm="random", seed=seed, accuracies=(0.5, 0.7, 0.8 + seed / 100)) for seed in range(3)]
    worse = [made_up(arm="random", seed=seed, accuracies=(0.5, 0.6, 0.7)) for seed in range(3)]
    assert report.entropy_claim(runs_of(*entropy, *same), "easy", "arpo", "random")[0] is False
    assert report.entropy_claim(runs_of(*entropy, *worse), "easy", "arpo", "random")[0] is True


# The page


def test_the_page_says_what_is_missing_and_what_does_not_hold(tmp_path):
    (tmp_path / "runs").mkdir()
    for seed in range(2):
        for run in (made_up(arm="grpo", seed=seed), made_up(seed=seed, accuracies=(0.5, 0.6, 0.7))):
            (tmp_path / "runs" / f"easy-{run['arm']}-{seed}.json").write_text(json.dumps(run))
    grid = [("easy", "grpo", (0, 1)), ("easy", "arpo", (0, 1, 2)), ("easy", "random", (0,))]
    page = report.write(tmp_path, grid, docs=tmp_path / "docs").read_text()
    assert "4 of the grid's 6 runs are in" in page
    assert "easy arpo (seeds 2); easy random (seeds 0)" in page
    assert "**Does not hold.** ARPO reaches GRPO's accuracy with at most half of the calls." in page
    assert "**Does not hold.** ARPO ends at or above GRPO. Difference in points: -10.0" in page
    assert "**Not run.** Branching by entropy beats branching at random." in page
    for name in report.FIGURES:
        assert (tmp_path / "docs" / "results" / f"{name}.png").stat().st_size > 1000
        assert f"results/{name}.png" in page
    numbers = json.loads((tmp_path / "docs" / "results" / "numbers.json").read_text())
    assert numbers["easy"]["arpo"]["calls"]["value"] is None  # never reached
    assert numbers["easy"]["arpo"]["difference"]["value"] == pytest.approx(-0.1)


def test_without_runs_it_says_what_to_do(tmp_path):
    with pytest.raises(SystemExit, match="make reproduce"):
        report.write(tmp_path, GRID, docs=tmp_path / "docs")


# Accuracy without the noise of sampling


def answers(*pairs):
    completions, correct = zip(*pairs, strict=True)
    return {"completions": [[{"role": "assistant", "content": text}] for text in completions], "correct": correct}


def test_what_is_right_in_another_way_is_the_correction():
    records = [
        answers(("shown", True), ("shown and more", True)),  # nothing beside the demonstration
        answers(("other", True), ("wrong", False)),
        answers(("shown and then wrong", False), ("wrong", False)),
    ]
    assert reproduce.right_otherwise(["shown"], records[:1]) == (0, None)
    assert reproduce.right_otherwise(["shown"] * 3, records) == (0, "other")  # + 1 − 1
    assert reproduce.right_otherwise(["shown"], records[1:2]) == (1 / 2, "other")


def test_the_probability_of_the_demonstration_is_that_of_sampling_it(started):
    """Against the frequency with which each token of it is sampled: exact, position by position, row by row."""
    import torch
    from transformers import AutoModelForCausalLM

    from arpo_trl.data import tags_sft_features

    world, tokenizer, _ = reproduce.load("easy")
    model = AutoModelForCausalLM.from_pretrained(started / "cold_start" / "easy").eval()
    questions = world.questions("held_out")[:3]
    batched = reproduce.demonstration_probabilities(model, tokenizer, world, questions, batch_size=2)
    for question, probability in zip(questions, batched, strict=True):
        messages = [
            {"role": "user", "content": question.text},
            {"role": "assistant", "content": world.trace(question)},
        ]
        features = tags_sft_features(tokenizer, messages)
        expected = 1.0
        for place, (token, own) in enumerate(zip(*features.values(), strict=True)):
            if own and token != tokenizer.eos_token_id:  # one forward for each token, nothing padded
                logits = model(torch.tensor([features["input_ids"][:place]])).logits[0, -1]
                expected *= logits.softmax(-1)[token].item()
        assert probability == pytest.approx(expected, rel=1e-4)
        assert 0 < probability < 1


# The grid


def test_every_arm_can_be_configured_and_sees_as_many_questions_a_step(tmp_path):
    for arm, own in ARMS.items():
        args = ARPOConfig(str(tmp_path), **{**COMMON, **own}, **CPU, max_steps=1)
        assert args.num_generations == (8 if arm == "small" else 16), arm
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
        assert rows / args.num_generations == 4, arm
        assert args.steps_per_generation == args.gradient_accumulation_steps, arm


def test_the_main_comparison_has_five_seeds_in_both_worlds():
    seeds = {}
    for world, arm, own in GRID:
        assert arm in ARMS
        seeds.setdefault((world, arm), set()).update(own)
    for world in ("easy", "hard"):
        for arm in ("grpo", "arpo", "random", "expansion", "expansion_random", "small"):
            assert seeds[world, arm] == set(SEEDS) and len(SEEDS) >= 5


def test_the_tool_runs_sums_and_differences_only():
    assert reproduce.python("print(1999-1942)") == "57"
    assert reproduce.python("print(-3+1942)") == "1939"
    with pytest.raises(ValueError, match="only print"):
        reproduce.python("print(open('x'))")


# Runs


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A folder with a cold start that has seen little, in a world with few demonstrations."""
    directory = tmp_path_factory.mktemp("reproduce")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(demo_world.SPLITS, "cold_start", 400)
        reproduce.cold_start("easy", directory, steps=60, questions=2)
    return directory


def without_times(run: dict) -> dict:
    run["steps"] = [{k: v for k, v in step.items() if not k.endswith("_seconds")} for step in run["steps"]]
    return run


def test_the_same_seed_gives_the_same_curve(started, monkeypatch):
    small = {"num_generations": 8, "num_initial_generations": 4, "per_device_train_batch_size": 8}
    for name, value in (small | {"gradient_accumulation_steps": 1, "max_completion_length": 60}).items():
        monkeypatch.setitem(COMMON, name, value)

    def train(seed):
        path = reproduce.run("easy", "arpo", seed, started, steps=2, questions=2)
        run = without_times(json.loads(path.read_text()))
        path.unlink()
        return run

    first = train(0)
    assert first == train(0)  # every reward, norm of a gradient, entropy and count, to the last bit
    other = train(1)
    assert [step["entropy_initial"] for step in first["steps"]] != [step["entropy_initial"] for step in other["steps"]]
    assert sum(step["calls_executed"] for step in first["steps"]) > 0
    assert [entry["step"] for entry in first["evaluations"]] == [0, 2]
    for entry in first["evaluations"]:
        assert entry["accuracy"] == pytest.approx(entry["demonstrated"] + entry["otherwise"], abs=2e-6)


WORKER = """
import multiprocessing, os, sys, time
from concurrent.futures import ProcessPoolExecutor

sys.path.insert(0, {examples!r})
import reproduce

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=reproduce._quiet) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 300).result()
"""


def test_workers_end_with_the_command_however_it_ends(tmp_path):
    """Else a grid that was killed goes on in the background, and races with the one that takes it up."""
    script = tmp_path / "command.py"
    script.write_text(WORKER.format(examples=str(Path(reproduce.__file__).parent)))
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as command:
        worker = psutil.Process(int(command.stdout.readline()))
        command.kill()
    for _ in range(300):
        if not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.1)
    else:
        worker.kill()
        pytest.fail("the worker goes on without the command")


def test_what_is_finished_is_not_run_again(started, monkeypatch):
    path = started / "runs" / "easy-arpo-7.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text("done")
    monkeypatch.setattr(reproduce, "load", lambda world: pytest.fail("it ran again"))
    assert reproduce.run("easy", "arpo", 7, started) == path
    assert reproduce.cold_start("easy", started) == started / "cold_start" / "easy"
    assert path.read_text() == "done"


def test_the_command_with_everything_finished_only_writes_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "GRID", [("easy", "grpo", (0,)), ("easy", "arpo", (0,)), ("easy", "arpo", (0,))])
    for name in ("OMP_NUM_THREADS", "TQDM_DISABLE", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "1")  # what the command sets for its workers does not outlive the test
    runs = tmp_path / "outputs" / "runs"
    runs.mkdir(parents=True)
    for arm in ("grpo", "arpo"):
        (runs / f"easy-{arm}-0.json").write_text(json.dumps(made_up(arm=arm)))
    reproduce.main(tmp_path / "outputs", workers=2, report_only=False)
    assert "All runs of the grid are in." in (tmp_path / "docs" / "results.md").read_text()
    assert "docs/results.md" in capsys.readouterr().out
