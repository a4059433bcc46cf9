"""
ARPO in one file, with torch and transformers alone: the rollout with forks, both attributions, and the loss.

```bash
python examples/arpo_in_one_file.py --attribution soft  # or hard: cold start and 20 steps of ARPO on a CPU
```

Equations are those of Agentic Reinforced Policy Optimization (https://huggingface.co/papers/2507.19849). The library
adds TRL's trainer, vLLM, several processes, shared-prefix caches and scoring, and tools that may fail or hang.
`tests/test_one_file.py` shows that on the same random numbers both make the same forks and give the same advantages.
"""

import argparse
import copy
import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from statistics import fmean

import torch
from demo_world import World, build_model, build_tokenizer

M, N = 16, 8  # rows of a group, and those of them that start from the prompt
ALPHA, BETA, K = 0.5, 0.2, 20  # base probability of a fork, weight of the entropy gap, tokens of a reading
PROMPTS, MAX_TOKENS, MAX_CALLS, EPSILON = 8, 160, 4, 0.2
CALL = re.compile(r"<(search|python)>(.*?)</\1>", re.DOTALL)


@dataclass
class Row:
    """A trajectory. `origins` names each completion token by the row that brought it and its place in that row."""

    group: int
    index: int
    prompt: list[int]
    completion: list[int] = field(default_factory=list)
    own: list[int] = field(default_factory=list)  # 1 for a token of the model, 0 for one of a tool result
    origins: list[tuple[int, int]] = field(default_factory=list)
    baseline: float | None = None  # H_0, of the first segment
    calls: int = 0
    resamples: bool = False  # the next segment samples anew what a parent has sampled already

    def append(self, ids: list[int], own: int) -> None:
        self.completion += ids
        self.own += [own] * len(ids)
        self.origins += [(self.index, place) for place in range(len(self.origins), len(self.completion))]

    def fork(self, index: int) -> "Row":
        """A row that shares all tokens and calls so far, and samples its own way on."""
        return replace(copy.deepcopy(self), index=index, resamples=True)


def rollout(
    prompts: list[list[int]],
    sample: Callable[[list[list[int]], list[int]], list[tuple[list[int], list[float]]]],
    answer: Callable[[list[int]], list[int] | None],
    vocab_size: int,
    rng: random.Random,
) -> list[list[Row]]:
    """
    Fill a group of M rows for each prompt (section 3.1, Algorithm 1).

    Args:
        prompts (`list[list[int]]`): Tokens of each prompt.
        sample (`Callable`): For contexts and limits: a segment's tokens and their entropies in nats, for each.
        answer (`Callable`): Tokens of a tool's result, from those of the segment that calls it; `None` for no call.
        vocab_size (`int`): V.
        rng (`random.Random`): Decides on forks and breaks ties.
    """
    groups = [[Row(number, index, prompt) for index in range(N)] for number, prompt in enumerate(prompts)]
    waiting = [row for group in groups for row in group]
    while waiting:
        contexts = [row.prompt + row.completion for row in waiting]
        segments, ready = sample(contexts, [MAX_TOKENS - len(row.completion) for row in waiting]), []
        for number, group in enumerate(groups):
            asking = []
            for row, (_, entropies) in zip(waiting, segments, strict=True):
                if row.group != number:
                    continue
                entropy = fmean(entropies[:K])
                if not row.completion:
                    row.baseline = entropy
                elif not row.resamples:  # each tool result is decided upon once
                    gap = K * (entropy - row.baseline) / math.log(vocab_size)  # Eq. 3
                    probability = min(max(ALPHA + BETA * gap, 0.0), 1.0)  # Eq. 4
                    if rng.random() < probability:  # Eq. 5
                        asking.append((gap, row))
            asking.sort(key=lambda asked: (-asked[0], rng.random()))  # the largest gap is served first
            for _, row in sorted(asking[: M - len(group)], key=lambda asked: asked[1].index):
                group.append(row.fork(len(group)))  # leaves before the segment that was just read
                ready.append(group[-1])

        for row, (ids, _) in zip(waiting, segments, strict=True):
            row.append(ids, own=1)
            row.resamples = False
            result = answer(ids)
            if result is None or row.calls == MAX_CALLS:
                continue
            row.calls += 1
            if len(row.completion) + len(result) < MAX_TOKENS:  # a result that does not fit ends the row
                row.append(result, own=0)
                ready.append(row)
        for number, group in enumerate(groups):
            if all(row.group != number for row in ready):  # too few forks: the missing rows start from the prompt
                group += [Row(number, index, prompts[number]) for index in range(len(group), M)]
                ready += [row for row in group if not row.completion]
        waiting = sorted(ready, key=lambda row: (row.group, row.index))
    return groups


def soft_advantages(group: list[Row], advantages: list[float]) -> list[list[float]]:
    """A row's advantage on each of its tokens (section 3.2). Rows that share a token average over it in the loss."""
    return [[advantage] * len(row.completion) for row, advantage in zip(group, advantages, strict=True)]


def hard_advantages(group: list[Row], advantages: list[float]) -> list[list[float]]:
    """The mean advantage of the rows that share a token, on each token (section 3.2)."""
    sharing: dict[tuple[int, int], list[float]] = {}
    for row, advantage in zip(group, advantages, strict=True):
        for origin in row.origins:
            sharing.setdefault(origin, []).append(advantage)
    return [[fmean(sharing[origin]) for origin in row.origins] for row in group]


