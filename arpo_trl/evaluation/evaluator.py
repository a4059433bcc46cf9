"""Sample a model with tools outside of training, and score what it does: accuracy, pass@k, calls per question.

The rollout is the trainer's own, with branching off: same protocol, same tool executor, same limits. The engine is
transformers or vLLM.

What is not here: published benchmarks (see [`arpo_trl.evaluation.benchmarks`]), several processes, and entropies on vLLM.
"""

import math
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase
from trl import GRPOTrainer
from trl.data_utils import is_conversational

from ..execution.executor import ToolCall, ToolExecutor
from ..execution.names import distinct_tools
from ..protocols import protocol_class, tool_chat_template, warn_of_another_protocol
from ..rewards.completions import final_answers
from ..rollout.engines.generation_settings import context_length, tell_settings, without_unfit_settings
from ..rollout.engines.prefix_cache import PrefixCache
from ..rollout.engines.sampler import recorded_generation, recorded_samples, stop_string_criteria
from ..rollout.loop import Branching, Limits, RolloutHooks, Sample, group_parts, refuse_calls_over_limit, run_waves
from ..rollout.record import rollout_records
from ..rollout.tree import Group, Trajectory, copied, own_tokens
from .records import question_text, resume, sampling_settings, scoring_hashes, write_records


