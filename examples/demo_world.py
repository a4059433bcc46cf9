"""The world of the demo: a few thousand facts that no model has read anywhere, made on the spot from a seed.

Its people and towns are invented, and the facts exist only in a search corpus of one-sentence passages. Every question
needs two look-ups and a subtraction; what to look up second may be known only from the first result:

    How many years older is Zula Korvin than Beka Trusk?
    How many years younger is Beka Trusk than Zula Korvin?
    How old was the birthplace of Zula Korvin when they were born?

Demonstrations speak the tags protocol, and about half of them go wrong, at a point after a tool result. A cold start
on them gives a model that can do the task and often does not: that is where reinforcement learning begins.

This module does NOT train, search or run code; `demo.py` joins it to the trainers and the tools. Its language is a
dozen phrases, so nothing learnt here transfers to anything else.
"""

import random
import re
from dataclasses import dataclass
from functools import cached_property
from itertools import product

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

# Questions in each split; no two questions of a world, whatever their split, are about the same pair of entities
SPLITS = {"cold_start": 10000, "rl": 1000, "held_out": 300}

# What goes wrong in a demonstration, and in which share of them. A model trained on them does the same at random when
# sampled, most kinds less often than they were shown.
MISTAKES = {
    "guess_after_first": 0.10,  # answers from the air after one look-up
    "repeat_first": 0.08,  # looks the first entity up again instead of the second
    "guess_after_second": 0.08,  # answers from the air after both look-ups, without computing
    "wrong_order": 0.10,  # subtracts the wrong way round
    "wrong_operator": 0.06,  # adds
    "no_box": 0.06,  # answers without \boxed{}
}

# The paper's format wants a thought; one is enough
PLAN = "Two look-ups, then a subtraction."

# Text that recurs, besides names: each gets a token of its own
PHRASES = (
    *("system\n", "user\n", "assistant\n"),
    *("How many years older is ", "How many years younger is ", " than ", "?"),
    *("How old was the birthplace of ", " when they were born?"),
    *("Page 1: ", " was born in ", " was founded in ", " in ", "foundation of "),
    *("<think>", "</think>", "<search>", "</search>", "<python>", "</python>", "<result>", "</result>"),
    *("<answer>", "</answer>", "\\boxed{", "print("),
    PLAN,
)

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Question:
    """A question and the way to its answer.

    Args:
        text (`str`): The question.
        kind (`str`): `"older"`, `"younger"` or `"birthplace"`.
        entities (`tuple[str, str]`): What has to be looked up, in order: two people, or a person and their birthplace.
        years (`tuple[int, int]`): The year to find for each of them.
    """

    text: str
    kind: str
    entities: tuple[str, str]
    years: tuple[int, int]

    @property
    def operands(self) -> tuple[int, int]:
        """The subtraction that gives the answer: minuend, subtrahend."""
        return self.years[::-1] if self.kind == "older" else self.years

    @property
    def answer(self) -> str:
        """The answer, an integer above 0."""
        minuend, subtrahend = self.operands
        return str(minuend - subtrahend)


