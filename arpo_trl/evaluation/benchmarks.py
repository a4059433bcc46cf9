r"""The 13 benchmarks of the ARPO paper as questions to evaluate on: one table says how each is read and scored.

```python
from arpo_trl.evaluation.benchmarks import load_benchmark

rows = load_benchmark("gsm8k", "data/gsm8k/test.jsonl", system_prompt="…")   # or without a path: from the Hub
```

What is not here: files that belong to a question. GAIA's rows with an attachment and HLE's with an image are left out.
The official scorers of GAIA and 2WikiMultihopQA are not here either; docs/evaluation.md says how ours differ.
"""

import base64
import binascii
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datasets import Audio, Dataset, Image, load_dataset

from ..data import CHAT_SYSTEM_PROMPT
from ..data.files import SUFFIXES, Row, read_rows
from ..rewards import exact_match_reward, extract_boxed, math_reward, token_f1_reward
from ..rewards.completions import accepted_answers


def _from_columns(*names: str) -> Callable[[Row], list[str]]:
    """Every text in these columns is an accepted answer."""
    return lambda row: _texts([row.get(name) for name in names])


def _after_hashes(row: Row) -> list[str]:
    """The number that ends a worked solution after `####`, without thousands separators."""
    return [text.rpartition("####")[2].strip().replace(",", "") for text in _texts(row.get("answer"))]


def _answer_or_boxed(row: Row) -> list[str]:
    r"""The column `answer`, or where there is none what the solution boxes."""
    return _texts(row.get("answer")) or _texts([extract_boxed(text) for text in _texts(row.get("solution"))])


def _gaia_answer(row: Row) -> list[str]:
    """The test split holds a question mark in place of every answer."""
    return [text for text in _from_columns("Final answer", "answer")(row) if text != "?"]


def _texts(value: Any) -> list[str]:
    """All answers in a value, see [`~rewards.completions.accepted_answers`], without white space around them."""
    return list(dict.fromkeys(text.strip() for text in accepted_answers(value)))


@dataclass(frozen=True)
class Benchmark:
    """
    How a benchmark is read and scored.

    Args:
        title (`str`): Its name in tables.
        hub_id (`str`): Data set on the Hub.
        split (`str`): Split that is asked.
        num_questions (`int`): Rows of the split as published, before any are left out.
        form (`str`): What an answer is: `"math"` (compared as mathematics), `"short"` (a name, a date, a yes; token
            F1, and exact match decides whether it is right) or `"open"` (an LLM judges; exact match without one).
        question (`tuple[str, ...]`): Columns that may hold the question; the first that is not blank does.
        answers (`Callable[[dict], list[str]]`): The accepted answers of a row.
        configs (`tuple[str | None, ...]`): Configurations of `hub_id`, one after the other.
        attachment (`str`, *optional*): Column that is filled where a question needs a file or an image.
        encrypted (`bool`): Whether question and answer are encrypted with the row's `canary`.
        access (`str`): What has to be done before the Hub hands it out.
    """

    title: str
    hub_id: str
    split: str
    num_questions: int
    form: Literal["math", "short", "open"]
    question: tuple[str, ...] = ("question", "problem")
    answers: Callable[[Row], list[str]] = _from_columns("answer")
    configs: tuple[str | None, ...] = (None,)
    attachment: str | None = None
    encrypted: bool = False
    access: str = ""


_FLASHRAG = "RUC-NLPIR/FlashRAG_datasets"
_QA_ANSWERS = _from_columns("golden_answers", "answer", "answer_aliases")

