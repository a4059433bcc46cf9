"""Sample a model with tools outside of training, and score what it does: accuracy, pass@k, calls per question.

The rollout is the trainer's own, with branching off: same protocol, same tool executor, same limits.

What is not here: vLLM, and the tables of published benchmarks.
"""

import json
import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOTrainer
from trl.chat_template_utils import add_response_schema, get_training_chat_template, is_chat_template_prefix_preserving
from trl.data_utils import is_conversational

from .protocols import ChatTemplateProtocol, TagsProtocol
from .rollout.loop import Branching, Limits, RolloutHooks, Sample, group_parts, refuse_calls_over_limit, run_waves
from .rollout.record import call_records
from .rollout.sampler import recorded_generation, recorded_samples, stop_string_criteria
from .rollout.tree import Trajectory
from .tools.executor import ToolCall, ToolExecutor


class Agent:
    """
    A model that calls tools.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        tools (`Sequence[Callable]`): Tools, as for [`ARPOTrainer`].
        tool_protocol (`str`): `"chat_template"` or `"tags"`, as the model was trained.
        max_completion_length (`int`): Tokens of a completion, tool results included.
        max_tool_calling_iterations (`int`, *optional*): Turns whose calls are answered; `None` for no limit.
        temperature, top_p, top_k: Sampling, as in [`ARPOConfig`]. A temperature of 0 decodes greedily.
        batch_size (`int`): Completions sampled together.
        chat_template_kwargs (`dict[str, Any]`, *optional*): Passed to the chat template.
        tool_timeout (`float`, *optional*): Seconds after which a tool call is given up.
        entropy_window (`int`): Tokens over which the entropy of a segment is read.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tools: Sequence[Callable] = (),
        tool_protocol: str = "chat_template",
        max_completion_length: int = 1024,
        max_tool_calling_iterations: int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        batch_size: int = 32,
        chat_template_kwargs: dict[str, Any] | None = None,
        tool_timeout: float | None = 120.0,
        entropy_window: int = 20,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.tools = {tool.__name__: tool for tool in tools}
        self.batch_size = batch_size
        self.chat_template_kwargs = chat_template_kwargs or {}
        self.entropy_window = entropy_window
        self.temperature = temperature
        self.executor = ToolExecutor(
            timeout=tool_timeout, count_tokens=lambda text: len(tokenizer.encode(text, add_special_tokens=False))
        )
        self.limits = Limits(
            completion=max_completion_length,
            context=model.config.get_text_config().max_position_embeddings,
            tool_turns=max_tool_calling_iterations if max_tool_calling_iterations is not None else 2**31,
        )
        self.chat_template = None
        if tool_protocol == "tags":
            self.protocol = TagsProtocol(tokenizer, list(self.tools))
        else:
            if self.tools:
                add_response_schema(tokenizer)
                if not is_chat_template_prefix_preserving(tokenizer):
                    self.chat_template = get_training_chat_template(tokenizer)
            # The one piece of TRL's trainer that renders results into tokens needs nothing but these
            renderer = SimpleNamespace(
                processing_class=tokenizer,
                _tokenizer=tokenizer,
                _is_vlm=False,
                chat_template=self.chat_template,
                chat_template_kwargs=self.chat_template_kwargs,
            )
            self.protocol = ChatTemplateProtocol(
                tokenizer, lambda messages: GRPOTrainer._get_tool_suffix_ids(renderer, messages)
            )
        self.stop_strings = stop_string_criteria(tokenizer, self.protocol.stop_strings)
        eos = model.generation_config.eos_token_id
        self.eos_token_ids = {
            tokenizer.eos_token_id,
            *(eos if isinstance(eos, list) else [eos] if eos is not None else []),
        }
        self.generation_config = GenerationConfig(
            max_new_tokens=max_completion_length,
            do_sample=temperature > 0,
            **({"temperature": temperature, "top_p": top_p, "top_k": top_k} if temperature > 0 else {}),
            eos_token_id=sorted(self.eos_token_ids),
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )

    def rollout(self, prompts: Sequence[str | list[dict]]) -> list[Trajectory]:
        """One trajectory for each prompt, in their order. Prompts that the model's context cannot hold end at once."""
        contexts = [self._tokenize(prompt) for prompt in prompts]
        trajectories: list[Trajectory] = []
        for start in range(0, len(contexts), self.batch_size):
            batch = contexts[start : start + self.batch_size]
            trajectories += run_waves(
                group_parts(0, len(batch), group_size=1, num_initial=1),
                batch,
                self.protocol,
                RolloutHooks(sample=self._sample, tools_of=lambda trajectory: self.tools, submit=self._submit),
                Branching(self.model.config.get_text_config().vocab_size, entropy_window=self.entropy_window),
                self.limits,
                random.Random(0),
                self.eos_token_ids.__contains__,
            )
        return trajectories

    def completion(self, trajectory: Trajectory, prompt: str | list[dict]) -> Any:
        """What reward functions see of a trajectory."""
        return self.protocol.completion(trajectory.turns, is_conversational({"prompt": prompt}))

    def model_text(self, trajectory: Trajectory) -> str:
        """The text of the model's own tokens."""
        return self.tokenizer.decode(trajectory.own_ids, skip_special_tokens=True)

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

    @torch.no_grad()
    def _sample(self, contexts: list[list[int]], limits: list[int]) -> list[Sample]:
        fitting = [index for index, limit in enumerate(limits) if limit > 0]
        samples = [Sample([], []) for _ in contexts]
        if not fitting:
            return samples
        length = max(len(contexts[index]) for index in fitting)
        pad = self.generation_config.pad_token_id
        input_ids = torch.full((len(fitting), length), pad)
        attention_mask = torch.zeros_like(input_ids)
        for row, index in enumerate(fitting):
            input_ids[row, length - len(contexts[index]) :] = torch.tensor(contexts[index])
            attention_mask[row, length - len(contexts[index]) :] = 1
        budgets = [limits[index] for index in fitting]
        with recorded_generation(
            self.model, budgets, self.stop_strings, self.entropy_window, self.temperature or 1.0
        ) as (recorder, stops):
            output = self.model.generate(
                input_ids.to(self.model.device),
                attention_mask=attention_mask.to(self.model.device),
                generation_config=self.generation_config,
            )
        ids = [_until_end(row, self.eos_token_ids) for row in output[:, length:].tolist()]
        for index, sample in zip(fitting, recorded_samples(ids, recorder, stops), strict=True):
            samples[index] = sample
        return samples


