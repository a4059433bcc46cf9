"""
Score a checkpoint with tools on the benchmarks of the paper, or on questions of your own.

```bash
python examples/evaluate.py \
    --model Qwen2.5-3B-ARPO \
    --benchmarks gsm8k math500 hotpotqa --data_dir data \
    --tool_protocol tags --tools search python --search_corpus wiki.jsonl \
    --num_generations 5 --pass_at 1 3 5 --temperature 0.6 --top_p 0.95 \
    --output_dir evaluation
python -m arpo_trl.viewer evaluation
```

A benchmark is read from `<data_dir>/<name>.jsonl` (.json, .parquet, .csv) or `<data_dir>/<name>/`, or else from the
Hub; `gsm8k=FILE` names the file. docs/evaluation.md tells where each comes from and how it is scored. For questions of
your own, with a column `prompt` and an `answer`: `--dataset_name questions.jsonl --score exact_match_reward`.

Writes to `--output_dir`: `records/<name>.jsonl` (a line a completion, as soon as its question is done: started again,
the script goes on where it stopped), `results.json`, `results.md` and, where matplotlib is installed, `results.png`.

Several processes share the questions (`accelerate launch examples/evaluate.py …`), each with the model on its own GPU.
With `--use_vllm` or `--vllm_server_base_url` one process is enough: vLLM gets all questions at once.
"""

import importlib.util
import json
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from common import SamplingArguments, build_rewards, load_agent, load_questions, process_state
from transformers import AutoTokenizer
from trl import TrlParser

from arpo_trl.evaluation import evaluate, summarize
from arpo_trl.evaluation.benchmarks import find_source, get_benchmark, load_benchmark, scorers, system_prompt
from arpo_trl.protocols import checkpoint_protocol
from arpo_trl.rewards import make_judge_reward

# What may change when a run is started again: where things are, how much is asked, how fast it goes
_FREE = {
    *("output_dir", "benchmarks", "data_dir", "dataset_name", "max_questions", "pass_at", "batch_size"),
    *("judge_base_url", "vllm_server_base_url", "vllm_tensor_parallel_size", "vllm_gpu_memory_utilization"),
}


@dataclass
class EvaluationArguments(SamplingArguments):
    """Arguments of the script."""

    benchmarks: list[str] = field(
        default_factory=list,
        metadata={"help": "Names from arpo_trl.evaluation.benchmarks, or name=file, name=hub id."},
    )
    data_dir: str | None = field(default=None, metadata={"help": "Folder of local benchmark files."})
    system_prompt: str | None = field(
        default=None,
        metadata={
            "help": "System prompt of the benchmarks, or a .txt file that holds it: what the model was trained with. "
            "Empty for none."
        },
    )
    judge_base_url: str | None = field(
        default=None,
        metadata={"help": "OpenAI-compatible endpoint, up to /v1, whose model judges answers in free text."},
    )
    judge_model: str | None = field(default=None, metadata={"help": "Its model."})
    dataset_split: str = field(default="test", metadata={"help": "Split of a hub id in `--dataset_name`."})
    score: str = field(
        default="exact_match_reward",
        metadata={"help": "Reward function for `--dataset_name`: from arpo_trl.rewards, or a dotted path."},
    )
    tool_protocol: str | None = field(
        default=None,
        metadata={
            "help": "'chat_template', 'tags' or 'my_module:MyProtocol'; by default the one that the checkpoint says "
            "it speaks, or 'chat_template'."
        },
    )
    num_generations: int = field(default=1, metadata={"help": "Completions for each question."})
    pass_at: list[int] = field(
        default_factory=list, metadata={"help": "Values of k for pass@k; by default 1 to `num_generations`."}
    )
    output_dir: str = field(default="evaluation")

    def __post_init__(self):
        if not self.benchmarks and not self.dataset_name:
            raise ValueError("Nothing to evaluate on: give `--benchmarks` or `--dataset_name`.")
        if (self.judge_base_url is None) != (self.judge_model is None):
            raise ValueError("A judge needs both `--judge_base_url` and `--judge_model`.")


class Task(NamedTuple):
    """What is asked, and the reward functions that score it and say whether an answer is right."""

    title: str
    rows: list[dict[str, Any]]
    score: Callable
    correct: Callable