# Names are those of the folders in the data that the paper's authors published for evaluation
# (https://github.com/RUC-NLPIR/ARPO, evaluation/data/<name>/test.jsonl), which these loaders read as well.
BENCHMARKS: dict[str, Benchmark] = {
    # https://huggingface.co/datasets/HuggingFaceH4/aime_2024: id, problem, solution, answer, url, year; 30 rows
    "aime24": Benchmark("AIME24", "HuggingFaceH4/aime_2024", "train", 30, "math"),
    # https://huggingface.co/datasets/math-ai/aime25: test.jsonl with problem, answer, id; 30 rows
    "aime25": Benchmark("AIME25", "math-ai/aime25", "test", 30, "math"),
    # https://huggingface.co/datasets/HuggingFaceH4/MATH-500: problem, solution, answer, subject, level, unique_id
    "math500": Benchmark("MATH500", "HuggingFaceH4/MATH-500", "test", 500, "math", answers=_answer_or_boxed),
    # https://github.com/openai/grade-school-math: question, and an answer that ends in "#### <number>"
    "gsm8k": Benchmark("GSM8K", "openai/gsm8k", "test", 1319, "math", answers=_after_hashes, configs=("main",)),
    # https://huggingface.co/datasets/EleutherAI/hendrycks_math: problem, level, type, and a solution that boxes the
    # answer; a configuration for each subject, together 5,000 test rows
    "math": Benchmark(
        "MATH",
        "EleutherAI/hendrycks_math",
        "test",
        5000,
        "math",
        answers=_answer_or_boxed,
        configs=(
            *("algebra", "counting_and_probability", "geometry", "intermediate_algebra"),
            *("number_theory", "prealgebra", "precalculus"),
        ),
    ),
    # https://github.com/RUC-NLPIR/FlashRAG: question and golden_answers (a list) for the next four. The original files
    # have `answer` (https://hotpotqa.github.io, https://github.com/Alab-NII/2wikimultihop) and MuSiQue's also
    # `answer_aliases` (https://github.com/StonyBrookNLP/musique)
    "hotpotqa": Benchmark("HotpotQA", _FLASHRAG, "dev", 7405, "short", answers=_QA_ANSWERS, configs=("hotpotqa",)),
    "2wiki": Benchmark(
        "2WikiMultihopQA", _FLASHRAG, "dev", 12576, "short", answers=_QA_ANSWERS, configs=("2wikimultihopqa",)
    ),
    "musique": Benchmark("MuSiQue", _FLASHRAG, "dev", 2417, "short", answers=_QA_ANSWERS, configs=("musique",)),
    # The original sheet's columns are `Question` and `Answer`: https://huggingface.co/datasets/chiayewken/bamboogle
    "bamboogle": Benchmark(
        "Bamboogle",
        _FLASHRAG,
        "test",
        125,
        "short",
        question=("question", "Question"),
        answers=_from_columns("golden_answers", "answer", "Answer"),
        configs=("bamboogle",),
    ),
    # https://huggingface.co/datasets/gaia-benchmark/GAIA: task_id, Question, Level, Final answer, file_name, …; the
    # test split's answers are private
    "gaia": Benchmark(
        "GAIA",
        "gaia-benchmark/GAIA",
        "validation",
        165,
        "open",
        question=("Question", "question"),
        answers=_gaia_answer,
        configs=("2023_all",),
        attachment="file_name",
        access="Accept its conditions at https://huggingface.co/datasets/gaia-benchmark/GAIA and log in: hf auth "
        "login.",
    ),
    # https://huggingface.co/datasets/cais/hle: id, question, image, answer, answer_type, rationale, …
    "hle": Benchmark(
        "HLE",
        "cais/hle",
        "test",
        2500,
        "open",
        attachment="image",
        access="Accept its conditions at https://huggingface.co/datasets/cais/hle and log in: hf auth login.",
    ),
    # https://github.com/Alibaba-NLP/WebAgent: load_dataset("callanwu/WebWalkerQA", split="main"); the card writes the
    # keys with capitals (Question, Answer), the files without
    "webwalker": Benchmark(
        "WebWalkerQA",
        "callanwu/WebWalkerQA",
        "main",
        680,
        "open",
        question=("question", "Question"),
        answers=_from_columns("answer", "Answer"),
    ),
    # https://github.com/xbench-ai/xbench-evals: id, prompt, answer, reference_steps, canary; 100 rows, of which prompt
    # and answer are XORed with the canary and written in base64. The paper's is the first edition, of May 2025
    "xbench": Benchmark(
        "xbench-DeepSearch",
        "xbench/DeepSearch",
        "train",
        100,
        "open",
        question=("prompt", "question"),
        encrypted=True,
    ),
}