class World:
    """People, towns, the passages that tell of them, and questions about them. The same seed gives the same world.

    Args:
        seed (`int`, *optional*, defaults to `0`): Seed of names, facts, questions and demonstrations.
        num_people (`int`, *optional*, defaults to `4000`): People; of each the year of birth and the birthplace is
            known.
        num_towns (`int`, *optional*, defaults to `60`): Towns; of each the year of foundation is known.

    Attributes:
        born (`dict[str, int]`): Year of birth of each person.
        birthplace (`dict[str, str]`): Town of birth of each person.
        founded (`dict[str, int]`): Year of foundation of each town.
    """

    mistakes = MISTAKES
    phrases = PHRASES

    def __init__(self, seed: int = 0, num_people: int = 4000, num_towns: int = 60):
        self.seed = seed
        rng = random.Random(f"world {seed}")
        people, towns = self._invent(rng, num_people, num_towns)
        self.founded = {town: rng.randint(1500, 1899) for town in towns}
        self.born = {person: rng.randint(1900, 1999) for person in people}
        self.birthplace = {person: rng.choice(towns) for person in people}

    def _invent(self, rng: random.Random, num_people: int, num_towns: int) -> tuple[list[str], list[str]]:
        """Names of people and of towns; keeps the first and last names that they are made of."""
        num_names = int((2 * num_people) ** 0.5)
        self.first_names = invent_names(rng, num_names, ("CVCa", "CVCila", "CVro"))
        self.last_names = invent_names(rng, num_names, ("CVCVsk", "CVlCen", "CVrrick"))
        towns = invent_names(rng, num_towns, ("CVCholm", "CVrvath", "CVlstead"))
        people = [" ".join(name) for name in rng.sample([*product(self.first_names, self.last_names)], num_people)]
        return people, towns

    def passage(self, entity: str) -> str:
        """All that the corpus says of a person or town."""
        if entity in self.founded:
            return f"{entity} was founded in {self.founded[entity]}."
        return f"{entity} was born in {self.born[entity]} in {self.birthplace[entity]}."

    def query(self, entity: str) -> str:
        """The search that finds the passage of a person or town first."""
        return f"foundation of {entity}" if entity in self.founded else entity

    @property
    def passages(self) -> list[str]:
        """The search corpus, one passage for each person and town."""
        return [self.passage(entity) for entity in (*self.born, *self.founded)]

    @cached_property
    def _splits(self) -> dict[str, list[Question]]:
        rng = random.Random(f"questions {self.seed}")
        people = [*self.born]
        questions: dict[frozenset[str], Question] = {}
        while len(questions) < sum(SPLITS.values()):
            question = self._draw_question(rng, people)
            questions.setdefault(frozenset(question.entities), question)
        # birthplace questions run out first; shuffled, every split has the same share of them
        drawn = [*questions.values()]
        rng.shuffle(drawn)
        return {split: [drawn.pop() for _ in range(size)] for split, size in SPLITS.items()}

    def _draw_question(self, rng: random.Random, people: list[str]) -> Question:
        kind = rng.choice(("older", "younger", "birthplace"))
        first, second = rng.sample(people, 2)
        if kind == "birthplace":
            text, second = f"How old was the birthplace of {first} when they were born?", self.birthplace[first]
            return Question(text, kind, (first, second), (self.born[first], self.founded[second]))
        if self.born[first] == self.born[second]:
            return self._draw_question(rng, people)
        if (self.born[first] > self.born[second]) == (kind == "older"):
            first, second = second, first
        text = f"How many years {kind} is {first} than {second}?"
        return Question(text, kind, (first, second), (self.born[first], self.born[second]))

    def questions(self, split: str) -> list[Question]:
        """The questions of a split: `"cold_start"`, `"rl"` or `"held_out"`."""
        return self._splits[split]

    def rows(self, split: str) -> list[dict]:
        """The questions of a split as rows for a trainer: `prompt` (messages) and `answer` (`str`)."""
        return [
            {"prompt": [{"role": "user", "content": question.text}], "answer": question.answer}
            for question in self.questions(split)
        ]

    def demonstrations(self) -> list[dict]:
        """One demonstration for each cold-start question, mistakes included.

        Returns:
            `list[dict]`: Rows with `messages`, a question and the whole trace of tool calls, results and answer in one
            assistant message, and `mistake`, a key of `mistakes` or `None`.
        """
        rng = random.Random(f"demonstrations {self.seed}")
        kinds = [None, *self.mistakes]
        weights = [1 - sum(self.mistakes.values()), *self.mistakes.values()]
        rows = []
        for question in self.questions("cold_start"):
            mistake = rng.choices(kinds, weights)[0]
            messages = [
                {"role": "user", "content": question.text},
                {"role": "assistant", "content": self.trace(question, mistake, guess=rng.randint(1, 99))},
            ]
            rows.append({"messages": messages, "mistake": mistake})
        return rows

    def trace(self, question: Question, mistake: str | None = None, guess: int = 0) -> str:
        """What an assistant writes and reads on its way to an answer.

        Args:
            question ([`Question`]): The question.
            mistake (`str`, *optional*): What goes wrong, a key of `MISTAKES`.
            guess (`int`): The answer of the mistakes that guess.
        """
        first, second = question.entities
        trace = f"<think>{PLAN}</think>" + self._look_up(first)
        if mistake == "guess_after_first":
            return trace + f"<answer>\\boxed{{{guess}}}</answer>"
        minuend, subtrahend = question.operands
        if mistake == "repeat_first":
            second, minuend, subtrahend = first, question.years[0], question.years[0]
        trace += self._look_up(second)
        if mistake == "guess_after_second":
            return trace + f"<answer>\\boxed{{{guess}}}</answer>"
        if mistake == "wrong_order":
            minuend, subtrahend = subtrahend, minuend
        if mistake == "wrong_operator":
            code, result = f"print({minuend}+{subtrahend})", minuend + subtrahend
        else:
            code, result = f"print({minuend}-{subtrahend})", minuend - subtrahend
        trace += f"<python>{code}</python><result>{result}</result>"
        return trace + (
            f"<answer>{result}</answer>" if mistake == "no_box" else f"<answer>\\boxed{{{result}}}</answer>"
        )

    def _look_up(self, entity: str) -> str:
        return f"<search>{self.query(entity)}</search><result>Page 1: {self.passage(entity)}</result>"


