"""Let an agent answer questions, and score what it does; in several processes, each answers its part of them.

What is not here: published benchmarks (`benchmarks.py`), and processes that do not see the same files.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm
from transformers.utils import logging

from ..plain_data import copied
from ..rewards.completions import final_answers
from ..rollout.record import rollout_records
from ..rollout.tree import Group, Trajectory, own_tokens
from .agent import Agent
from .records import (
    join_parts,
    part_path,
    question_text,
    resume,
    sampling_settings,
    scoring_hashes,
    write_records,
)

logger = logging.get_logger(__name__)


def evaluate(
    agent: Agent,
    rows: Iterable[dict[str, Any]],
    score: Callable[..., list[float | None]],
    num_generations: int = 1,
    records_path: str | Path | None = None,
    correct: Callable[..., list[float | None]] | None = None,
    description: str = "Evaluation",
    state: PartialState | None = None,
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
        state ([`~accelerate.PartialState`], *optional*): Processes that share the questions, with an agent each. All
            of them call this, with the same questions, and all get what is returned. Until all are done, each writes
            into `<records_path>.part-<process>`; parts that a killed run has left are taken up, by any number of
            processes. They wait for the slowest in the end, so give the state a `timeout` that is long enough.

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
    process, processes = (0, 1) if state is None else (state.process_index, state.num_processes)

    def found() -> dict[int, list[dict]]:
        if path is None:
            return {}
        return resume(path, rows, num_generations, sampling, agent.tokenize, scored_with, fill_scores)

    done = found() if processes == 1 else _of_main_process(process, found)
    todo = [index for index in range(len(rows)) if index not in done][process::processes]
    own_path = path if path is None or processes == 1 else part_path(path, process)
    answered: dict[int, list[dict]] = {}
    verdicts = [record["correct"] for group in done.values() for record in group if record["correct"] is not None]
    bar = tqdm(
        total=len(todo) + len(done), initial=len(done), desc=description, unit=" questions", disable=process != 0
    )
    began, failure = time.perf_counter(), None

    def finish(records: list[dict]) -> None:
        nonlocal began, failure
        try:
            if failure is None:
                fill_scores(records, rows)
        except Exception as error:
            failure = error
            logger.warning(
                f"{description}: scoring failed ({error!r}). What is being sampled is kept, without scores."
            )
        finally:  # what was sampled is kept where scoring fails
            seconds = (time.perf_counter() - began) / len(records)
            for record in records:
                record["seconds"] = seconds
            if own_path is not None:
                write_records(own_path, records, "a")
        began = time.perf_counter()
        for record in records:
            answered.setdefault(record["prompt_index"], []).append(record)
        verdicts.extend(record["correct"] for record in records if record["correct"] is not None)
        bar.update(len(records) // num_generations)
        bar.set_postfix_str(f"{sum(verdicts) / len(verdicts):.1%} right" if verdicts else "")

    step = max(1, agent.batch_size // num_generations)
    with bar:
        for start in range(0, len(todo), step):
            batch = {index: rows[index] for index in todo[start : start + step]}
            _ask(agent, batch, num_generations, sampling, finish)
            if failure is not None:
                raise failure
    if processes > 1:
        answered = {index: group for part in gather_object([answered]) for index, group in part.items()}
        if path is not None:
            _of_main_process(process, partial(join_parts, path, answered))
    done |= answered
    return [_question(index, done[index]) for index in range(len(rows))]


def _of_main_process(process: int, function: Callable[[], Any]) -> Any:
    """What `function` returns on the main process, or the error that it raises there, on all of them."""
    told: list[Any] = [None, None]
    if process == 0:
        try:
            told[0] = function()
        except Exception as raised:
            told[1] = raised
    result, error = broadcast_object_list(told)
    if error is not None:
        raise error
    return result


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
    agent: Agent,
    rows: Mapping[int, dict],
    num_generations: int,
    sampling: Mapping[str, Any],
    finish: Callable[[list[dict]], None],
) -> None:
    """Ask questions, by their index; `finish` gets the records of those that are answered as soon as they are."""
    indices = list(rows)
    answers: dict[int, list[Trajectory]] = {index: [] for index in indices}

    def on_end(ended: list[Trajectory]) -> None:
        for trajectory in ended:
            answers[indices[trajectory.row // num_generations]].append(trajectory)
        whole = sorted(index for index, trajectories in answers.items() if len(trajectories) == num_generations)
        records = []
        for index in whole:
            records += _records(agent, index, rows[index], answers.pop(index), num_generations, sampling)
        if records:
            finish(records)

    agent.rollout([row["prompt"] for row in rows.values() for _ in range(num_generations)], on_end)


def _records(
    agent: Agent,
    index: int,
    row: dict,
    trajectories: Sequence[Trajectory],
    num_generations: int,
    sampling: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Records of the completions of one question, not yet scored."""
    trajectories = sorted(
        (replace(trajectory, row=trajectory.row % num_generations) for trajectory in trajectories),
        key=lambda trajectory: trajectory.row,
    )
    group = Group(range(num_generations), num_generations, num_generations, trajectories=trajectories)
    records = rollout_records(0, [group], {}, [0.0] * num_generations, None)
    for record, trajectory in zip(records, trajectories, strict=True):
        record |= {
            "step": None,
            "prompt_index": index,
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
