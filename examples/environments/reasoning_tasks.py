"""
ARPO on tasks of Reasoning Gym, with the sandboxed Python tool and Reasoning Gym's own scorers for a reward.

```bash
pip install reasoning-gym
python examples/environments/reasoning_tasks.py          # `--small` for a model built on the spot
```

A task is a question and nothing else, so no environment is needed: the tool is stateless, forks copy nothing, and
equal code of a group is executed once. A row says which task it is by name, seed and index; the scorer makes it again.
"""

import functools
from argparse import Namespace

import reasoning_gym
from training import Player, ask, demonstrate, parse, python_sandbox, train

from arpo_trl.rewards import extract_answer

TASK = "\nCompute with Python, then give the answer as \\boxed{}."
CODE = {
    "chain_sum": lambda facts: f"print({facts['expression']})",
    "gcd": lambda facts: f"import math\nprint(math.gcd(*{facts['numbers']}))",
    "count_bits": lambda facts: f"print(bin({facts['number']}).count('1'))",
}


@functools.cache
def tasks(name: str, seed: int):
    return reasoning_gym.create_dataset(name, size=100, seed=seed)


def rows(seed: int, number: int) -> list[dict]:
    """As many tasks, of all kinds alike."""
    kinds = list(CODE)
    places = [(kinds[index % len(kinds)], index // len(kinds)) for index in range(number)]
    return [
        {"prompt": ask(tasks(kind, seed)[index]["question"] + TASK), "kind": kind, "task_seed": seed, "index": index}
        for kind, index in places
    ]


def scored(model_text, kind, task_seed, index, **kwargs) -> list[float]:
    """Reasoning Gym's score of each answer, between 0 and 1."""
    scores = []
    for text, *task in zip(model_text, kind, task_seed, index, strict=True):
        name, seed, number = task
        made = tasks(name, seed)
        scores.append(made.score_answer(extract_answer(text), made[number]))
    return scores


def player(code: str) -> Player:
    answer = yield "python", {"code": code}
    return f"\\boxed{{{answer.strip()}}}"


def demonstration(row: dict, python) -> dict:
    task = tasks(row["kind"], row["task_seed"])[row["index"]]
    return demonstrate(row["prompt"], [python], player(CODE[row["kind"]](task["metadata"])))


def main(arguments: Namespace, **settings):
    with python_sandbox() as sandbox:
        demonstrations = [demonstration(row, sandbox.python) for row in rows(arguments.seed + 1, 60)]
        return train(
            arguments,
            rows(arguments.seed, 64),
            demonstrations,
            tools=[sandbox.python],
            reward_funcs=scored,
            **{"max_completion_length": 400, **settings},
        )


if __name__ == "__main__":
    main(parse(__doc__))
