"""
Does ARPO deliver? A grid of training runs, written down before any of them was run.

```bash
make reproduce                                  # or, with the environment that it makes:
python examples/reproduce.py --workers 2        # train what is missing, then write docs/results.md and docs/results/
python examples/reproduce.py --report_only      # write them from the runs that are there
```

Every arm starts from the same cold start (one for each world), fills groups of M = 16 (but `small`), sees the same
questions in the same order, is asked the same held-out questions, and is compared after the same number of optimiser
steps. A seed chooses the order of the questions and what is sampled. A finished run is one JSON file and is not run
again; a run that was killed starts anew.

Held-out accuracy is that of answers sampled at temperature 1, but most of it is not sampled: see [`ask`].

Arms that do not branch run in ARPOTrainer with N = M, which is TRL's GRPOTrainer to the bit
(`tests/test_trainer_grpo_equivalence.py`), so that all arms share tools, reward and clock. Equal calls of a group are
executed once, which changes no token (`tests/test_merging.py`): what TRL's GRPO pays is therefore read from the calls
that the rows of `grpo` make, and what merging saves from the calls that it executes.

- `grpo`: the loss of the GRPO and ARPO papers, a mean over each row's tokens (TRL: `loss_type="grpo"`). All ARPO arms
  have it too. `grpo_fast` is the same at twice the learning rate, `grpo_rate` at that of `distinct`, `small` with half
  of the rows.
- `dapo`: TRL's `loss_type="dapo"`, a mean over all tokens, and a clip range that is wider above (0.28), with DAPO's
  dynamic sampling as far as it needs no other prompts: groups with one reward are taken out of the loss. Its overlong
  penalty has nothing to act on here.
- `reinforce_pp`: REINFORCE++ with a group baseline, TRL's `scale_rewards="batch"`.
- `reuse2`, `reuse4`: every batch is used for two or four optimiser steps (`num_iterations`), so that as many steps
  need half or a quarter of the calls.

Learning rates are searched for `grpo` and for `distinct`, on seeds of their own and with the same budget; arms that
branch take that of `distinct`, the others that of `grpo`.

What this does NOT do: large models, real text, or a search for each arm's best learning rate.
"""

import argparse
import json
import multiprocessing
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from pathlib import Path

# What was expected, and what decides it. Written before the runs; the rules are applied in reproduce_report.py.
#
# This is the third grid. The second one (docs/results/second/, seeds 10 to 14) executed every call of every row.
# Within a group most of those were exact repeats, which are now executed once. So the questions are what merging
# leaves of the bill, and what forks, and batches that are used more than once, add to it. `wordy` is new: the demo's
# world in many words, where few calls are exact repeats. Seeds 20 to 24 and 200, 201 were in no run before.
#
# `trl` is `grpo` with every call executed, as TRL does. A cost is the ratio of calls that an arm executes until the
# final accuracy of `trl` and of calls that `trl` executes until then, in pairs of one world and seed. A curve is
# first made non-decreasing (isotonic regression) and read between evaluations along straight lines. All arms but
# `grpo` train on for `MORE_STEPS`, so that one that is a step behind is told from one that never gets there; those
# that still do not count as infinite.
#
# 1. Calls, in the two small worlds: `distinct`, the recommended setting of forks, needs at most 0.20 of the calls of
#    `trl`: the median over seeds is 0.20 or less, its 95 % bootstrap interval lies below 0.5, and the mean of paired
#    differences in final accuracy is 0 or more. The same is asked of `grpo`, which merges and does not branch, and
#    of `arpo`, the paper's method. With reuse (`distinct_reuse`, `reuse2`) at most 0.15. In the wordy world at most
#    0.45.
# 2. No cost: `distinct` ends no lower than `trl` after the same number of steps: the 95 % t interval of the mean
#    paired difference lies above −1 point.
# 3. Forks add something once calls are merged: `distinct`, and `arpo`, need fewer executed calls than merged `grpo`
#    to the final accuracy of `trl`: the interval of the median ratio lies below 1.
# 4. Entropy beats chance: `arpo` against `random`, `distinct` against `distinct_random`: the interval of the mean
#    difference in final accuracy lies above 0, or that of the ratio of executed calls below 1.
# 5. Forks that differ beat those that may repeat: `distinct` against `expansion`, by the rule of 4.
# 6. Spikes. After a tool result the model's entropy is higher than before it: the mean over the first six tokens
#    after is larger than over the last six before it, at the cold start.
#
# 7. Added when the search had found different rates for `grpo` and `distinct`, and the main arms of the demo's world
#    were in: `grpo_rate` tells the gain of forks from that of a rate. 2 and 3, for `distinct` and `arpo` against it.
#
# Expected, from first tries on seeds 10 to 14: 1 holds in the small worlds for all that merge, 3 does not hold
# there, since forks and merging save the same calls, and holds in the wordy world.