def normalised(rewards: list[float]) -> list[float]:
    """GRPO's advantage of each row of a group: (r − mean) / std."""
    r = torch.tensor(rewards)
    return ((r - r.mean()) / (r.std() + 1e-4)).tolist()


def policy_loss(logprobs, old_logprobs, advantages, own) -> torch.Tensor:
    """GRPO's clipped objective over the model's own tokens; all arguments are tensors of shape (B, T)."""
    ratio = torch.exp(logprobs - old_logprobs)
    objective = torch.minimum(ratio * advantages, ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantages)
    return -(objective * own).sum() / own.sum()


def padded(rows: list[list], value: int = 0, side: str = "right") -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, rows)), True, value, side)


def sampler(model, tokenizer) -> Callable:
    def sample(contexts: list[list[int]], limits: list[int]) -> list[tuple[list[int], list[float]]]:
        ids = padded(contexts, tokenizer.pad_token_id, "left")
        output = model.generate(
            ids,
            attention_mask=padded([[1] * len(context) for context in contexts], side="left"),
            max_new_tokens=max(limits),
            do_sample=True,
            stop_strings=["</search>", "</python>"],
            tokenizer=tokenizer,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logprobs = torch.stack(output.logits[:K], dim=1).log_softmax(-1)
        entropies = torch.special.entr(logprobs.exp()).sum(-1).tolist()
        sampled = output.sequences[:, ids.size(1) :]
        lengths = map(min, (sampled != tokenizer.pad_token_id).sum(1).tolist(), limits)
        return [(new[:n], read[:n]) for new, read, n in zip(sampled.tolist(), entropies, lengths, strict=True)]

    return sample


def tools(world: World, tokenizer) -> Callable:
    pages = [(page, set(re.findall(r"\w+", page))) for page in world.passages]

    def answer(ids: list[int]) -> list[int] | None:
        call = CALL.search(tokenizer.decode(ids))
        if call is None:
            return None
        if call[1] == "search":
            words = set(call[2].split())
            result = "Page 1: " + max(pages, key=lambda page: len(words & page[1]) / len(page[1]))[0]
        else:
            numbers = re.fullmatch(r"print\((\d+)([+-]\d+)\)", call[2])
            result = str(int(numbers[1]) + int(numbers[2])) if numbers else "error"
        return tokenizer.encode(f"<result>{result}</result>", add_special_tokens=False)

    return answer


def completion_logprobs(model, rows: list[Row]) -> torch.Tensor:
    """Log-probabilities of the completion tokens, of shape (B, T)."""
    ids = padded([row.prompt + row.completion for row in rows])
    logprobs = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    cut = [values[len(row.prompt) - 1 :][: len(row.completion)] for values, row in zip(logprobs, rows, strict=True)]
    return torch.nn.utils.rnn.pad_sequence(cut, batch_first=True)


def main(seed: int, cold_steps: int, steps: int, attribution: str) -> list[float]:
    """Cold start, then ARPO; returns the mean reward of each step."""
    torch.manual_seed(seed)
    rng, world = random.Random(seed), World(seed)
    tokenizer = build_tokenizer(world)
    model, answer = build_model(tokenizer), tools(world, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.1)

    def encoded(messages: list[dict]) -> list[int]:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    def update(loss: torch.Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    demonstrations = world.demonstrations()
    for step in range(cold_steps):
        optimizer.param_groups[0]["lr"] = 5e-3 * min(step / 30, math.cos(math.pi * step / cold_steps / 2) ** 2)
        rows = []
        for demonstration in rng.sample(demonstrations, 32):
            *question, trace = demonstration["messages"]
            row = Row(0, 0, encoded(question))
            for part in re.split(r"(<result>.*?</result>)", trace["content"] + tokenizer.eos_token):
                row.append(tokenizer.encode(part, add_special_tokens=False), own=int(not part.startswith("<result>")))
            rows.append(row)
        own = padded([row.own for row in rows])
        loss = -(completion_logprobs(model, rows) * own).sum() / own.sum()
        update(loss)

    means, attribute = [], {"soft": soft_advantages, "hard": hard_advantages}[attribution]
    optimizer.param_groups[0]["lr"] = 3e-4
    for step in range(steps):
        questions = rng.sample(world.rows("rl"), PROMPTS)
        prompts = [encoded(question["prompt"]) for question in questions]
        groups = rollout(prompts, sampler(model, tokenizer), answer, len(tokenizer), rng)
        rewards, advantages = [], []
        for group, question in zip(groups, questions, strict=True):
            right = f"<answer>\\boxed{{{question['answer']}}}</answer>"
            scores = [float(right in tokenizer.decode(row.completion)) for row in group]
            rewards += scores
            advantages += attribute(group, normalised(scores))
        rows = [row for group in groups for row in group]
        logprobs = completion_logprobs(model, rows)
        # One update a rollout: the old policy is the present one, so the ratio is 1 and its gradient is what counts
        loss = policy_loss(logprobs, logprobs.detach(), padded(advantages), padded([row.own for row in rows]))
        update(loss)
        means.append(fmean(rewards))
        shared = fmean(brought != row.index for row in rows for brought, _ in row.origins)
        print(f"step {step + 1}: reward {means[-1]:.3f}, shared tokens {shared:.0%}", flush=True)
    return means


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="ARPO on the demo's world")
    for option, default in (("--seed", 0), ("--cold_steps", 1300), ("--steps", 20)):
        parser.add_argument(option, type=int, default=default)
    parser.add_argument("--attribution", choices=("soft", "hard"), default="soft")
    main(**vars(parser.parse_args()))
