"""
Make data for the cold start by rejection sampling: a model answers questions with tools, its right traces are kept.

```bash
python examples/make_cold_start_data.py \
    --model_name_or_path Qwen/Qwen3-32B \
    --dataset_name dongguanting/ARPO-RL-Reasoning-10K \
    --tool_protocol chat_template --tools search python --search_corpus wiki.jsonl \
    --num_generations 8 --keep_per_question 2 \
    --output_path traces.jsonl
python examples/sft_cold_start.py --dataset_name traces.jsonl --tool_protocol chat_template …
```

The model samples with the very tools and protocol that training will use. A trace is kept if it ran into no limit, if
the reward is at least `--min_score` (by default: good format and a right answer), and if no call in it failed. Of a
question's traces those with different calls come first, then the shorter ones.

Every question's samples go to `<output_path>.samples.jsonl` as soon as they are done; started again, the script goes
on where it stopped. `--output_path` is written at the end, in TRL's conversational format: `messages`, and for the
chat template `tools`.

Does NOT look at how a right answer was found: a lucky guess is kept.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common import SamplingArguments, build_rewards, load_agent, load_questions
from transformers import PreTrainedTokenizerBase
from transformers.utils import get_json_schema
from trl import TrlParser

from arpo_trl.evaluation import Agent, evaluate
from arpo_trl.protocols import defuse


@dataclass
class ColdStartDataArguments(SamplingArguments):
    """Arguments of the script."""

    dataset_split: str = field(default="train", metadata={"help": "Split of a hub data set."})
    tool_protocol: str = field(default="tags", metadata={"choices": ["chat_template", "tags"]})
    score: str | None = field(
        default=None,
        metadata={
            "help": "Reward function that decides: a name from arpo_trl.rewards, or a dotted path. By default the "
            "paper's reward for the protocol."
        },
    )
    min_score: float = field(default=1.0, metadata={"help": "Reward from which a trace is kept."})
    min_calls: int = field(default=0, metadata={"help": "Tool calls that a trace must have."})
    num_generations: int = field(default=8, metadata={"help": "Traces sampled for each question."})
    keep_per_question: int = field(default=1, metadata={"help": "Traces kept of each question, at most."})
    output_path: str = field(default="traces.jsonl", metadata={"help": "JSONL file of the traces that are kept."})


def is_right(score: float | None, min_score: float) -> bool:
    """Whether a trace's reward is enough; a trace that could not be scored is not right."""
    return score is not None and score >= min_score


def select(record: dict, min_score: float, min_calls: int, keep: int) -> list[int]:
    """
    Which of a question's traces are worth learning from.

    Args:
        record (`dict`): What [`~arpo_trl.evaluation.evaluate`] returns for a question.
        min_score (`float`): Reward from which a trace is right.
        min_calls (`int`): Tool calls that it must have.
        keep (`int`): Traces to keep, at most.

    Returns:
        `list[int]`: Their places among the question's completions. No two are the same.
    """
    right: dict[str, int] = {}
    for place, completion in enumerate(record["completions"]):
        calls = record["tool_calls"][place]
        failed = any(call["error"] is not None for call in calls)
        if is_right(record["scores"][place], min_score) and len(calls) >= min_calls and not failed:
            if not record["truncated"][place]:
                right.setdefault(json.dumps(completion), place)
    shortest_first = sorted(right, key=len)
    seen: set[str] = set()
    first_of_their_calls, others = [], []
    for text in shortest_first:
        calls = json.dumps([(call["name"], call["arguments"]) for call in record["tool_calls"][right[text]]])
        (others if calls in seen else first_of_their_calls).append(right[text])
        seen.add(calls)
    return (first_of_their_calls + others)[:keep]


def conversation(prompt: list[dict], completion: list[dict], tokenizer: PreTrainedTokenizerBase) -> list[dict]:
    """The messages to learn, a result's special tokens made plain text as the rollout makes them."""
    messages = [dict(message) for message in [*prompt, *completion]]
    for message in messages:
        if message["role"] == "tool" and isinstance(message["content"], str):
            message["content"] = defuse(tokenizer, message["content"])
    return messages


def traces(
    records: Sequence[dict], prompts: Sequence[list[dict]], agent: Agent, args: ColdStartDataArguments
) -> list[dict]:
    """The rows of the SFT set."""
    schemas = json.dumps([get_json_schema(tool) for tool in agent.tools.values()])
    extra = {"tools": schemas} if args.tool_protocol == "chat_template" else {}
    return [
        {"messages": conversation(prompts[record["index"]], record["completions"][place], agent.tokenizer), **extra}
        for record in records
        for place in select(record, args.min_score, args.min_calls, args.keep_per_question)
    ]


def reward_of(args: ColdStartDataArguments) -> Callable:
    name = args.score or {"tags": "arpo_reward", "chat_template": "arpo_chat_reward"}[args.tool_protocol]
    return build_rewards([name])[0]


def main(args: ColdStartDataArguments) -> list[dict]:
    questions = load_questions(args.dataset_name, args.dataset_split, protocol=args.tool_protocol)
    if args.max_questions is not None:
        questions = questions.select(range(min(args.max_questions, len(questions))))
    if isinstance(questions[0]["prompt"], str):
        raise ValueError(f"`--dataset_name {args.dataset_name}` must hold prompts as messages, not as text.")
    agent = load_agent(args, args.tool_protocol)
    records = evaluate(agent, questions, reward_of(args), args.num_generations, f"{args.output_path}.samples.jsonl")
    kept = traces(records, questions["prompt"], agent, args)
    agent.close()
    Path(args.output_path).write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    solved = sum(any(is_right(score, args.min_score) for score in record["scores"]) for record in records)
    print(
        f"{len(kept)} traces of {len(records)} questions in {args.output_path}; {solved} were answered at least once."
    )
    return kept


if __name__ == "__main__":
    (arguments,) = TrlParser((ColdStartDataArguments,)).parse_args_and_config()
    main(arguments)