STEPS = 30  # optimiser steps after which arms are compared
MORE_STEPS = 6  # that all arms but GRPO go on for
# Steps between two evaluations on held-out questions. In the wordy world accuracy has to be sampled, which is slow
EVALUATE_EVERY = {"easy": 6, "hard": 6, "wordy": 15}
QUESTIONS = 300  # held-out questions
SEEDS = (20, 21, 22, 23, 24)

# The search for a learning rate: the best mean accuracy after STEPS, the smaller rate if two are level
SEARCH_ARMS = ("grpo", "distinct")
SEARCH_RATES = (6e-4, 9e-4, 1.4e-3)
SEARCH_SEEDS = (200, 201)

WORLDS = ("easy", "hard", "wordy")

# Arguments of ARPOConfig that all arms share
COMMON = {
    "num_generations": 16,
    "num_initial_generations": 8,
    "per_device_train_batch_size": 32,
    "gradient_accumulation_steps": 2,
    "max_completion_length": 160,
    "max_tool_calling_iterations": 4,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 2,
    "loss_type": "grpo",
    "tool_protocol": "tags",
}
GRPO = {"num_initial_generations": 16}
# Few rows from the prompt and forks anywhere in the finished tree, as in AT²PO, and the value of a turn as its
# advantage, which is what hard attribution is
EXPANSION = {"num_initial_generations": 4, "branch_rule": "expansion", "advantage_attribution": "hard"}
DISTINCT = {**EXPANSION, "fork_sampling": "distinct"}

ARMS = {
    "grpo": GRPO,
    "grpo_fast": GRPO,
    "grpo_rate": GRPO,
    "small": {"num_generations": 8, "num_initial_generations": 8, "gradient_accumulation_steps": 1},
    "dapo": {**GRPO, "loss_type": "dapo", "epsilon_high": 0.28, "dynamic_sampling": True},
    "reinforce_pp": {**GRPO, "scale_rewards": "batch"},
    "reuse2": {**GRPO, "num_iterations": 2},
    "reuse4": {**GRPO, "num_iterations": 4},
    # The paper's method, its control, and the same with forks that differ
    "arpo": {},
    "random": {"branch_rule": "random"},
    "arpo_distinct": {"fork_sampling": "distinct"},
    # What is not the paper's
    "expansion": EXPANSION,
    "distinct": DISTINCT,
    "distinct_random": {**DISTINCT, "branch_rule": "random_expansion"},
    "weighted": {**EXPANSION, "fork_sampling": "weighted"},
    "novelty": {**DISTINCT, "branch_measure": "novelty"},
    "contrast": {**DISTINCT, "branch_rule": "contrast"},
    "distinct_reuse": {**DISTINCT, "num_iterations": 2},
}

# (world, arm, seeds), in the order in which they are run
SMALL_WORLDS = ("easy", "hard")
GRID = [
    *((world, arm, SEEDS) for world in SMALL_WORLDS for arm in ("grpo", "distinct", "arpo", "distinct_reuse")),
    *(("wordy", arm, SEEDS[:3]) for arm in ("grpo", "distinct", "arpo")),
    *((world, "grpo_rate", SEEDS[:3] if world == "wordy" else SEEDS) for world in WORLDS),
    *((world, arm, SEEDS[:3]) for world in SMALL_WORLDS for arm in ("small", "expansion", "reuse2", "random")),
    *(("wordy", arm, SEEDS[3:]) for arm in ("grpo", "distinct", "arpo")),
    *((world, arm, SEEDS[:3]) for arm in ("distinct_random", "grpo_fast") for world in SMALL_WORLDS),
    *(("wordy", arm, SEEDS[:3]) for arm in ("small", "random", "distinct_reuse")),
    *((world, arm, SEEDS[:3]) for arm in ("dapo", "reinforce_pp", "reuse4") for world in SMALL_WORLDS),
    *(("easy", arm, SEEDS[:3]) for arm in ("arpo_distinct", "weighted", "novelty", "contrast")),
]