def _until_end(ids: list[int], ends: set[int]) -> list[int]:
    return next((ids[: position + 1] for position, token in enumerate(ids) if token in ends), ids)


def evaluate(
    agent: Agent,
    rows: Iterable[dict[str, Any]],
    score: Callable[..., list[float | None]],
    num_generations: int = 1,
    records_path: str | Path | None = None,
) -> list[dict[str, Any]]:
    """
    Let an agent answer questions and score the answers.

    Args:
        agent ([`Agent`]): The agent.
        rows (`Iterable[dict]`): Questions: `prompt`, and the columns that `score` reads.
        score (`Callable`): A reward function; a completion counts as right if it returns 1 or more.
        num_generations (`int`): Completions for each question, for pass@k.
        records_path (`str` or `Path`, *optional*): JSONL file that gets a line for each question as soon as it is done.
            Questions that it already holds are not asked again, so a killed run goes on where it stopped.

    Returns:
        `list[dict]`: for each question `index`, `scores` (`None` where `score` had nothing to say), `truncated` (one
        entry a completion), `tool_calls` (a list a
        completion), `completions` and `seconds` (of the batch it was in, divided by its questions).
    """
    rows = list(rows)
    done: dict[int, dict] = {}
    if records_path is not None and Path(records_path).exists():
        for line in Path(records_path).read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # the line that a killed run was writing
                continue
            if len(record["scores"]) == num_generations:
                done[record["index"]] = record
    todo = [index for index in range(len(rows)) if index not in done]
    step = max(1, agent.batch_size // num_generations)
    with tqdm(total=len(rows), initial=len(done), desc="Evaluation", unit=" questions") as bar:
        for start in range(0, len(todo), step):
            batch = todo[start : start + step]
            started = time.perf_counter()
            results = _ask(agent, [rows[index] for index in batch], score, num_generations)
            seconds = (time.perf_counter() - started) / len(batch)
            for index, result in zip(batch, results, strict=True):
                done[index] = {"index": index, **result, "seconds": seconds}
            if records_path is not None:
                Path(records_path).parent.mkdir(parents=True, exist_ok=True)
                with open(records_path, "a", encoding="utf-8") as file:
                    file.writelines(json.dumps(done[index], default=str) + "\n" for index in batch)
            bar.update(len(batch))
    return [done[index] for index in range(len(rows))]


def _ask(agent: Agent, rows: list[dict], score: Callable, num_generations: int) -> list[dict[str, Any]]:
    repeated = [row for row in rows for _ in range(num_generations)]
    prompts = [row["prompt"] for row in repeated]
    trajectories = agent.rollout(prompts)
    completions = [
        agent.completion(trajectory, prompt) for trajectory, prompt in zip(trajectories, prompts, strict=True)
    ]
    calls = [call_records(trajectory) for trajectory in trajectories]
    columns = {name: [row[name] for row in repeated] for name in rows[0] if name != "prompt"}
    scores = score(
        prompts=prompts,
        completions=completions,
        completion_ids=[trajectory.completion_ids for trajectory in trajectories],
        tool_calls=calls,
        model_text=[agent.model_text(trajectory) for trajectory in trajectories],
        **columns,
    )
    results = []
    for start in range(0, len(repeated), num_generations):
        own = slice(start, start + num_generations)
        results.append(
            {
                "scores": list(scores[own]),
                "truncated": [trajectory.truncated for trajectory in trajectories[own]],
                "tool_calls": calls[own],
                "completions": completions[own],
            }
        )
    return results


def summarize(records: Sequence[dict[str, Any]], ks: Sequence[int] = (1,)) -> dict[str, float]:
    """
    Accuracy, its 95 % bootstrap interval over questions, pass@k, calls and seconds per question.

    Completions without a score are counted in `unscored` and left out of the rest.

    Args:
        records (`Sequence[dict]`): What [`evaluate`] returned.
        ks (`Sequence[int]`): Values of k; those above the number of completions are left out.
    """
    right = [[value >= 1.0 for value in record["scores"] if value is not None] for record in records]
    right = [row for row in right if row]
    if not right:
        raise ValueError("No completion has a score: `records` is empty, or the score function returned only None.")
    calls = [len(calls) for record in records for calls in record["tool_calls"]]
    per_question = [sum(row) / len(row) for row in right]
    low, high = bootstrap_interval(per_question)
    summary = {
        "questions": len(records),
        "completions_per_question": len(calls) / len(records),
        "unscored": len(calls) - sum(map(len, right)),
        "accuracy": sum(per_question) / len(per_question),
        "accuracy_low": low,
        "accuracy_high": high,
        "calls_per_completion": sum(calls) / len(calls),
        "truncated": sum(sum(record["truncated"]) for record in records) / len(calls),
        "seconds_per_question": sum(record["seconds"] for record in records) / len(records),
    }
    for k in ks:
        if k <= min(map(len, right)):
            summary[f"pass@{k}"] = sum(pass_at_k(len(row), sum(row), k) for row in right) / len(right)
    return summary


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
