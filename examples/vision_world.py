"""
The world of the vision demo: pictures that are too coarse to read, and a tool that zooms into them.

A picture is a grid of tiles of different colours, with a digit on each. The model's eyes see 12 × 12 pixels, 4 × 4 of
a tile. A digit is made of chequers, as much lighter as darker than the tile: at that size it vanishes without a trace,
and nothing but `zoom` can tell it.

    Which digit is on the red tile?

Demonstrations speak the model's chat template. They name the colour of the tile that they see, and then its digit.
Half of them zoom at a wrong place: most of these take what they find there for the answer, the others zoom again.

This module does NOT train; `vision_demo.py` joins it to the trainers. What is learnt here is of use for nothing else.
"""

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen3Config,
    SiglipVisionConfig,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from trl.chat_template_utils import qwen3_vl_chat_template

SPLITS = {"rl": 1000, "held_out": 600}
"""Pictures in each split, one question each. Demonstrations are drawn without end."""

COLOURS = {
    "red": (195, 60, 60),
    "green": (60, 195, 60),
    "blue": (60, 60, 195),
    "yellow": (195, 195, 60),
    "purple": (195, 60, 195),
    "cyan": (60, 195, 195),
    "white": (195, 195, 195),
    "grey": (128, 128, 128),
    "black": (60, 60, 60),
}

SIDE = 3
"""Rows and columns of a picture."""

PLACES = range(1, SIDE**2 + 1)
"""Numbers of the tiles, row by row."""

TILE = 32
"""Pixels of the side of a tile in a picture."""

MARGIN = 4
"""Pixels on each side of a tile that the tool leaves out."""

EYES = 12
"""Pixels of the side of what the model sees, be it a picture or a part of one."""

STROKE = 60
"""How much lighter and darker than the shape a digit's chequers are, of 255."""

MISTAKES = {
    "believes": 0.40,  # zooms at a wrong place and takes the digit there for the answer
    "looks_again": 0.10,  # zooms at a wrong place, then at the right one
}
"""What goes wrong in a demonstration, and in which share of them."""

GLYPHS = (
    "111 101 101 101 111",
    "010 110 010 010 111",
    "111 001 111 100 111",
    "111 001 011 001 111",
    "101 101 111 001 001",
    "111 100 111 001 111",
    "100 100 111 101 111",
    "111 001 001 010 010",
    "111 101 111 101 111",
    "111 101 111 001 001",
)
"""The digits from 0 to 9, rows from the top down."""


@dataclass(frozen=True)
class Question:
    """A picture and the tile of it that is asked for.

    Args:
        tiles (`tuple[tuple[str, int], ...]`): Colour and digit of each tile, row by row.
        place (`int`): Number of the tile in question, from 1.
    """

    tiles: tuple[tuple[str, int], ...]
    place: int

    def tile(self, place: int) -> tuple[str, int]:
        return self.tiles[place - 1]

    @property
    def colour(self) -> str:
        return self.tile(self.place)[0]

    @property
    def text(self) -> str:
        return f"Which digit is on the {self.colour} tile?"

    @property
    def answer(self) -> str:
        return str(self.tile(self.place)[1])

    @property
    def picture(self) -> Image.Image:
        rows = [self.tiles[start : start + SIDE] for start in range(0, len(self.tiles), SIDE)]
        return Image.fromarray(np.concatenate([np.concatenate([draw(*tile) for tile in row], axis=1) for row in rows]))


@cache
def draw(colour: str, digit: int) -> np.ndarray:
    """The pixels of a tile, of shape `(TILE, TILE, 3)`."""
    pixels = np.full((TILE, TILE, 3), COLOURS[colour])
    # A unit of a glyph is 4 pixels wide: two lighter chequers and two darker ones, which even out where the eyes see a
    # square of 8 pixels as one
    glyph = np.array([[int(unit) for unit in row] for row in GLYPHS[digit].split()])
    strokes = np.kron(glyph, np.kron([[STROKE, -STROKE], [-STROKE, STROKE]], np.ones((2, 2), int)))
    top, left = 8, 12  # multiples of a unit, so that such a square holds as many chequers of either kind
    pixels[top : top + strokes.shape[0], left : left + strokes.shape[1]] += strokes[..., None]
    return pixels.astype(np.uint8)


