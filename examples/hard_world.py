"""A harder world beside the demo's: one hop more, noise and contradiction in what the search finds, no call to spare.

    How many years older is the parent of Zula Korvin than Beka Trusk?
    How many years younger is the parent of Zula Korvin than Beka Trusk?
    How old was the birthplace of the parent of Zula Korvin when the parent was born?

Every question needs three look-ups, each known only from the result before it, and a subtraction. A search finds two
pages: one that answers, and one about a namesake or, for most births, a rumour with another year ("was perhaps in").
Four calls are all that `MAX_CALLS` allows, so that a wasted one costs the answer. Demonstrations go wrong in more
ways, and more often, than the demo's.

As in `demo_world.py`, nothing here trains, searches the web or runs code.
"""

import random
from functools import cache, cached_property

from demo_world import PLAN, Question, World

from arpo_trl.tools.search import BM25Search

# The budget of a row: three look-ups and one computation
MAX_CALLS = 4

# Share of births of which a rumour tells another year
RUMOURS = 0.6

# What goes wrong in a demonstration, always after a tool result, and in which share of them
MISTAKES = {
    "guess_after_first": 0.04,  # answers from the air after one look-up
    "guess_after_second": 0.06,  # or after two
    "guess_after_third": 0.06,  # or after all three, without computing
    "skip_parent": 0.08,  # looks up the birth of the child instead of the parent's
    "repeat_first": 0.08,  # looks the parent up again, and has no call left to compute with
    "believe_rumour": 0.15,  # computes with the year of a rumour, where there is one
    "wrong_order": 0.08,  # subtracts the wrong way round
    "no_box": 0.05,  # answers without \boxed{}
}

PHRASES = (
    *("system\n", "user\n", "assistant\n"),
    *("How many years older is the parent of ", "How many years younger is the parent of ", " than ", "?"),
    *("How old was the birthplace of the parent of ", " when the parent was born?"),
    *("Page 1: ", "Page 2: ", "The parent of ", " is ", "The birth of ", " was in ", " was perhaps in ", " in "),
    *("The foundation of ", "parent of ", "birth of ", "foundation of "),
    *("<think>", "</think>", "<search>", "</search>", "<python>", "</python>", "<result>", "</result>"),
    *("<answer>", "</answer>", "\\boxed{", "print("),
    PLAN,
)


class HardWorld(World):
    """Parents and children, towns, rumours, and questions about them. The same seed gives the same world.

    Args:
        seed (`int`, *optional*, defaults to `0`): Seed of names, facts, questions and demonstrations.
        num_people (`int`, *optional*, defaults to `4000`): People; half of them are children of the other half.
        num_towns (`int`, *optional*, defaults to `60`): Towns.

    Attributes:
        born (`dict[str, int]`): Year of birth of each person.
        rumoured (`dict[str, int]`): Year of birth by rumour, of those of whom there is one.
        parent (`dict[str, str]`): Parent of each child.
        birthplace (`dict[str, str]`): Town of birth of each person.
        founded (`dict[str, int]`): Year of foundation of each town.
    """

    mistakes = MISTAKES
    phrases = PHRASES

    def __init__(self, seed: int = 0, num_people: int = 4000, num_towns: int = 60):
        self.seed = seed
        rng = random.Random(f"hard world {seed}")
        people, towns = self._invent(rng, num_people, num_towns)
        parents, children = people[: num_people // 2], people[num_people // 2 :]
        self.founded = {town: rng.randint(1500, 1799) for town in towns}
        self.parent = {child: rng.choice(parents) for child in children}
        self.born = {person: rng.randint(1850, 1949) for person in parents}
        self.born |= {child: self.born[self.parent[child]] + rng.randint(18, 45) for child in children}
        self.birthplace = {person: rng.choice(towns) for person in people}
        self.rumoured = {}
        for person in people:
            if rng.random() < RUMOURS:
                self.rumoured[person] = self.born[person] + rng.choice((-1, 1)) * rng.randint(1, 40)

    @cached_property
    def passages(self) -> list[str]:
        """The search corpus, in random order, so that a rumour is found before the fact as often as after it."""
        passages = [
            *(f"The parent of {child} is {parent}." for child, parent in self.parent.items()),
            *(
                f"The birth of {person} was in {self.born[person]} in {self.birthplace[person]}."
                for person in self.born
            ),
            *(f"The birth of {person} was perhaps in {year}." for person, year in self.rumoured.items()),
            *(f"The foundation of {town} was in {year}." for town, year in self.founded.items()),
        ]
        random.Random(f"passages {self.seed}").shuffle(passages)
        return passages

    @cached_property
    def search(self):
        """The search tool: the two best passages. What was asked before is remembered."""
        return cache(BM25Search(self.passages, top_k=2).search)

    def _draw_question(self, rng: random.Random, people: list[str]) -> Question:
        child, other = rng.choice([*self.parent]), rng.choice([*self.born])
        parent = self.parent[child]
        if rng.random() < 1 / 3:
            town = self.birthplace[parent]
            text = f"How old was the birthplace of the parent of {child} when the parent was born?"
            return Question(text, "birthplace", (child, town), (self.born[parent], self.founded[town]))
        if other in (child, parent) or self.born[other] == self.born[parent]:
            return self._draw_question(rng, people)
        kind = "older" if self.born[parent] < self.born[other] else "younger"
        text = f"How many years {kind} is the parent of {child} than {other}?"
        return Question(text, kind, (child, other), (self.born[parent], self.born[other]))

    def trace(self, question: Question, mistake: str | None = None, guess: int = 0) -> str:
        child, last = question.entities
        parent = self.parent[child]
        wrong = f"<answer>\\boxed{{{guess}}}</answer>"
        trace = f"<think>{PLAN}</think>" + self._look_up(f"parent of {child}")
        if mistake == "guess_after_first":
            return trace + wrong
        if mistake == "repeat_first":
            trace += self._look_up(f"parent of {child}")
        years = list(question.years)
        if mistake == "skip_parent":
            parent, years[0] = child, self.born[child]
            if question.kind == "birthplace":
                last = self.birthplace[child]
                years[1] = self.founded[last]
        trace += self._look_up(f"birth of {parent}")
        if mistake == "guess_after_second":
            return trace + wrong
        trace += self._look_up(f"foundation of {last}" if last in self.founded else f"birth of {last}")
        if mistake == "guess_after_third":
            return trace + wrong
        if mistake == "repeat_first":  # the budget is spent: what the row would have gone on to do is refused
            return trace + wrong
        if mistake == "believe_rumour":
            years = [self.rumoured.get(who, year) for who, year in zip((parent, last), years, strict=True)]
        minuend, subtrahend = years[::-1] if question.kind == "older" else years
        if mistake == "wrong_order":
            minuend, subtrahend = subtrahend, minuend
        result = minuend - subtrahend
        trace += f"<python>print({minuend}-{subtrahend})</python><result>{result}</result>"
        return trace + (
            f"<answer>{result}</answer>" if mistake == "no_box" else f"<answer>\\boxed{{{result}}}</answer>"
        )

    def _look_up(self, query: str) -> str:
        return f"<search>{query}</search><result>{self.search(query)}</result>"