def branches(arm: str) -> bool:
    """Whether an arm forks."""
    settings = {**COMMON, **ARMS[arm]}
    return settings["num_initial_generations"] < settings["num_generations"]


def run_name(world: str, arm: str, seed: int, rate: float | None = None) -> str:
    """Name of a run's file. Runs of the search are named by their rate, the others take what it found."""
    return f"{world}-{arm}-{seed}" if rate is None else f"{world}-{arm}@{rate:g}-{seed}"


def found_rate(world: str, arm: str, directory: Path) -> float:
    """The learning rate that the search found for `arm`, from its runs in `directory`."""
    searched = "distinct" if branches(arm) or arm == "grpo_rate" else "grpo"

    def accuracy(rate: float) -> float:
        names = (run_name(world, searched, seed, rate) for seed in SEARCH_SEEDS)
        runs = [json.loads((directory / "runs" / f"{name}.json").read_text()) for name in names]
        return sum(run["evaluations"][-1]["accuracy"] for run in runs) / len(runs)

    return max(SEARCH_RATES, key=accuracy) * (2 if arm == "grpo_fast" else 1)


def python(code: str) -> str:
    """
    Runs a sum or a difference of two whole numbers, without a process of its own.

    Args:
        code: What to run, such as print(1999-1942).
    """
    parts = re.fullmatch(r"print\((-?\d+)([+-])(\d+)\)", code.strip())
    if parts is None:
        raise ValueError("only print(a+b) and print(a-b) are understood")
    first, operator, second = parts.groups()
    return str(int(first) + int(second) if operator == "+" else int(first) - int(second))


def load(world_name: str):
    """A world, its tokenizer and its tools, whose answers depend on their arguments alone."""
    from demo_world import World, build_tokenizer
    from hard_world import HardWorld
    from wordy_world import WordyWorld

    from arpo_trl.tools import tool
    from arpo_trl.tools.search import BM25Search

    world = {"easy": World, "hard": HardWorld, "wordy": WordyWorld}[world_name]()
    search = world.search if world_name == "hard" else BM25Search(world.passages, top_k=1).search
    return world, build_tokenizer(world), [tool(search, deterministic=True), tool(python, deterministic=True)]


def cold_start(world_name: str, directory: Path, steps: int = 1300, questions: int = QUESTIONS) -> Path:
    """
    Train the checkpoint from which all arms of a world start, unless it is there.

    Returns:
        `Path`: its folder; `start.json` in it holds its held-out accuracy and entropies, and the gaps that ARPO reads.
    """
    import torch
    from demo import cold_start as train_cold_start
    from transformers import AutoModelForCausalLM, set_seed

    path = directory / "cold_start" / world_name
    if (path / "start.json").exists():
        return path
    torch.set_num_threads(1)
    world, tokenizer, tools = load(world_name)
    set_seed(0)
    train_cold_start(world, tokenizer, 0, path, steps)
    model = AutoModelForCausalLM.from_pretrained(path)
    held_out = world.rows("held_out")[:questions]
    start = {
        "evaluation": {"step": 0, **ask(model, tokenizer, tools, world, questions)},
        "entropy": entropy_by_position(model, tokenizer, tools, held_out),
        "gaps": entropy_gaps(model, tokenizer, tools, held_out),
    }
    (path / "start.json").write_text(json.dumps(start) + "\n")
    return path