class Magnifier:
    """What a row looks through: the environment of one question."""

    def __init__(self, picture: Image.Image | None = None):
        self._picture = picture

    def reset(self, image: Image.Image, **kwargs) -> None:
        self._picture = image

    def fork(self) -> "Magnifier":
        return Magnifier(self._picture)  # which nobody changes

    def zoom(self, label: str, tile: int) -> list:
        """
        Enlarge one tile of the picture.

        Args:
            label: Colour of the tile to look at.
            tile: Number of the tile, from 1 at the top left to 9 at the bottom right.

        Returns:
            The tile as a picture of its own.
        """
        if tile not in PLACES:
            raise ValueError(f"There is no tile {tile}: the picture has {len(PLACES)}.")
        row, column = divmod(tile - 1, SIDE)
        left, top = column * TILE, row * TILE
        part = self._picture.crop((left + MARGIN, top + MARGIN, left + TILE - MARGIN, top + TILE - MARGIN))
        return [{"type": "image", "image": part.resize(self._picture.size, Image.Resampling.NEAREST)}]


class World:
    """Questions about pictures, and demonstrations. The same seed gives the same world.

    Args:
        seed (`int`, *optional*, defaults to `0`): Seed of all of them.
        sizes (`Mapping[str, int]`, *optional*): Questions in each split.
    """

    mistakes = MISTAKES

    def __init__(self, seed: int = 0, sizes: Mapping[str, int] = SPLITS):
        self.seed = seed
        self.sizes = sizes

    @staticmethod
    def draw_question(rng: random.Random) -> Question:
        colours = rng.sample([*COLOURS], SIDE**2)
        tiles = tuple((colour, rng.randint(0, 9)) for colour in colours)
        return Question(tiles, rng.choice(PLACES))

    @cached_property
    def _splits(self) -> dict[str, list[Question]]:
        rngs = {split: random.Random(f"{split} {self.seed}") for split in self.sizes}
        return {split: [self.draw_question(rngs[split]) for _ in range(size)] for split, size in self.sizes.items()}

    def questions(self, split: str) -> list[Question]:
        """The questions of a split: `"rl"` or `"held_out"`."""
        return self._splits[split]

    def rows(self, split: str) -> list[dict]:
        """The questions of a split as rows for a trainer: `prompt` (messages), `image`, `answer` and `place`."""
        return [
            {
                "prompt": [{"role": "user", "content": question.text}],
                "image": question.picture,
                "answer": question.answer,
                "place": question.place,
            }
            for question in self.questions(split)
        ]

    def lessons(self, system: str) -> Iterator[dict]:
        """
        Lessons in seeing without end: where the tiles of a picture are, and what a tile is.

        Args:
            system (`str`): System message, which tells of the tool.

        Yields:
            `dict`: A row with `messages`, which hold the images, and `images`, which is empty.
        """
        rng = random.Random(f"lessons {self.seed}")
        while True:
            question = self.draw_question(rng)
            places = rng.sample(PLACES, len(PLACES))
            found = [arguments(question.tile(place)[0], place) for place in places]
            magnifier = Magnifier(question.picture)
            messages: list[dict] = []
            match rng.choice(("where all", "where", "what")):
                case "where all":
                    messages += ask("Where are the tiles?", question.picture) + answer(json.dumps(found))
                case "where":
                    for one in found[:3]:
                        text = f"Where is the {one['label']} tile?"
                        messages += ask(text, None if messages else question.picture) + answer(json.dumps(one))
                case "what":
                    for one in found[:3]:
                        colour, digit = question.tile(one["tile"])
                        (block,) = magnifier.zoom(**one)
                        messages += ask("What is this?", block["image"]) + answer(f"{colour} {digit}")
            yield {"messages": [{"role": "system", "content": system}, *messages], "images": []}

    def demonstrations(self, system: str) -> Iterator[dict]:
        """
        Demonstrations without end, mistakes included.

        Args:
            system (`str`): System message, which tells of the tool.

        Yields:
            `dict`: A row with `messages`, which hold the images, `images`, which is empty, and `mistake`, a key of
            `mistakes` or `None`.
        """
        rng = random.Random(f"demonstrations {self.seed}")
        kinds = [None, *self.mistakes]
        weights = [1 - sum(self.mistakes.values()), *self.mistakes.values()]
        while True:
            question, mistake = self.draw_question(rng), rng.choices(kinds, weights)[0]
            wrong = rng.choice([place for place in PLACES if place != question.place])
            messages = [{"role": "system", "content": system}, *self.trace(question, mistake, wrong)]
            yield {"messages": messages, "images": [], "mistake": mistake}

    def trace(self, question: Question, mistake: str | None, wrong: int) -> list[dict]:
        """
        The messages of a demonstration.

        Args:
            question ([`Question`]): The question.
            mistake (`str`, *optional*): What goes wrong, a key of `MISTAKES`.
            wrong (`int`): Where a mistake zooms.
        """
        picture = question.picture
        magnifier = Magnifier(picture)
        places = {None: [question.place], "believes": [wrong], "looks_again": [wrong, question.place]}[mistake]
        messages = ask(question.text, picture)
        seen: list[dict] = []
        for place in places:
            asked = arguments(question.colour, place)
            tool_call = {"type": "function", "function": {"name": "zoom", "arguments": asked}}
            messages += [
                {"role": "assistant", "content": seen, "tool_calls": [tool_call]},
                {"role": "tool", "name": "zoom", "content": magnifier.zoom(**asked)},
            ]
            colour, digit = question.tile(place)
            seen = [{"type": "text", "text": colour}]
        return messages + answer(f"{colour} {digit}")