class Agent:
    """
    A model that calls tools.

    Args:
        model ([`~transformers.PreTrainedModel`], [`~peft.PeftModel`] or `vllm.LLM`): The model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        tools (`Sequence[Callable]`): Tools, as for [`ARPOTrainer`].
        tool_protocol (`str`): As in [`ARPOConfig`]; the one that the model was trained with.
        max_completion_length (`int`): Tokens of a completion, tool results included.
        max_tool_calling_iterations (`int`, *optional*): Turns whose calls are answered; `None` for no limit.
        temperature, top_p, top_k, min_p, repetition_penalty: Sampling, as in [`ARPOConfig`]. A temperature of 0 decodes
            greedily.
        batch_size (`int`): Completions sampled together.
        chat_template_kwargs (`dict[str, Any]`, *optional*): Passed to the chat template.
        tool_timeout (`float`, *optional*): Seconds after which a tool call is given up.
        entropy_window (`int`): Tokens over which the entropy of a segment is read.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        tools: Sequence[Callable] = (),
        tool_protocol: str = "chat_template",
        max_completion_length: int = 1024,
        max_tool_calling_iterations: int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        batch_size: int = 32,
        chat_template_kwargs: dict[str, Any] | None = None,
        tool_timeout: float | None = 120.0,
        entropy_window: int = 20,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.tools = {tool.__name__: tool for tool in distinct_tools(tools)}
        self.batch_size = batch_size
        self.chat_template_kwargs = chat_template_kwargs or {}
        self.entropy_window = entropy_window
        self.temperature = temperature
        self.executor = ToolExecutor(
            timeout=tool_timeout, count_tokens=lambda text: len(tokenizer.encode(text, add_special_tokens=False))
        )
        if hasattr(model, "llm_engine"):
            self._generate = self._generate_vllm
            config = model.llm_engine.model_config
            context, self.vocab_size = config.max_model_len, config.get_vocab_size()
            eos = config.try_get_generation_config().get("eos_token_id")
        else:
            self._generate = self._generate_transformers
            config = model.config.get_text_config()
            context, self.vocab_size = context_length(config), config.vocab_size
            eos = model.generation_config.eos_token_id
        self.limits = Limits(
            completion=max_completion_length,
            context=context,
            tool_turns=max_tool_calling_iterations if max_tool_calling_iterations is not None else 2**31,
        )
        self.chat_template: str | None = None
        protocol = protocol_class(tool_protocol)
        if self.tools:
            warn_of_another_protocol(tokenizer, tool_protocol)
        if self.tools and protocol.structured:
            self.chat_template = tool_chat_template(tokenizer)
        # The one piece of TRL's trainer that renders results into tokens needs nothing but these
        renderer: Any = SimpleNamespace(
            processing_class=tokenizer,
            _tokenizer=tokenizer,
            _is_vlm=False,
            chat_template=self.chat_template,
            chat_template_kwargs=self.chat_template_kwargs,
        )
        self.protocol = protocol(
            tokenizer, list(self.tools), lambda messages: GRPOTrainer._get_tool_suffix_ids(renderer, messages)
        )
        self.stop_strings = stop_string_criteria(tokenizer, self.protocol.stop_strings)
        self.eos_token_ids = {
            tokenizer.eos_token_id,
            *(eos if isinstance(eos, list) else [eos] if eos is not None else []),
        }
        self._prefix_cache: PrefixCache | None = None  # of the batch that is being answered
        self.sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p or 0.0}
        self.repetition_penalty = repetition_penalty
        self.generation_config = GenerationConfig(
            max_new_tokens=max_completion_length,
            do_sample=temperature > 0,
            **(self.sampling if temperature > 0 else {}),
            repetition_penalty=repetition_penalty,
            eos_token_id=sorted(self.eos_token_ids),
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
        if not hasattr(model, "llm_engine"):
            tell_settings(model, self.generation_config)

    def rollout(self, prompts: Sequence[str | list[dict]]) -> list[Trajectory]:
        """One trajectory for each prompt, in their order. Prompts that the model's context cannot hold end at once."""
        contexts = [self._tokenize(prompt) for prompt in prompts]
        trajectories: list[Trajectory] = []
        for start in range(0, len(contexts), self.batch_size):
            batch = contexts[start : start + self.batch_size]
            self._prefix_cache = PrefixCache()
            rows = run_waves(
                group_parts(0, len(batch), group_size=1, num_initial=1),
                batch,
                self.protocol,
                RolloutHooks(sample=self._sample, tools_of=lambda trajectory: self.tools, submit=self._submit),
                Branching(self.vocab_size, entropy_window=self.entropy_window),
                self.limits,
                random.Random(0),
                self.eos_token_ids.__contains__,
            )
            for trajectory in rows:
                trajectory.row += start
            trajectories += rows
        self._prefix_cache = None
        return trajectories

    def completion(self, trajectory: Trajectory, prompt: str | list[dict]) -> Any:
        """What reward functions see of a trajectory."""
        return self.protocol.completion(trajectory.turns, is_conversational({"prompt": prompt}))

    def close(self) -> None:
        self.executor.close()

    def _tokenize(self, prompt: str | list[dict]) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer(prompt)["input_ids"]
        return self.tokenizer.apply_chat_template(
            prompt,
            tools=list(self.tools.values()) if self.protocol.schema_in_prompt and self.tools else None,
            chat_template=self.chat_template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            **self.chat_template_kwargs,
        )

    def _submit(self, trajectory: Trajectory, calls: list[ToolCall]) -> list[Future]:
        refuse_calls_over_limit(calls, trajectory, self.tools)
        return [self.executor.submit(call, self.tools.get(call.name)) for call in calls]

    def _sample(self, contexts: list[list[int]], limits: list[int]) -> list[Sample]:
        """A segment after each context; an empty one where there is no room left."""
        fitting = [index for index, limit in enumerate(limits) if limit > 0]
        samples = [Sample([], []) for _ in contexts]
        if fitting:
            sampled = self._generate([contexts[index] for index in fitting], [limits[index] for index in fitting])
            for index, sample in zip(fitting, sampled, strict=True):
                samples[index] = sample
        return samples

    @torch.no_grad()
    def _generate_transformers(self, contexts: list[list[int]], limits: list[int]) -> list[Sample]:
        length = max(map(len, contexts))
        input_ids = torch.full((len(contexts), length), self.generation_config.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, context in enumerate(contexts):
            input_ids[row, length - len(context) :] = torch.tensor(context)
            attention_mask[row, length - len(context) :] = 1
        recorded = recorded_generation(
            self.model,
            limits,
            self.stop_strings,
            self.entropy_window,
            self.temperature or 1.0,
            self._prefix_cache,
        )
        with without_unfit_settings(self.model), recorded as (recorder, stops):
            output = self.model.generate(
                input_ids.to(self.model.device),
                attention_mask=attention_mask.to(self.model.device),
                generation_config=self.generation_config,
            )
        ids = [_until_end(row, self.eos_token_ids) for row in output[:, length:].tolist()]
        return recorded_samples(ids, recorder, stops)

    def _generate_vllm(self, contexts: list[list[int]], limits: list[int]) -> list[Sample]:
        from vllm import SamplingParams

        settings = self.sampling | {
            "repetition_penalty": self.repetition_penalty,
            "stop": self.protocol.stop_strings,
            "include_stop_str_in_output": True,
            "stop_token_ids": sorted(self.eos_token_ids),
            "skip_special_tokens": False,  # a stop string may be a special token
        }
        outputs = self.model.generate(
            [{"prompt_token_ids": context} for context in contexts],
            sampling_params=[SamplingParams(**settings, max_tokens=limit) for limit in limits],
            use_tqdm=False,
        )
        return [Sample(list(output.outputs[0].token_ids), []) for output in outputs]


def _until_end(ids: list[int], ends: set[int]) -> list[int]:
    return next((ids[: position + 1] for position, token in enumerate(ids) if token in ends), ids)


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
        rows (`Iterable[dict]`): Questions: `prompt`, and the columns that `score` reads.
        score (`Callable`): A reward function.
        num_generations (`int`): Completions for each question, for pass@k.
        records_path (`str` or `Path`, *optional*): JSONL file that gets a line for each completion as soon as its
            question is done (format: docs/evaluation.md). Questions that it already holds are not asked again, so a
            killed run goes on where it stopped. Completions without a score are scored again, and so are all of a
            question whose columns (the ground truth) have changed, or all where `score` or `correct` has.
        correct (`Callable`, *optional*): Reward function that returns 1 or more for a right answer; by default `score`.
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
    rows = list(rows)
    correct = correct or score
    scored_with = scoring_hashes([score, correct], rows)
    fill_scores = partial(_fill_scores, agent, score, correct, scored_with)
    path = None if records_path is None else Path(records_path)
    sampling = sampling_settings(agent)
    done: dict[int, list[dict]] = {}
    if path is not None:
        done = resume(path, rows, num_generations, sampling, agent._tokenize, scored_with, fill_scores)
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
    own = [rows[record["prompt_index"]] for record in records]
    completions = [record["completion"] for record in records]
    own_ids = [own_tokens(record["completion_ids"], record["tool_mask"]) for record in records]
    texts = agent.tokenizer.batch_decode(own_ids, skip_special_tokens=True)
    for record, answer in zip(records, final_answers(completions, texts), strict=True):
        record["prediction"] = answer
    columns = {
        "prompts": [row["prompt"] for row in own],
        "completions": completions,
        "completion_ids": [record["completion_ids"] for record in records],
        "tool_calls": [record["tool_calls"] for record in records],
        "model_text": texts,
        **{name: [row[name] for row in own] for name in own[0] if name != "prompt"},
    }
    # Copies, since a function may change what it is given
    scores = score(**copied(columns))
    verdicts = scores if correct is score else correct(**copied(columns))
    for record, row, value, verdict in zip(records, own, scores, verdicts, strict=True):
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
        own = range(start, start + num_generations)
        groups.append(Group(own, num_generations, num_generations, trajectories=trajectories[start : own.stop]))
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


def summarize(records: Sequence[dict[str, Any]], ks: Sequence[int] = (1,)) -> dict[str, float]:
    """
    Mean score, accuracy, pass@k, each with its 95 % bootstrap interval over questions (`…_low`, `…_high`), calls and
    seconds per question.

    Completions without a score are counted in `unscored` and left out of the rest; pass@k is over the questions that have
    k scored completions.

    Args:
        records (`Sequence[dict]`): What [`evaluate`] returned.
        ks (`Sequence[int]`): Values of k; those above the number of completions are left out.
    """
    scores = [[value for value in record["scores"] if value is not None] for record in records]
    right = [[value for value in record["correct"] if value is not None] for record in records]
    if not any(right):
        raise ValueError("No completion has a score: `records` is empty, or the score function returned only None.")
    calls = [len(calls) for record in records for calls in record["tool_calls"]]
    summary: dict[str, float] = {
        "questions": len(records),
        "completions_per_question": len(calls) / len(records),
        "unscored": len(calls) - sum(map(len, right)),
        **_with_interval("score", [sum(row) / len(row) for row in scores if row]),
        **_with_interval("accuracy", [sum(row) / len(row) for row in right if row]),
        "calls_per_completion": sum(calls) / len(calls),
        "truncated": sum(sum(record["truncated"]) for record in records) / len(calls),
        "seconds_per_question": sum(record["seconds"] for record in records) / len(records),
    }
    for k in ks:
        estimates = [pass_at_k(len(row), sum(row), k) for row in right if len(row) >= k]
        if estimates:
            summary |= _with_interval(f"pass@{k}", estimates)
    return summary


def _with_interval(name: str, values: Sequence[float]) -> dict[str, float]:
    low, high = bootstrap_interval(values)
    return {name: sum(values) / len(values), f"{name}_low": low, f"{name}_high": high}


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """
    Probability that at least one of k samples is right, estimated without bias from `num_samples` of which `num_right`
    are: 1 − C(n − c, k) / C(n, k) ([Chen et al., 2021](https://huggingface.co/papers/2107.03374), Eq. 1).
    """
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def bootstrap_interval(values: Sequence[float], resamples: int = 1000, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values`; resampling is seeded, so that it repeats."""
    rng = random.Random(0)
    means = sorted(sum(rng.choices(values, k=len(values))) / len(values) for _ in range(resamples))
    tail = (1 - level) / 2
    return means[int(tail * resamples)], means[min(int((1 - tail) * resamples), resamples - 1)]