def get_benchmark(name: str) -> Benchmark:
    """The benchmark of this name."""
    if name not in BENCHMARKS:
        raise ValueError(f"There is no benchmark {name!r}: choose from {', '.join(BENCHMARKS)}.")
    return BENCHMARKS[name]


def load_benchmark(
    name: str, source: str | Path | None = None, system_prompt: str | None = None, max_questions: int | None = None
) -> list[Row]:
    """
    The questions of a benchmark.

    Args:
        name (`str`): A key of [`BENCHMARKS`].
        source (`str` or `Path`, *optional*): A local file (.jsonl, .json, .parquet, .csv), a folder that holds it, or
            a data set on the Hub with the same columns. By default the benchmark's own data set on the Hub.
        system_prompt (`str`, *optional*): First message of every prompt.
        max_questions (`int`, *optional*): Take only the first so many.

    Returns:
        `list[dict]`: `prompt` (messages), `question` (`str`) and `answer` (`list[str]`: every accepted answer, empty
        where none is published). Questions that need a file or an image are left out.

    Raises:
        ValueError: The source cannot be read, a row has no question, or no row has an answer.
    """
    benchmark = get_benchmark(name)
    rows = _rows(name, benchmark, source)
    column = benchmark.attachment
    rows = [row for row in rows if column is None or not _texts(row.get(column))][:max_questions]
    if benchmark.encrypted:
        rows = [decrypt_row(row) for row in rows]
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    questions = []
    for place, row in enumerate(rows):
        try:
            question = next((text for column in benchmark.question for text in _texts(row.get(column))), None)
            answers = benchmark.answers(row)
        except ValueError as error:
            raise ValueError(f"{benchmark.title}, row {place} of {source or benchmark.hub_id}: {error}") from error
        if question is None:
            raise ValueError(
                f"{benchmark.title}, row {place} of {source or benchmark.hub_id} has no question: none of the columns "
                f"{', '.join(benchmark.question)} is filled (it has {', '.join(row)})."
            )
        prompt = [*system, {"role": "user", "content": question}]
        questions.append({"prompt": prompt, "question": question, "answer": answers})
    if not any(row["answer"] for row in questions):
        raise ValueError(
            f"{benchmark.title}: no row of {source or benchmark.hub_id} has an answer, so that nothing can be scored. "
            "Give a split whose answers are public."
        )
    return questions


def find_source(name: str, data_dir: str | Path | None) -> Path | None:
    """
    The local file or folder of a benchmark: `<data_dir>/<name>.jsonl` (or .json, .parquet, .csv) or
    `<data_dir>/<name>/`.

    Returns:
        `Path`: the first that is there, or `None`.
    """
    if data_dir is None:
        return None
    if not Path(data_dir).is_dir():
        raise ValueError(f"data_dir={str(data_dir)!r} is not a folder.")
    places = [Path(data_dir) / f"{name}{suffix}" for suffix in ("", *SUFFIXES)]
    return next((place for place in places if place.exists()), None)


def scorers(name: str, judge: Callable | None = None) -> tuple[Callable, Callable]:
    """
    Reward functions of a benchmark: the one that is its metric, and the one that says whether an answer is right.

    Args:
        name (`str`): A key of [`BENCHMARKS`].
        judge (`Callable`, *optional*): What [`~rewards.make_judge_reward`] made, for answers in free text.
    """
    form = get_benchmark(name).form
    if form == "math":
        return math_reward, math_reward
    if form == "short":
        return token_f1_reward, exact_match_reward
    return (judge or exact_match_reward,) * 2