def main(args: EvaluationArguments) -> dict[str, dict]:
    state = process_state()
    if args.tool_protocol is None:
        args.tool_protocol = protocol_of(args.model_name_or_path)
    output_dir = Path(args.output_dir)
    settings = {name: value for name, value in asdict(args).items() if name not in _FREE}
    check_settings(settings, output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    tasks = load_tasks(args)  # before the model: a missing file shows at once
    agent = load_agent(args, settings["tool_protocol"])
    state.wait_for_everyone()  # all have looked at the settings of the folder
    if state.is_main_process:
        agent.tokenizer.save_pretrained(output_dir)  # with which the viewer decodes
        (output_dir / "settings.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    results_path = output_dir / "results.json"
    results = json.loads(results_path.read_text(encoding="utf-8"))["benchmarks"] if results_path.exists() else {}
    for name, task in tasks.items():
        path = output_dir / "records" / f"{name}.jsonl"
        records = evaluate(agent, task.rows, task.score, args.num_generations, path, task.correct, task.title, state)
        ks = args.pass_at or range(1, args.num_generations + 1)
        results[name] = {"title": task.title, "metric": task.score.__name__, **summarize(records, ks)}
        if state.is_main_process:
            write_results(results, args.model_name_or_path, output_dir)
    agent.close()
    if state.is_main_process:
        print((output_dir / "results.md").read_text(encoding="utf-8"))
    return results


def protocol_of(model: str) -> str:
    """The protocol that a checkpoint says it speaks."""
    try:
        return checkpoint_protocol(AutoTokenizer.from_pretrained(model)) or "chat_template"
    except OSError:  # there is no such checkpoint, as whoever loads it says
        return "chat_template"


def load_tasks(args: EvaluationArguments) -> dict[str, Task]:
    """By name, what `args` asks for."""
    judge = None
    if args.judge_base_url and args.judge_model:
        judge = make_judge_reward(
            args.judge_base_url, args.judge_model, cache_path=Path(args.output_dir) / "verdicts.sqlite"
        )
    protocol = args.tool_protocol or "chat_template"
    prompt = args.system_prompt if args.benchmarks else ""  # questions of one's own bring theirs
    if prompt is None:
        prompt = system_prompt(protocol, [name.rpartition(".")[2] for name in args.tools])
    elif prompt.endswith(".txt"):
        prompt = Path(prompt).read_text(encoding="utf-8").strip()
    tasks = {}
    for entry in args.benchmarks:
        name, _, source = entry.partition("=")
        benchmark = get_benchmark(name)
        found = source or find_source(name, args.data_dir)
        rows = load_benchmark(name, found, prompt, args.max_questions)
        score, correct = scorers(name, judge)
        print(f"{benchmark.title}: {len(rows)} questions from {found or benchmark.hub_id}, scored by {score.__name__}")
        tasks[name] = Task(benchmark.title, rows, score, correct)
    if args.dataset_name:
        questions = load_questions(args.dataset_name, args.dataset_split, protocol=protocol)
        (score,) = build_rewards([args.score])
        tasks["questions"] = Task(
            Path(args.dataset_name).name, questions.to_list()[: args.max_questions], score, score
        )
    return tasks


def check_settings(settings: dict[str, Any], output_dir: Path) -> None:
    """Records of another model or with other settings are not mixed with these."""
    path = output_dir / "settings.json"
    if not path.exists() or not (output_dir / "records").exists():
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = [name for name in settings if name in before and before[name] != settings[name]]
    if changed:
        told = ", ".join(f"`--{name}` was {before[name]!r} and is {settings[name]!r}" for name in changed)
        raise ValueError(f"{output_dir} holds an evaluation with other settings: {told}. Give another `--output_dir`.")


def write_results(results: dict[str, dict], model: str, output_dir: Path) -> None:
    document = {"model": model, "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "benchmarks": results}
    (output_dir / "results.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    (output_dir / "results.md").write_text(markdown_table(results), encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is not None:
        draw(results, output_dir / "results.png")


def markdown_table(results: dict[str, dict]) -> str:
    """One row a benchmark; in brackets the 95 % bootstrap interval over questions."""
    ks = {
        int(found[1]) for result in results.values() for name in result if (found := re.fullmatch(r"pass@(\d+)", name))
    }
    passes = [f"pass@{k}" for k in sorted(ks)]
    lines = [["benchmark", "questions", "scored by", "score", *passes, "calls", "cut", "unscored", "s / question"]]
    lines += [["---"] * len(lines[0])]
    for result in results.values():
        score, low, high = (f"{result[name]:.1%}" for name in ("score", "score_low", "score_high"))
        lines.append(
            [
                result["title"],
                str(result["questions"]),
                result["metric"].removesuffix("_reward").replace("_", " "),
                f"{score} ({low}–{high})",
                *(f"{result[name]:.1%}" if name in result else "–" for name in passes),
                f"{result['calls_per_completion']:.2f}",
                f"{result['truncated']:.1%}",
                str(result["unscored"]),
                f"{result['seconds_per_question']:.2f}",
            ]
        )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(results: dict[str, dict], path: Path) -> None:
    """Score of each benchmark with its interval."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 1.2 + 0.35 * len(results)), layout="constrained")
    for place, result in enumerate(results.values()):
        spread = [[result["score"] - result["score_low"]], [result["score_high"] - result["score"]]]
        axes.barh(place, result["score"], xerr=spread, color="C0", height=0.6, capsize=3, ecolor="0.3")
    axes.set_yticks(range(len(results)), [result["title"] for result in results.values()])
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="score, with its 95 % interval over questions")
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    (arguments,) = TrlParser((EvaluationArguments,)).parse_args_and_config()
    main(arguments)
