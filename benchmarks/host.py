"""
What the host does for rows of 32k tokens: parsing, results, waves, columns of reward functions, records.

    python benchmarks/host.py --json outputs/host.json
    python benchmarks/host.py --rows 32 --tokens 8000
    python benchmarks/host.py --run outputs/demo      # the records of a run, too

A rollout of 256 rows in groups of 16, with 6 calls a row, goes through the loop, the chat template and the records of
the package; only the model and the tools are left out: segments are drawn from a text and tools answer at once. Beside
it stands what version 0.1.0 did, on the same rows: a turn was parsed with all of its context, and records were whole
lines. Records are also written of shorter rows and of rows that are mostly their own. Seconds are CPU time, medians of
`--repeats` rollouts; tokens and bytes are counted.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import tiny  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402
from trl.chat_template_utils import add_response_schema, get_training_chat_template, parse_response  # noqa: E402

from arpo_trl import ARPOConfig  # noqa: E402
from arpo_trl.protocols import ChatTemplateProtocol  # noqa: E402
from arpo_trl.protocols.suffix import suffix_renderer  # noqa: E402
from arpo_trl.rollout.loop import Branching, Limits, RolloutHooks, Sample, run_waves  # noqa: E402
from arpo_trl.rollout.metrics import rollout_sums  # noqa: E402
from arpo_trl.rollout.outputs import reward_columns  # noqa: E402
from arpo_trl.rollout.record import rollout_records, rounded  # noqa: E402
from arpo_trl.rollout.record_files import write_records  # noqa: E402
from arpo_trl.rollout.rules import branch_rule  # noqa: E402
from arpo_trl.rollout.tree import group_parts  # noqa: E402
from arpo_trl.viewer.records import find_steps, read_file  # noqa: E402

M, CALLS = 16, 6  # rows of a group, calls of a row
SHAPES = {  # of rows whose records are written beside those of long prompts
    "short rows, as the demo's": {"tokens": 300, "segment": 15, "result_words": 5},
    "long segments": {"tokens": 32_000, "segment": 3_000, "result_words": 1_200},
}
READ = "the tokenizer alone"
WATCHED = 32  # parses of the earlier way that are timed


def search(query: str, limit: int = 3) -> str:
    """
    Search.

    Args:
        query: What to look for.
        limit: How many passages to return.
    """
    return query


def prose() -> list[str]:
    """Words of this repository's documentation, without marks that a template may know."""
    texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))]
    return [word for word in " ".join(texts).split() if "<" not in word]


def build_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the text, with the template of a model that speaks to tools."""
    like = tiny.build_tokenizer()
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    added = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=16_000, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([" ".join(words)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": marks[1:2]})
    tokenizer.add_tokens(added)
    tokenizer.chat_template = like.chat_template
    return add_response_schema(tokenizer)


class Clock:
    """Seconds by phase."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str):
        started = time.process_time()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.process_time() - started


@contextmanager
def counted(tokenizer):
    """Within the context, the tokens that the tokenizer decodes are counted."""
    count, decode = [0], type(tokenizer).decode

    def counting(self, ids, *args, **kwargs):
        count[0] += len(ids)
        return decode(self, ids, *args, **kwargs)

    type(tokenizer).decode = counting
    try:
        yield count
    finally:
        type(tokenizer).decode = decode