def system_prompt(protocol: str, tools: Sequence[str]) -> str:
    """
    A system prompt for a model that was given none of its own.

    A checkpoint answers best to the prompt that it was trained with: give that one where there is one.

    Args:
        protocol (`str`): `"tags"` or `"chat_template"`.
        tools (`Sequence[str]`): Names of the tools.

    Raises:
        ValueError: The protocol is one of your own, of which nothing is known here.
    """
    if protocol == "chat_template":
        return CHAT_SYSTEM_PROMPT
    if protocol != "tags":
        raise ValueError(f"There is no system prompt for `tool_protocol={protocol!r}`: give one as `system_prompt`.")
    calls = "".join(f" Call `{name}` by writing <{name}>…</{name}>." for name in tools)
    answered = " What a call returns follows it in <result>…</result>; then think on." if tools else ""
    return (
        "Solve the user's question step by step. Write your thoughts in <think>…</think>."
        f"{calls}{answered} At the end write <answer>…</answer>, with nothing but the final, exact answer in "
        f"\\boxed{{}}."
    )


def _rows(name: str, benchmark: Benchmark, source: str | Path | None) -> list[Row]:
    if source is None:
        return [row for config in benchmark.configs for row in _from_hub(benchmark, benchmark.hub_id, config)]
    path = Path(source)
    if not path.exists():
        if path.suffix in SUFFIXES:
            raise ValueError(f"{benchmark.title}: {source} does not exist.")
        return _from_hub(benchmark, str(source), None)
    files = [path] if path.is_file() else _files_in(path, benchmark.split)
    rows = [row for file in files for row in read_rows(file)]
    return _with_aliases(rows, files[0].parent) if name == "2wiki" else rows


def _from_hub(benchmark: Benchmark, hub_id: str, config: str | None) -> list[Row]:
    try:
        rows: Dataset = load_dataset(hub_id, name=config, split=benchmark.split)
    except Exception as error:  # no network, no access, no such split: the Hub's libraries know a dozen kinds
        raise ValueError(
            f"{benchmark.title} could not be loaded from {hub_id} ({type(error).__name__}: {error}). "
            f"{benchmark.access} "
            "Without the Hub, give a local file."
        ) from error
    media = [column for column, feature in rows.features.items() if isinstance(feature, Audio | Image)]
    return rows.remove_columns(media).to_list()


def _files_in(folder: Path, split: str) -> list[Path]:
    """The files of the split in a folder: by their names, or else the only one there is."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.name != "id_aliases.json")
    files = [path for path in files if path.stem == "metadata"] or files  # GAIA's, among the files that it asks about
    for word in (split, "test", "validation", "dev"):
        named = [path for path in files if re.search(rf"(?<![a-z]){word}(?![a-z])", str(path.relative_to(folder)))]
        if named:
            return named
    if len(files) != 1:
        found = ", ".join(str(path.relative_to(folder)) for path in files[:9]) or "none"
        raise ValueError(
            f"{folder} must hold a file of the split {split!r} (it holds: {found}). Name the file itself."
        )
    return files


def _with_aliases(rows: Iterable[Row], folder: Path) -> list[Row]:
    """2WikiMultihopQA tells other names of an answer in a file of its own, `id_aliases.json`, by `answer_id`."""
    path = folder / "id_aliases.json"
    if not path.exists():
        return list(rows)
    aliases = {str(row.get("Q_id")): [row.get("aliases"), row.get("demonyms")] for row in read_rows(path)}
    return [row | {"answer_aliases": aliases.get(str(row.get("answer_id")))} for row in rows]


def decrypt_row(row: Row) -> Row:
    """
    A row of xbench in plain text: `prompt` and `answer` are base64 of the text XORed with the row's `canary`. A row
    that is not encrypted comes back as it is.
    """
    if not row.get("canary"):
        return row
    try:
        return row | {column: _decrypt(row[column], row["canary"]) for column in ("prompt", "answer")}
    except (KeyError, TypeError, ValueError, binascii.Error):
        return row


def _decrypt(text: str, key: str) -> str:
    data, mask = base64.b64decode(text, validate=True), key.encode()
    return bytes(byte ^ mask[place % len(mask)] for place, byte in enumerate(data)).decode()
