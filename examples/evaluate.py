"""
Accuracy and pass@k of a checkpoint with tools on a set of questions.

```bash
python examples/evaluate.py \
    --model_name_or_path Qwen2.5-3B-ARPO \
    --dataset_name questions.jsonl \
    --tool_protocol tags --tools search python --search_corpus wiki.jsonl \
    --score exact_match_reward \
    --num_generations 5 --pass_at 1 3 5 \
    --output_dir evaluation
```

The questions are a local .jsonl or .parquet file or a hub id, with a column `prompt` and an `answer`. Writes
`questions.jsonl` (one line a question, as soon as it is done: started again, the script goes on where it stopped) and
`summary.json`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from common import SamplingArguments, build_rewards, load_agent, load_questions
from trl import TrlParser

from arpo_trl.evaluation import evaluate, summarize


@dataclass
class EvaluationArguments(SamplingArguments):
    """Arguments of the script."""

    dataset_split: str = field(default="test", metadata={"help": "Split of a hub data set."})
    score: str = field(
        default="exact_match_reward",
        metadata={"help": "Reward function that scores: a name from arpo_trl.rewards, or a dotted path."},
    )
    tool_protocol: str = field(default="chat_template", metadata={"choices": ["chat_template", "tags"]})
    num_generations: int = field(default=1, metadata={"help": "Completions for each question."})
    pass_at: list[int] = field(default_factory=lambda: [1], metadata={"help": "Values of k for pass@k."})
    output_dir: str = field(default="evaluation")


def main(args: EvaluationArguments) -> dict:
    agent = load_agent(args, args.tool_protocol)
    questions = load_questions(args.dataset_name, args.dataset_split, protocol=args.tool_protocol)
    if args.max_questions is not None:
        questions = questions.select(range(min(args.max_questions, len(questions))))
    output_dir = Path(args.output_dir)
    (score,) = build_rewards([args.score])
    records = evaluate(agent, questions, score, args.num_generations, output_dir / "questions.jsonl")
    agent.close()
    summary = summarize(records, args.pass_at)
    (output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    for name, value in summary.items():
        print(f"{name:>28}  {value:.4g}")
    return summary


if __name__ == "__main__":
    (arguments,) = TrlParser((EvaluationArguments,)).parse_args_and_config()
    main(arguments)