class World:
    """The prompts, segments and results of a rollout."""

    def __init__(self, rows: int, tokens: int, segment: int = 200, result_words: int = 400):
        self.segment, self.result_words = segment, result_words
        self.rng = random.Random(0)
        self.results: list[str] = []
        self.words = prose()
        self.tokenizer = build_tokenizer(self.words)
        self.template = get_training_chat_template(self.tokenizer)
        names = [search.__name__]
        self.protocol = ChatTemplateProtocol(self.tokenizer, names, suffix_renderer(self.tokenizer, self.template))
        self.stream = self.tokenizer.encode(" ".join(self.words), add_special_tokens=False)
        call = '<tool_call>\n{"name": "search", "arguments": {"query": "what", "limit": 2}}\n</tool_call><|im_end|>'
        self.call = self.tokenizer.encode(call, add_special_tokens=False)
        self.end = self.tokenizer.eos_token_id
        # What the calls add to a row comes off the prompt, so that rows end with about that many tokens
        result = len(self.tokenizer.encode(self.result(), add_special_tokens=False))
        self.prompt_length = max(tokens - (CALLS + 1) * (self.segment + len(self.call)) - CALLS * (result + 20), 100)
        self.prompts = [prompt for _ in range(rows // M) for prompt in [self.prompt()] * M]

    def piece(self, length: int) -> list[int]:
        start = self.rng.randrange(len(self.stream))
        return (self.stream[start:] + self.stream * (length // len(self.stream) + 1))[:length]

    def result(self) -> str:
        start = self.rng.randrange(len(self.words) - self.result_words)
        self.results.append(" ".join(self.words[start : start + self.result_words]))
        return self.results[-1]

    def prompt(self) -> list[int]:
        message = [{"role": "user", "content": "Go on."}]
        start = self.tokenizer.apply_chat_template(
            message, tools=[search], chat_template=self.template, add_generation_prompt=True, return_dict=False
        )
        return self.piece(max(self.prompt_length - len(start), 0)) + start

    def sample(self, contexts: list[list[int]], limits: list[int]) -> list[Sample]:
        samples = []
        for context in contexts:
            made = context.count(self.call[0]) - self.prompts[0].count(self.call[0])
            ids = self.piece(self.segment) + (self.call if made < CALLS else [self.end])
            samples.append(Sample(ids, [self.rng.random() for _ in range(20)]))
        return samples

    def submit(self, trajectory, calls) -> list[Future]:
        futures = []
        for call in calls:
            call.result = self.result()
            futures.append(Future())
            futures[-1].set_result(call)
        return futures


def roll_out(world: World, rows: int, clock: Clock):
    config = ARPOConfig("unused", num_generations=M, num_initial_generations=M // 2, use_cpu=True, bf16=False)
    groups = group_parts(0, rows, M, M // 2)
    with clock("all"):
        run_waves(
            groups,
            world.prompts,
            world.protocol,
            RolloutHooks(world.sample, lambda row: {"search": search}, world.submit, timed=clock),
            Branching(branch_rule("bernoulli", config), 20, len(world.tokenizer)),
            Limits(completion=100_000, context=200_000, tool_turns=CALLS + 1),
            random.Random(0),
            world.end.__eq__,
        )
    return groups


def seconds_of_parts(world: World, groups, clock: Clock) -> dict[str, float]:
    """CPU seconds of what the host does for a rollout, model and tools left out."""
    rows = [row for group in groups for row in group.trajectories]
    with clock("columns"):
        reward_columns(rows, world.tokenizer)
    with clock("metrics"):
        rollout_sums(groups)
    with clock("encode"):
        for text in world.results:
            world.tokenizer.encode(text, add_special_tokens=False)
    seconds = clock.seconds
    return {
        "parse segments, start calls": seconds["parse"],
        "render and append results": seconds["tools"],
        "the rest of the waves": seconds["all"] - sum(seconds[phase] for phase in ("sample", "parse", "tools")),
        "columns of reward functions": seconds["columns"],
        "sums of metrics": seconds["metrics"],
        READ: seconds["encode"],
    }


def parse_both_ways(world: World, rows) -> dict[str, float]:
    """Milliseconds and decoded tokens a turn, of the last turn with a call of some rows."""
    turns = []
    for row in rows[:WATCHED]:
        segment = row.segments[-2]
        turns.append(
            (row.completion_ids[segment.start : segment.end], row.prompt_ids + row.completion_ids[: segment.start])
        )
    found = {}
    ways = {
        "before": lambda ids, context: parse_response(world.tokenizer, ids, prefix=context, tools=[search]),
        "now": lambda ids, context: world.protocol.parse(ids, context, {"search": search}).message,
    }
    for way, parse in ways.items():
        parse(*turns[0])
        with counted(world.tokenizer) as tokens:
            started = time.process_time()
            messages = [parse(*turn) for turn in turns]
            found[f"{way}_ms"] = (time.process_time() - started) / len(turns) * 1e3
        found[f"{way}_tokens"] = tokens[0] / len(turns)
        assert all(len(message["tool_calls"]) == 1 for message in messages)
    return found


def records_of(groups) -> list[dict]:
    rows = [row for group in groups for row in group.trajectories]
    rng = random.Random(0)
    rewards = {"accuracy": [float(rng.random() < 0.5) for _ in rows]}
    return rollout_records(0, groups, rewards, [rng.gauss(0, 1) for _ in rows], None)


def write_both_ways(records: list[dict]) -> dict[str, float]:
    """Bytes and seconds of records."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        write_records(folder, [rounded(record) for record in records], 0, 0, 1, append=False)
        seconds = time.process_time() - started
        (path,) = find_steps(Path(folder))[0]
        size = path.stat().st_size
        assert read_file(path)[0] == json.loads(json.dumps([rounded(record) for record in records]))
        started = time.process_time()
        before = Path(folder) / "before.jsonl"
        with before.open("w") as file:
            file.writelines(json.dumps(record, default=str) + "\n" for record in records)
        return {
            "rows": len(records),
            "before_bytes": before.stat().st_size,
            "now_bytes": size,
            "before_s": time.process_time() - started,
            "now_s": seconds,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=32_000, help="of a row at its end")
    parser.add_argument("--repeats", type=int, default=3, help="rollouts; medians are printed")
    parser.add_argument("--run", type=Path, help="a run with `log_rollouts`, whose records are written both ways")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    args = parser.parse_args()
    world, runs = World(args.rows, args.tokens), []
    for _ in range(args.repeats):
        world.results.clear()
        clock = Clock()
        groups = roll_out(world, args.rows, clock)
        runs.append(seconds_of_parts(world, groups, clock))
    parts = {part: statistics.median(run[part] for run in runs) for part in runs[0]}
    encoded = parts.pop(READ)
    rows = [row for group in groups for row in group.trajectories]
    sampled = sum(segment.start >= (row.fork_token or 0) for row in rows for segment in row.segments)
    tokens = sum(len(row.prompt_ids) + len(row.completion_ids) for row in rows)
    print(f"{len(rows)} rows of {tokens / len(rows):.0f} tokens, {sampled} segments sampled\n")
    for part, seconds in parts.items():
        print(f"{part:<32}{seconds:>8.2f} s")
    print(f"{'in all':<32}{sum(parts.values()):>8.2f} s; {READ} in {encoded:.2f} s\n")
    parsing = parse_both_ways(world, rows)
    for way, told in (("before", "with all of its context"), ("now", "from its own tokens")):
        each, read = parsing[f"{way}_ms"], parsing[f"{way}_tokens"]
        print(f"a turn {told:<24}{each:>6.2f} ms, {read:>6.0f} tokens decoded; all turns {sampled * each / 1e3:.1f} s")
    shapes = {"these rows": records_of(groups)}
    for name, size in SHAPES.items():
        shorter = World(4 * M, **size)
        shapes[name] = records_of(roll_out(shorter, 4 * M, Clock()))
    for step, paths in find_steps(args.run).items() if args.run else ():
        shapes[f"step {step} of the run"] = [row for path in paths for row in read_file(path)[0]]
    written = {name: write_both_ways(records) for name, records in shapes.items()}
    print(f"\n{'records':<32}{'rows':>6}{'whole lines':>14}{'now':>12}{'bytes':>8}{'whole lines':>13}{'now':>9}")
    for name, told in written.items():
        sizes = f"{told['before_bytes'] / 1e6:>11.3f} MB{told['now_bytes'] / 1e6:>9.3f} MB"
        ratio = f"{told['before_bytes'] / told['now_bytes']:>7.1f}×"
        print(f"{name:<32}{told['rows']:>6}{sizes}{ratio}{told['before_s']:>11.2f} s{told['now_s']:>7.2f} s")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        results = {"rows": len(rows), "tokens": tokens, "turns": sampled, "parts_s": parts, "encode_s": encoded}
        args.json.write_text(json.dumps({**results, "parsing": parsing, "records": written}, indent=2) + "\n")


if __name__ == "__main__":
    main()