def invent_names(rng: random.Random, count: int, patterns: tuple[str, ...]) -> list[str]:
    """`count` distinct capitalised names.

    Args:
        rng (`random.Random`): Source of chance.
        count (`int`): Number of names.
        patterns (`tuple[str, ...]`): Shapes of a name: `C` is a consonant, `V` a vowel, any other letter itself.
    """
    letters = {"C": "bdfgklmnprstvz", "V": "aeiou"}
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(rng.choice(letters.get(sign, sign)) for sign in rng.choice(patterns)).capitalize()] = None
    return [*names]


def build_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """A tokenizer in which every name, tag and phrase of the world is one token, and every two digits.

    Any other text is spelt in bytes, so nothing is lost. A first name owns the space that follows it: a name is then
    the same tokens wherever it stands.

    Args:
        world ([`World`]): Where the names come from.

    Returns:
        [`~transformers.PreTrainedTokenizerFast`]: With Qwen's chat format, `<|im_end|>` as end-of-sequence token and
        `<|endoftext|>` as padding.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    names = (*(f"{name} " for name in world.first_names), *world.last_names, *world.founded)
    words = (*world.phrases, *names, *(f"{number:02}" for number in range(100)))
    spelt = [
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        *(byte_level.pre_tokenize_str(word)[0][0] for word in words),
    ]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(spelt))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[], ignore_merges=True))
    phrases = "|".join(re.escape(phrase) for phrase in sorted(world.phrases, key=len, reverse=True))
    split = pre_tokenizers.Split(Regex(rf"{phrases}|[A-Z][a-z]+ (?=[A-Z])|[A-Za-z]+|\d\d?"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, hidden: int = 128, layers: int = 2) -> Qwen3ForCausalLM:
    """A new Qwen3-shaped model of about half a million parameters; seed torch before.

    Two layers are enough to copy: one head finds where a name stood before, the next reads what followed it. Weights
    start four times as large as usual, since a small vocabulary of near-orthogonal tokens is copied sooner.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerFast`]): Tokenizer that it will read.
        hidden (`int`, *optional*, defaults to 128): Hidden size.
        layers (`int`, *optional*, defaults to 2): Number of layers.
    """
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        initializer_range=0.08,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)
