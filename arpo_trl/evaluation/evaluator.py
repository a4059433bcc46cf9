"""Let an agent answer questions, and score what it does.

What is not here: published benchmarks (`benchmarks.py`), and several processes.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..plain_data import copied
from ..rewards.completions import final_answers
from ..rollout.record import rollout_records
from ..rollout.tree import Group, own_tokens
from .agent import Agent
from .records import question_text, resume, sampling_settings, scoring_hashes, write_records


def evaluate(
    agent: Agent,
    rows: Iterable[dict[str, Any]],
    score: Callable[..., list[float | None]],
    num_generations: int = 1,
    records_path: str | Path | None = None,
    correct: Callable[..., list[float | None]] | None = None,
    description: str = "Evaluation",
) -> list[dict[str, Any]]:
    """
    Let an agent answer questions and score the answers.

    Args:
        agent ([`Agent`]): The agent.
        rows (`Iterable[dict]`): Questions: `prompt`, and the columns that `score` reads. A multimodal checkpoint reads
            the images of a column `image` or `images`, as in training.
        score (`Callable`): A reward function.
        num_generations (`int`): Completions for each question, for pass@k.
        records_path (`str` or `Path`, *optional*): JSONL file that gets a line for each completion as soon as its
            question is done (format: docs/evaluation.md). Questions that it already holds are not asked again, so a
            killed run goes on where it stopped. Completions without a score are scored again, and so are all of a
            question whose columns (the ground truth) have changed, or all where `score` or `correct` has.
        correct (`Callable`, *optional*): Reward function that returns 1 or more for a right answer; by default
            `score`.
        description (`str`): Stands before the progress bar.

    Returns:
        `list[dict]`: for each question `index`, `records`: its completions as the lines of the file hold them, with
        the same keys, and from these, one entry a completion, `scores`, `correct`, `truncated`, `tool_calls`,
        `completions` and `predictions` (`score`, `correct`, `truncated`, `tool_calls`, `completion`, `prediction` of a
        record), and the sum of their `seconds`.

    Raises:
        ValueError: `records_path` holds other questions, prompts or settings of sampling, more completions of a
            question than `num_generations`, or lines that are no records.
    """
    rows = [agent.with_images(row) for row in rows]
    correct = correct or score
    scored_with = scoring_hashes([score, correct], rows)
    fill_scores = partial(_fill_scores, agent, score, correct, scored_with)
    path = None if records_path is None else Path(records_path)
    sampling = sampling_settings(agent)
    done: dict[int, list[dict]] = {}
    if path is not None:
        done = resume(path, rows, num_generations, sampling, agent.tokenize, scored_with, fill_scores)
    todo = [index for index in range(len(rows)) if index not in done]
    step = max(1, agent.batch_size // num_generations)
    verdicts = [record["correct"] for group in done.values() for record in group if record["correct"] is not None]
    with tqdm(total=len(rows), initial=len(done), desc=description, unit=" questions") as bar:
        for start in range(0, len(todo), step):
            batch = todo[start : start + step]
            started = time.perf_counter()
            records = _ask(agent, [rows[index] for index in batch], batch, num_generations, sampling)
            try:
                fill_scores(records, rows)
            finally:  # what was sampled is kept where scoring fails
                seconds = (time.perf_counter() - started) / len(records)
                for record in records:
                    record["seconds"] = seconds
                if path is not None:
                    write_records(path, records, "a")
            for index in batch:
                done[index] = [record for record in records if record["prompt_index"] == index]
            bar.update(len(batch))
            verdicts += [record["correct"] for record in records if record["correct"] is not None]
            bar.set_postfix_str(f"{sum(verdicts) / len(verdicts):.1%} right" if verdicts else "")
    return [_question(index, done[index]) for index in range(len(rows))]


def _fill_scores(
    agent: Agent,
    score: Callable,
    correct: Callable,
    scored_with: Sequence[str],
    records: Sequence[dict],
    rows: Sequence[Mapping[str, Any]],
) -> None:
    """Score `records`, whose `prompt_index` is a place in `rows` and `scored_with`, from what they hold."""
    questions = [rows[record["prompt_index"]] for record in records]
    completions = [record["completion"] for record in records]
    own_ids = [own_tokens(record["completion_ids"], record["tool_mask"]) for record in records]
    texts = agent.tokenizer.batch_decode(own_ids, skip_special_tokens=True)
    for record, answer in zip(records, final_answers(completions, texts), strict=True):
        record["prediction"] = answer
    columns = {
        "prompts": [row["prompt"] for row in questions],
        "completions": completions,
        "completion_ids": [record["completion_ids"] for record in records],
        "tool_calls": [record["tool_calls"] for record in records],
        "model_text": texts,
        **{name: [row[name] for row in questions] for name in questions[0] if name != "prompt"},
    }
    # Copies, since a function may change what it is given
    scores = score(**copied(columns))
    verdicts = scores if correct is score else correct(**copied(columns))
    for record, row, value, verdict in zip(records, questions, scores, verdicts, strict=True):
        record["answer"] = row.get("answer")
        record["scored_with"] = scored_with[record["prompt_index"]]
        record["score"] = value
        record["correct"] = None if verdict is None else verdict >= 1.0
        record["rewards"] = {_name(score): value, _name(correct): verdict}


def _name(function: Callable) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _ask(
    agent: Agent, rows: list[dict], indices: Sequence[int], num_generations: int, sampling: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Records of `num_generations` completions of each question, not yet scored."""
    trajectories = agent.rollout([row["prompt"] for row in rows for _ in range(num_generations)])
    groups = []
    for start in range(0, len(trajectories), num_generations):
        places = range(start, start + num_generations)
        groups.append(Group(places, num_generations, num_generations, trajectories=trajectories[start : places.stop]))
    records = rollout_records(0, groups, {}, [0.0] * len(trajectories), None)
    for place, (record, trajectory) in enumerate(zip(records, trajectories, strict=True)):
        row = rows[place // num_generations]
        record |= {
            "step": None,
            "prompt_index": indices[place // num_generations],
            "advantage": None,
            "question": question_text(row),
            "answer": row.get("answer"),
            "completion": agent.completion(trajectory, row["prompt"]),
            "sampling": dict(sampling),
            **dict.fromkeys(("prediction", "score", "correct", "scored_with", "seconds")),
        }
    return records


def _question(index: int, records: Sequence[dict]) -> dict[str, Any]:
    """What [`evaluate`] returns for a question."""
    columns = {
        "scores": "score",
        "correct": "correct",
        "truncated": "truncated",
        "tool_calls": "tool_calls",
        "completions": "completion",
        "predictions": "prediction",
    }
    lists = {name: [record[key] for record in records] for name, key in columns.items()}
    seconds = sum(record["seconds"] for record in records)
    return {"index": index, "records": list(records), **lists, "seconds": seconds}