def run(
    world_name: str,
    arm: str,
    seed: int,
    directory: Path,
    rate: float | None = None,
    steps: int | None = None,
    questions: int = QUESTIONS,
) -> Path:
    """
    Train one arm and write what came of it to `<directory>/runs/<world>-<arm>-<seed>.json`.

    Args:
        rate (`float`, *optional*): A learning rate to try; its run is evaluated at the end alone. By default the one
            that the search found.

    Returns:
        `Path`: that file. Its `steps` hold, for each optimiser step, tool calls made and executed, tokens sampled, and
        seconds of processor time and of wall-clock; its `evaluations` the held-out accuracy after some of them.
    """
    import torch
    from datasets import Dataset
    from demo import CPU
    from transformers import AutoModelForCausalLM, TrainerCallback, set_seed

    from arpo_trl import ARPOConfig, ARPOTrainer
    from arpo_trl.rewards import exact_match_reward

    path = directory / "runs" / f"{run_name(world_name, arm, seed, rate)}.json"
    if path.exists():
        return path
    if steps is None:
        steps = STEPS if arm == "grpo" or rate is not None else STEPS + MORE_STEPS
    every = EVALUATE_EVERY[world_name] if rate is None else steps
    settings = {**COMMON, **ARMS[arm], "learning_rate": rate or found_rate(world_name, arm, directory)}
    torch.set_num_threads(1)
    world, tokenizer, tools = load(world_name)
    cold = directory / "cold_start" / world_name
    start = json.loads((cold / "start.json").read_text())
    scratch = directory / "scratch" / path.stem
    shutil.rmtree(scratch, ignore_errors=True)
    set_seed(seed)
    trainer = ARPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(cold),
        args=ARPOConfig(
            str(scratch),
            **settings,
            **CPU,
            disable_tqdm=True,
            max_steps=steps,
            log_rollouts=True,
            logging_steps=1,
            seed=seed,
        ),
        reward_funcs=exact_match_reward,
        train_dataset=Dataset.from_list(world.rows("rl")),
        processing_class=tokenizer,
        tools=tools,
    )
    held_out = world.rows("held_out")[:questions]
    log, evaluations, entropy = [], [start["evaluation"]], {}

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.started = time.perf_counter(), time.process_time()

        def on_step_end(self, args, state, control, **kwargs):
            now = time.perf_counter(), time.process_time()
            log.append({"wall_seconds": now[0] - self.started[0], "cpu_seconds": now[1] - self.started[1]})
            if state.global_step % every == 0 or state.global_step == steps:
                found = ask(trainer.model, tokenizer, tools, world, questions)
                evaluations.append({"step": state.global_step, **found})
                if rate is None and state.global_step == min(steps, STEPS):
                    entropy.update(entropy_by_position(trainer.model, tokenizer, tools, held_out))

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "arpo/initial" in logs:
                log[-1] |= {name: logs[key] for name, key in LOGGED.items() if key in logs}

    trainer.add_callback(Watch())
    trainer.train()
    counts = count_rollouts(scratch / "rollouts")
    for step, entry in enumerate(log, start=1):
        entry |= counts.get(step, NOTHING_SAMPLED)
    result = {
        "world": world_name,
        "arm": arm,
        "seed": seed,
        "arguments": settings,
        "compared_at": min(steps, STEPS),
        "steps": log,
        "evaluations": evaluations,
        "entropy_before": start["entropy"],
        "entropy_after": entropy,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(result) + "\n")
    unfinished.rename(path)
    shutil.rmtree(scratch)
    return path


LOGGED = {
    "reward": "reward",
    "entropy_initial": "arpo/entropy_initial",
    "entropy_after_tool": "arpo/entropy_after_tool",
    "fork_rate": "arpo/fork_rate",
    "shared_token_fraction": "arpo/shared_token_fraction",
    "grad_norm": "grad_norm",
}


def ask(model, tokenizer, tools, world, questions: int) -> dict:
    """
    Held-out accuracy of answers sampled at temperature 1, with little of the noise of sampling.

    Nearly all right answers begin, word for word, with the faultless demonstration. Its probability is a product over
    its tokens, so it is computed. Sampled is only the correction: the share of answers that are right less the share
    that begin so, which is the share of those that are right in another way. It takes one answer to each question (the
    same random numbers at every evaluation), and five where a run has come to answer in another way. The sum has the
    expectation of plain sampling, whose standard error for 300 answers would be 2 to 3 points.

    Returns:
        `dict`: `accuracy`; its parts `demonstrated` and `otherwise`; `sampled`, the plain accuracy of the same
        samples, to compare; `pass@k`, from 1 − (1 − p)^k of each question, in which every answer that is not the
        demonstration has the same chance to be right; `calls_per_completion` and `truncated` of the samples; `example`
        of what is right in another way, or `None`.
    """
    import torch

    from arpo_trl.evaluation import Agent, evaluate, summarize
    from arpo_trl.rewards import exact_match_reward

    training = model.training
    agent = Agent(
        model.eval(),
        tokenizer,
        tools,
        tool_protocol="tags",
        max_completion_length=COMMON["max_completion_length"],
        max_tool_calling_iterations=COMMON["max_tool_calling_iterations"],
        batch_size=questions,
    )
    asked, rows = world.questions("held_out")[:questions], world.rows("held_out")[:questions]
    demonstrations = [world.trace(question) for question in asked]
    for answers in (1, 5):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            records = evaluate(agent, rows, exact_match_reward, num_generations=answers)
        otherwise, example = right_otherwise(demonstrations, records)
        if abs(otherwise) < 0.03:
            break
    agent.close()
    known = demonstration_probabilities(model, tokenizer, world, asked)
    model.train(training)
    demonstrated = sum(known) / len(known)
    luck = otherwise / (1 - demonstrated)  # chance of an answer that is not the demonstration to be right
    rates = [min(max(p + (1 - p) * luck, 0.0), 1.0) for p in known]
    summary = summarize(records)
    return {
        "accuracy": round(demonstrated + otherwise, 6),
        "demonstrated": round(demonstrated, 6),
        "otherwise": round(otherwise, 6),
        "sampled": round(summary["accuracy"], 6),
        **{f"pass@{k}": round(sum(1 - (1 - rate) ** k for rate in rates) / len(rates), 6) for k in (1, 3, 5)},
        **{name: round(summary[name], 6) for name in ("calls_per_completion", "truncated")},
        "example": example,
    }


