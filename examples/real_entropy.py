"""
Where a real model is unsure, and which reading of it tells where forks part: an analysis of a run of `real.py`.

```bash
python examples/real_entropy.py outputs/real
```

First table and `entropy.png`: mean entropy at each place around tool results, for the cold start and after ARPO,
beside that of all other tokens of the model. Rows are those of the two evaluations, so each model reads what it wrote.

Second table: some rollouts of the cold start that fork at random and learn nothing. Of each fork and the row that it
left, one is right and the other wrong, or not; for each reading of the segment that the fork sampled anew, the
probability that it is higher where they part (AUC, 0.5 is chance) with its 95 % interval. Writes `entropy.json`.
"""

import argparse
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from demo import python_sandbox
from real import Run, arpo_config, load_model, tell_progress
from real_model import load_tokenizer
from real_world import RealWorld
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from arpo_trl import ARPOTrainer
from arpo_trl.rewards import exact_match_reward
from arpo_trl.viewer.records import find_steps, read_file

BEFORE, AFTER, WINDOW = 8, 12, 20
TAG = re.compile(r"</?(?:think|search|python|answer|result|tool_call)>")


@torch.no_grad()
def readings(model: PreTrainedModel, record: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Entropy in nats, and log-probability of the token that stands there, at each token of a row's completion."""
    ids = torch.tensor([record["prompt_ids"] + record["completion_ids"]])
    logprobs = model(ids).logits[0, len(record["prompt_ids"]) - 1 : -1].float().log_softmax(-1)
    chosen = logprobs.gather(1, ids[0, len(record["prompt_ids"]) :, None])[:, 0]
    return torch.special.entr(logprobs.exp()).sum(-1).tolist(), chosen.tolist()


def around_results(model: PreTrainedModel, records: Sequence[dict]) -> dict[str, Any]:
    """Mean entropy at each place before a call's end and after its result, and of all other tokens of the model."""
    places: dict[int, list[float]] = {place: [] for place in range(-BEFORE, AFTER)}
    elsewhere: list[float] = []
    for record in records:
        entropies, _ = readings(model, record)
        near = set()
        for before, after in zip(record["segments"], record["segments"][1:], strict=False):
            for place in range(-min(BEFORE, before["end"] - before["start"]), 0):
                places[place].append(entropies[before["end"] + place])
                near.add(before["end"] + place)
            for place in range(min(AFTER, after["end"] - after["start"])):
                places[place].append(entropies[after["start"] + place])
                near.add(after["start"] + place)
        own = {index for index, mine in enumerate(record["tool_mask"]) if mine}
        elsewhere += [entropies[index] for index in own - near]
    curve = [sum(values) / len(values) if values else 0.0 for values in places.values()]
    return {"rows": len(records), "curve": curve, "elsewhere": sum(elsewhere) / max(len(elsewhere), 1)}


def free_tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[bool]:
    """Whether each token lies outside of any tag."""
    texts = [tokenizer.decode([token]) for token in ids]
    tags = [range(found.start(), found.end()) for found in TAG.finditer("".join(texts))]
    free, start = [], 0
    for text in texts:
        span = range(start, start + len(text))
        free.append(not any(span.start < tag.stop and tag.start < span.stop for tag in tags))
        start = span.stop
    return free


def segment_readings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, record: dict, start: int, end: int
) -> dict[str, float]:
    """What may tell how unsure the model was of the segment from `start` to `end`."""
    entropies, logprobs = readings(model, record)
    first = entropies[start:end][:WINDOW]
    free = free_tokens(tokenizer, record["completion_ids"][start:end])
    free_entropies = [value for value, kept in zip(entropies[start:end], free, strict=True) if kept] or [0.0]
    return {
        f"mean over {WINDOW} (the paper's)": sum(first) / len(first),
        "mean over 5": sum(first[:5]) / len(first[:5]),
        f"maximum over {WINDOW}": max(first),
        "mean of the first 5 tokens outside of tags": sum(free_entropies[:5]) / len(free_entropies[:5]),
        "1 − p of the segment": 1 - float(torch.tensor(logprobs[start:end]).sum().exp()),
    }


def probe(run: Run, checkpoint: Path, folder: Path, steps: int) -> None:
    """Rollouts of a checkpoint that fork at random, recorded in `folder`; nothing is learnt."""
    if (folder / "rollouts").exists():
        return
    args = arpo_config(run, folder, max_steps=steps, learning_rate=0.0, branch_rule="random", save_strategy="no")
    trainer = ARPOTrainer(
        model=load_model(checkpoint),
        args=args,
        reward_funcs=exact_match_reward,
        train_dataset=Dataset.from_list(run.world.rows("rl")),
        processing_class=load_tokenizer(checkpoint, run.protocol),
        tools=run.tools,
    )
    tell_progress(trainer)
    trainer.train()


