"""The demo's world, asked about in many words: what one look-up is called differs from row to row.

In `demo_world.py` a look-up has one query, so that rows of a group repeat each other's calls word for word. Here each
demonstration words its plan, its thoughts and its queries in one of many ways, as a pretrained model does, and rows
that look the same thing up rarely ask for it in the same words.

As in `demo_world.py`, nothing here trains, searches the web or runs code.
"""

import random

from demo_world import PHRASES, Question, World

PLANS = (
    "Two look-ups, then a subtraction.",
    "I need two years and their difference.",
    "First one year, then the other.",
    "Look both up, then subtract.",
    "The difference of two years.",
)
THOUGHTS = (
    "Now the other one.",
    "One year is known.",
    "Next look-up.",
    "That was the first year.",
    "On to the second.",
)
SUMS = ("Now subtract.", "Both years are known.", "What is the difference?", "Time to compute.")

# What stands before and after the name in a query; the search ranks by the name
PERSON_QUERIES = (
    *(("", ""), ("birth of ", ""), ("", " born"), ("when was ", " born"), ("year of birth of ", "")),
    *(("", " year of birth"), ("life of ", ""), ("", " biography"), ("who is ", ""), ("facts about ", "")),
)
TOWN_QUERIES = (
    *(("foundation of ", ""), ("", " founded"), ("when was ", " founded"), ("year of foundation of ", "")),
    *(("", " year of foundation"), ("history of ", ""), ("", " history"), ("age of ", ""), ("facts about ", "")),
)
WORDS = {part for query in (*PERSON_QUERIES, *TOWN_QUERIES) for part in query if part}


class WordyWorld(World):
    """[`World`] whose demonstrations word their thoughts and queries in many ways, each question in one of them."""

    phrases = (*PHRASES, *PLANS[1:], *THOUGHTS, *SUMS, *sorted(WORDS - {*PHRASES}))

    def trace(self, question: Question, mistake: str | None = None, guess: int = 0) -> str:
        self._rng = random.Random(f"words {self.seed} {question.text}")
        trace = super().trace(question, mistake, guess)
        plan, *rest = trace.split("</think>", maxsplit=1)
        trace = f"<think>{self._rng.choice(PLANS)}</think>{rest[0]}"
        # A thought before the second look-up in two of three rows, and before the computation in as many
        for call, thoughts in (("<search>", THOUGHTS), ("<python>", SUMS)):
            head, found, tail = trace.rpartition(call)
            if found and head.endswith("</result>") and self._rng.random() < 2 / 3:
                trace = f"{head}<think>{self._rng.choice(thoughts)}</think>{call}{tail}"
        return trace

    def query(self, entity: str) -> str:
        before, after = self._rng.choice(TOWN_QUERIES if entity in self.founded else PERSON_QUERIES)
        return f"{before}{entity}{after}"