def demonstration_probabilities(model, tokenizer, world, questions: list, batch_size: int = 50) -> list[float]:
    """
    For each question, the probability that an answer sampled at temperature 1 begins with its faultless demonstration.
    """
    import torch

    from arpo_trl.data import tags_sft_features

    probabilities = []
    for start in range(0, len(questions), batch_size):
        features = []
        for question in questions[start : start + batch_size]:
            user, assistant = {"role": "user", "content": question.text}, world.trace(question)
            features.append(tags_sft_features(tokenizer, [user, {"role": "assistant", "content": assistant}]))
        # The last token is the end of the turn, which some policies forget
        length = max(len(row["input_ids"]) for row in features) - 1
        ids = torch.full((len(features), length), tokenizer.pad_token_id)
        own = torch.zeros(len(features), length)  # padded on the right, which no token before it sees
        for row, feature in enumerate(features):
            tokens = feature["input_ids"][:-1]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            own[row, : len(tokens)] = torch.tensor(feature["completion_mask"][:-1])
        with torch.no_grad():
            logprobs = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        probabilities += (logprobs * own[:, 1:]).sum(1).exp().tolist()
    return probabilities


def right_otherwise(demonstrations: list[str], records: list[dict]) -> tuple[float, str | None]:
    """
    Share of answers that are right less the share that begin with the demonstration, and an answer that is right but
    does not. A demonstration that goes on until it is wrong makes the share smaller.
    """
    difference, answers, example = 0, 0, None
    for demonstration, record in zip(demonstrations, records, strict=True):
        for completion, right in zip(record["completions"], record["correct"], strict=True):
            shown = completion[0]["content"].startswith(demonstration)
            difference += bool(right) - shown
            answers += 1
            if right and not shown and example is None:
                example = completion[0]["content"]
    return difference / answers, example


def entropy_by_position(model, tokenizer, tools, questions: list[dict], before: int = 6, after: int = 12) -> dict:
    """
    Mean entropy in nats of the model's tokens around a tool result: its last `before` tokens before the result and its
    first `after` ones behind it, over all results of one answer to each of 60 questions.
    """
    import torch

    training = model.training
    sums, counts = torch.zeros(before + after), torch.zeros(before + after)
    trajectories = answer_once(model.eval(), tokenizer, tools, questions[:60])
    with torch.no_grad():
        for trajectory in trajectories:
            ids = torch.tensor([trajectory.prompt_ids + trajectory.completion_ids])
            logprobs = model(ids).logits[0].log_softmax(-1)
            entropy = torch.special.entr(logprobs.exp()).sum(-1)[len(trajectory.prompt_ids) - 1 :]
            for left, right in zip(trajectory.segments, trajectory.segments[1:], strict=False):
                head = entropy[max(left.start, left.end - before) : left.end]
                tail = entropy[right.start : min(right.end, right.start + after)]
                sums[before - len(head) : before] += head
                counts[before - len(head) : before] += 1
                sums[before : before + len(tail)] += tail
                counts[before : before + len(tail)] += 1
    model.train(training)
    return {"before": before, "mean": (sums / counts.clamp(min=1)).tolist(), "tokens": counts.int().tolist()}


def entropy_gaps(model, tokenizer, tools, questions: list[dict]) -> dict[str, list[float]]:
    """ΔH with ARPO's defaults after the first, second, … call, sorted, over one answer to each question."""
    gaps: dict[str, list[float]] = {}
    for trajectory in answer_once(model.eval(), tokenizer, tools, questions):
        for calls, segment in enumerate(trajectory.segments[1:], start=1):
            gaps.setdefault(str(calls), []).append(round(segment.entropy_gap, 4))
    return {calls: sorted(values) for calls, values in gaps.items()}


