"""What the viewer's tests and benchmark share: made-up rollout records (trees with forks of forks, tools, rewards), a
tokenizer of plain words, and a headless browser."""

import json
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WORDS = (
    "the river was first crossed in winter so we need its year and the name of that bridge before we can answer"
).split()


def write_run(
    run_dir: Path, steps: int = 3, groups: int = 2, rows: int = 8, segment_tokens: int = 60, seed: int = 0
) -> None:
    """
    Write `steps` files of `groups` trees with `rows` trajectories each: whole lines, as training runs wrote them in
    version 0.1.0.
    """
    generator = random.Random(seed)
    (run_dir / "rollouts").mkdir(parents=True, exist_ok=True)
    for step in range(steps):
        with (run_dir / "rollouts" / f"step-{step:06d}.jsonl").open("w") as file:
            for index in range(groups):
                for record in make_group(generator, step, index, rows, segment_tokens):
                    file.write(json.dumps(record) + "\n")


def make_group(generator: random.Random, step: int, index: int, rows: int, segment_tokens: int) -> list[dict]:
    """One group: half of the rows start at the prompt, the others fork from any row that has called a tool."""
    prompt = list(range(100, 140)) + [500 + index, 600 + step]
    tree: list[dict] = []
    for row in range(rows):
        parents = [r for r in tree if _decided(r)] if row >= rows // 2 else []
        if parents:
            parent = generator.choice(parents)
            at = generator.choice(_decided(parent))
            at["forks"] += 1
            tree.append(_continue(generator, _fork(parent, at["start"]), segment_tokens))
        else:
            record = {
                "kind": "initial" if row < rows // 2 else "supplement",
                "parent": None,
                "fork_token": None,
                "completion_ids": [],
                "tool_mask": [],
                "segments": [],
                "tool_calls": [],
            }
            tree.append(_continue(generator, record, segment_tokens))
        tree[-1] |= {"step": step, "prompt_index": index, "row": row, "prompt_ids": prompt}
    mean = sum(r["rewards"]["accuracy"] for r in tree) / rows
    for record in tree:
        record |= {"advantage": round(record["rewards"]["accuracy"] - mean, 4), "shared_advantages": None}
    return tree


def _decided(record: dict) -> list[dict]:
    """Segments at whose start the row may fork."""
    start = record["fork_token"] or 0
    return [s for s in record["segments"] if s["forks"] is not None and s["start"] > start]


def _fork(parent: dict, token: int) -> dict:
    """The parent up to `token`."""
    segments = [dict(segment) for segment in parent["segments"] if segment["start"] < token]
    return {
        "kind": "fork",
        "parent": parent["row"],
        "fork_token": token,
        "completion_ids": parent["completion_ids"][:token],
        "tool_mask": parent["tool_mask"][:token],
        "segments": segments,
        "tool_calls": [call | {"shared": True} for call in parent["tool_calls"][: len(segments)]],
    }


def _continue(generator: random.Random, record: dict, segment_tokens: int) -> dict:
    """Sample the rest of a trajectory: segments with tool results between them, then rewards."""
    ids, mask, segments = record["completion_ids"], record["tool_mask"], record["segments"]
    calls = record["tool_calls"]
    baseline = segments[0]["entropy"] if segments else None
    resampled = record["kind"] == "fork"
    for remaining in reversed(range(generator.randint(1, 3))):
        start = len(ids)
        length = generator.randint(segment_tokens // 3, segment_tokens * 2)
        ids += [generator.randrange(len(WORDS)) for _ in range(length)]
        mask += [1] * length
        entropy = round(generator.uniform(0.05, 1.6), 4)
        gap = None if baseline is None else round(20 * (entropy - baseline) / 11.9, 4)
        decided = gap is not None and not resampled
        segments.append(
            {"start": start, "end": len(ids), "entropy": entropy, "entropy_gap": gap}
            | {"branch_probability": round(min(max(0.5 + 0.2 * gap, 0), 1), 4) if decided else None}
            | {"forks": 0 if decided else None}
        )
        baseline = entropy if baseline is None else baseline
        resampled = False
        if remaining:
            failed = generator.random() < 0.15
            name = generator.choice(["search", "python"])
            argument = {"query": " ".join(generator.choices(WORDS, k=6))}
            text = " ".join(generator.choices(WORDS, k=segment_tokens))
            calls.append(
                {
                    "name": name,
                    "arguments": argument if name == "search" else {"code": "import math\nprint(math.sqrt(1742))"},
                    "result": "Error: the tool timed out after 10 s" if failed else text,
                    "error": "the tool timed out after 10 s" if failed else None,
                    "seconds": round(generator.expovariate(2), 3),
                    "cached": generator.random() < 0.3,
                    "shared": False,
                }
            )
            length = generator.randint(segment_tokens // 2, segment_tokens)
            ids += [generator.randrange(len(WORDS)) for _ in range(length)]
            mask += [0] * length
    accuracy = generator.choice([-1.0, 0.0, 0.0, 1.0, 1.1])
    return record | {"truncated": generator.random() < 0.1, "rewards": {"accuracy": accuracy, "length": 0.05}}


def save_tokenizer(folder: Path, words: list[str]) -> None:
    """Save a tokenizer whose token i is `words[i]`, and `w<i>` above that."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(words)}
    vocabulary |= {f"w{index}": index for index in range(len(words), 1000)}
    model = models.WordLevel(vocabulary, unk_token="w999")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model)).save_pretrained(folder)


@contextmanager
def open_browser() -> Iterator:
    """A headless Chromium of the system, as a Playwright browser."""
    from playwright.sync_api import sync_playwright

    quiet = ["background-networking", "component-update", "sync", "gpu", "quic"]
    arguments = ["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in quiet)]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
        yield browser
        browser.close()