def forks(folder: Path) -> list[tuple[dict, dict]]:
    """Each fork and the row that it left."""
    pairs = []
    for steps in find_steps(folder).values():
        rows = {(row["prompt_index"], row["row"]): row for file in steps for row in read_file(file)[0]}
        for (prompt, _), row in rows.items():
            if row["kind"] == "fork":
                pairs.append((row, rows[prompt, row["parent"]]))
    return pairs


def auc(scores: Sequence[float], parted: Sequence[bool]) -> float:
    """Probability that a reading is higher where rows part than where they do not; ties count half."""
    yes = [score for score, part in zip(scores, parted, strict=True) if part]
    no = [score for score, part in zip(scores, parted, strict=True) if not part]
    if not yes or not no:
        return float("nan")
    return sum((a > b) + (a == b) / 2 for a in yes for b in no) / (len(yes) * len(no))


def auc_interval(scores: Sequence[float], parted: Sequence[bool], resamples: int = 300) -> tuple[float, float]:
    rng, values = random.Random(0), []
    for _ in range(resamples):
        picked = rng.choices(range(len(scores)), k=len(scores))
        values.append(auc([scores[i] for i in picked], [parted[i] for i in picked]))
    values = sorted(value for value in values if value == value)
    return (values[int(0.025 * len(values))], values[int(0.975 * len(values))]) if values else (0.0, 1.0)


def draw(curves: dict[str, dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for index, (name, found) in enumerate(curves.items()):
        axes.plot(range(-BEFORE, AFTER), found["curve"], marker="o", color=f"C{index}", label=name)
        axes.axhline(found["elsewhere"], color=f"C{index}", linestyle=":", label=f"{name}, elsewhere")
    axes.axvline(-0.5, color="0.6", linestyle="--", label="tool result")
    axes.set(xlabel="tokens of the model from a tool result", ylabel="entropy (nats)")
    axes.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(run_dir: Path, rows: int, steps: int) -> dict[str, Any]:
    settings = json.loads((run_dir / "progress.json").read_text())["settings"]
    size = {name: value for name, value in settings.items() if name not in ("seed", "tool_protocol")}
    protocol, found = settings["tool_protocol"], {"curves": {}}
    for name, folder in (("cold start", "cold_start"), ("ARPO", "arpo")):
        lines = (run_dir / "records" / f"{folder}_held_out.jsonl").read_text().splitlines()[:rows]
        found["curves"][name] = around_results(load_model(run_dir / folder).eval(), [*map(json.loads, lines)])
        curve = [f"{value:.2f}" for value in found["curves"][name]["curve"]]
        print(f"{name}: {' '.join(curve[:BEFORE])} | {' '.join(curve[BEFORE:])}", end="")
        print(f", elsewhere {found['curves'][name]['elsewhere']:.2f}", flush=True)
    draw(found["curves"], run_dir / "entropy.png")
    if steps:
        found["forks"] = analyse_forks(run_dir, settings["seed"], protocol, size, steps)
    (run_dir / "entropy.json").write_text(json.dumps(found, indent=2) + "\n")
    return found


def analyse_forks(run_dir: Path, seed: int, protocol: str, size: dict, steps: int) -> dict[str, Any]:
    world, folder = RealWorld(seed), run_dir / "forks"
    with python_sandbox() as sandbox:
        run = Run(seed, run_dir, protocol, size, world, [world.search, sandbox.python])
        probe(run, run_dir / "cold_start", folder, steps)
    pairs = forks(folder)
    model, tokenizer = load_model(run_dir / "cold_start").eval(), load_tokenizer(run_dir / "cold_start", protocol)
    parted, scores = [], []
    for fork, parent in pairs:
        (segment,) = [part for part in parent["segments"] if part["start"] == fork["fork_token"]]
        scores.append(segment_readings(model, tokenizer, parent, segment["start"], segment["end"]))
        parted.append(fork["rewards"] != parent["rewards"])
    like = [fork["completion_ids"] == parent["completion_ids"] for fork, parent in pairs]
    found: dict[str, Any] = {
        "forks": len(pairs),
        "parted": sum(parted) / max(len(pairs), 1),
        "token for token like their parents": sum(like) / max(len(pairs), 1),
        "auc": {},
    }
    print(f"{len(pairs)} forks: {found['parted']:.0%} part in outcome, {sum(like)} repeat their parents")
    for name in scores[0] if scores else ():
        values = [score[name] for score in scores]
        low, high = auc_interval(values, parted)
        found["auc"][name] = {"auc": auc(values, parted), "low": low, "high": high}
        print(f"{name:>45}: {auc(values, parted):.2f} ({low:.2f} to {high:.2f})")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, help="what real.py has written")
    parser.add_argument("--rows", type=int, default=60, help="rows of each evaluation that are read")
    parser.add_argument("--steps", type=int, default=10, help="steps of rollouts that fork at random; 0 for none")
    arguments = parser.parse_args()
    main(arguments.run_dir, arguments.rows, arguments.steps)