def ask(text: str, picture: Image.Image | None = None) -> list[dict]:
    blocks = [] if picture is None else [{"type": "image", "image": picture}]
    return [{"role": "user", "content": [*blocks, {"type": "text", "text": text}]}]


def answer(text: str) -> list[dict]:
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]


def arguments(colour: str, place: int) -> dict:
    return {"label": colour, "tile": place}


def build_processor() -> LlavaProcessor:
    """
    A processor with Qwen3-VL's chat template, in which every phrase of the world is one token, the system message that
    tells of the tool among them. Any other text is spelt in bytes. An image has a token for each 4 × 4 pixels that the
    eyes see, and these are means of the pixels of the image.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, merges=[]))
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    base.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=base,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        extra_special_tokens={"image_token": "<|image_pad|>", "im_start_token": "<|im_start|>"},
        chat_template=qwen3_vl_chat_template,
        clean_up_tokenization_spaces=False,
    )
    where = json.dumps(arguments("0", 0)).split("0")
    tokenizer.add_tokens(
        [
            *("system\n", "user\n", "assistant\n"),
            *(where[0], *(colour + where[1] for colour in COLOURS), "}, "),
            *("<tool_call>", '\n{"name": "zoom", "arguments": ', "}\n", "</tool_call>"),
            *("<tool_response>\n", "\n</tool_response>", "<|vision_start|>", "<|vision_end|>"),
            *("Which digit is on the ", *COLOURS, " tile?"),
            *("Where are the tiles?", "Where is the ", "What is this?"),
        ]
    )
    images = SiglipImageProcessorPil(size={"height": EYES, "width": EYES}, resample=Image.Resampling.BOX)
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=EYES // SIDE,
        vision_feature_select_strategy="full",
        chat_template=tokenizer.chat_template,
    )
    tokenizer.add_tokens([system_message(processor)])
    return processor


def system_message(processor: LlavaProcessor) -> str:
    """What the chat template tells the model of `zoom`."""
    hello = [{"role": "user", "content": "?"}]
    rendered = processor.apply_chat_template(hello, tools=[Magnifier().zoom], tokenize=False)
    return rendered.removeprefix("<|im_start|>system\n").split("<|im_end|>")[0]


def build_model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """
    A new LLaVA-shaped model of some hundred thousand parameters, SigLIP's eyes and Qwen3's mind; seed torch before.

    Args:
        processor ([`~transformers.LlavaProcessor`]): What it will read through.
    """
    tokenizer = processor.tokenizer
    text = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.08,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    eyes = SiglipVisionConfig(
        image_size=EYES,
        patch_size=EYES // SIDE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        vision_use_head=False,
    )
    config = LlavaConfig(
        text_config=text,
        vision_config=eyes,
        image_token_index=processor.image_token_id,
        image_seq_length=SIDE**2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    # Where a patch is begins as loud as what is on it, so that places are learnt sooner
    torch.nn.init.normal_(model.model.vision_tower.embeddings.position_embedding.weight, std=0.7)
    return model