def answer_once(model, tokenizer, tools, questions: list[dict]) -> list:
    """One trajectory for each question, the same random numbers at every call."""
    import torch

    from arpo_trl.evaluation import Agent

    limits = COMMON["max_completion_length"], COMMON["max_tool_calling_iterations"]
    agent = Agent(model, tokenizer, tools, "tags", *limits)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        trajectories = agent.rollout([question["prompt"] for question in questions])
    agent.close()
    return trajectories


NOTHING_SAMPLED = {"calls_made": 0, "calls_executed": 0, "calls_shared": 0, "calls_merged": 0, "tokens_sampled": 0}
NOTHING_SAMPLED |= {"forks_after_call": {}, "rows": {}}


def count_rollouts(directory: Path) -> dict[int, dict]:
    """
    For each optimiser step, from 1, that sampled: calls made and what became of them, tokens sampled, and where forks
    left (calls before, by number).
    """
    from arpo_trl.rollout.metrics import CALL_KINDS
    from arpo_trl.rollout.record import call_kind
    from arpo_trl.viewer.records import read_file

    counts = {}
    for path in sorted(directory.iterdir()):
        step = {"calls_made": 0, "tokens_sampled": 0, "forks_after_call": {}, "rows": {}}
        step |= {f"calls_{kind}": 0 for kind in CALL_KINDS}
        for row in read_file(path)[0]:
            shared = sum(call["shared"] for call in row["tool_calls"])
            step["calls_made"] += len(row["tool_calls"])
            for call in row["tool_calls"]:
                step[f"calls_{call_kind(call)}"] += 1
            step["tokens_sampled"] += sum(row["tool_mask"][row["fork_token"] or 0 :])
            step["rows"][row["kind"]] = step["rows"].get(row["kind"], 0) + 1
            if row["kind"] == "fork":
                step["forks_after_call"][str(shared)] = step["forks_after_call"].get(str(shared), 0) + 1
        counts[int(re.findall(r"\d+", path.name)[0]) + 1] = step
    return counts


def train_all(directory: Path, workers: int) -> None:
    """Train what is missing: cold starts, the search for learning rates, then the runs in the order of the grid."""
    # Workers inherit these: one thread each, and no bars but ours
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "TQDM_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    runs = dict.fromkeys((world, arm, seed, directory) for world, arm, seeds in GRID for seed in seeds)
    runs = [key for key in runs if not (directory / "runs" / f"{run_name(*key[:3])}.json").exists()]
    worlds = [*dict.fromkeys(world for world, *_ in runs)]
    search = [*product(worlds, SEARCH_ARMS, SEARCH_SEEDS, [directory], SEARCH_RATES)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_quiet) as pool:
        try:
            finish(pool, "Cold starts", cold_start, [(world, directory) for world in worlds])
            finish(pool, "Learning rates", run, search)
            finish(pool, "Runs", run, runs)
        finally:
            pool.shutdown(cancel_futures=True)  # after a failure the rest of the grid is not run


def finish(pool: ProcessPoolExecutor, stage: str, work: Callable[..., Path], calls: Sequence[tuple]) -> None:
    """Make all `calls` of `work`, with a bar; what is finished returns at once."""
    from tqdm import tqdm

    futures = {pool.submit(work, *call): call for call in calls}
    with tqdm(total=len(futures), desc=stage, disable=False) as bar:
        for future in as_completed(futures):
            future.result()
            bar.set_postfix_str(" ".join(str(each) for each in futures[future] if not isinstance(each, Path)))
            bar.update()


def _quiet() -> None:
    """Workers print nothing (what goes wrong is raised in the parent) and end with the parent, however that ends."""
    import sys
    from threading import Thread

    sys.stdout = open(os.devnull, "w")
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def main(directory: Path, workers: int, report_only: bool) -> None:
    from reproduce_report import readme_table, write

    if not report_only:
        train_all(directory, workers)
    page = write(directory, GRID)
    print(f"Written: {page} and docs/results/. The table of README.md:\n")
    print(readme_table(json.loads((page.parent / "results" / "numbers.json").read_text())))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/reproduce"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--report_only", action="store_true")
    arguments = parser.parse_args()
    main(arguments.output_dir, arguments.workers, arguments.report_only)
