"""The world of the vision demo: pictures that are too coarse to read, and a tool that zooms into them.

A picture is a grid of coloured shapes, no two alike, with a digit on each. The model's eyes see 12 × 12 pixels, so that
a shape has 4 × 4. Digits are chequered strokes, as much lighter as darker than what lies below: at that size they vanish
without a trace, so that nothing but `zoom` can tell them.

    Which digit is on the red circle?

Demonstrations speak the model's chat template, and about half of them zoom at a wrong place. Most of these then take the
digit that they find there for the answer; the others notice what they see and zoom again.

This module does NOT train; `vision_demo.py` joins it to the trainers. The model can read nothing but these pictures.
"""

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ProcessorMixin, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers import Qwen3VLProcessor as Qwen3VLVideoProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
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
}
SHAPES = ("square", "circle", "triangle")
GROUND = (128, 128, 128)

SIDE = 3
"""Rows and columns of a picture."""

CELL = 32
"""Pixels of the side of a cell in a picture."""

MARGIN = 4
"""Pixels on each side of a cell that the tool leaves out."""

EYES = 12
"""Pixels of the side of what the model sees, be it a picture or a part of one."""

STROKE = 60
"""How much lighter and darker than the shape a digit's chequers are, of 255."""

MISTAKES = {
    "believes": 0.45,  # zooms at a wrong place and takes the digit there for the answer
    "looks_again": 0.15,  # zooms at a wrong place, sees that it is wrong, and zooms at the right one
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
class Cell:
    """A shape with a digit on it. The digit stands `shift` units right and down of its first place."""

    colour: str
    shape: str
    digit: int
    shift: tuple[int, int]

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Question:
    """A picture and the cell of it that is asked for.

    Args:
        cells (`tuple[Cell, ...]`): Of the whole picture, row by row.
        place (`tuple[int, int]`): Row and column of the cell in question, from 1.
    """

    cells: tuple[Cell, ...]
    place: tuple[int, int]

    def at(self, place: tuple[int, int]) -> Cell:
        return self.cells[(place[0] - 1) * SIDE + place[1] - 1]

    @property
    def text(self) -> str:
        return f"Which digit is on the {self.at(self.place).name}?"

    @property
    def answer(self) -> str:
        return str(self.at(self.place).digit)

    @property
    def picture(self) -> Image.Image:
        rows = [self.cells[start : start + SIDE] for start in range(0, len(self.cells), SIDE)]
        return Image.fromarray(np.concatenate([np.concatenate([*map(draw, row)], axis=1) for row in rows]))


@cache
def draw(cell: Cell) -> np.ndarray:
    """The pixels of a cell, of shape `(CELL, CELL, 3)`."""
    down, right = np.indices((CELL, CELL)) + 0.5 - CELL / 2
    radius = CELL / 2 - 2
    inside = {
        "square": np.maximum(abs(down), abs(right)) < radius,
        "circle": down**2 + right**2 < radius**2,
        "triangle": (abs(right) < (down + radius) / 2) & (down < radius),
    }[cell.shape]
    pixels = np.where(inside[..., None], COLOURS[cell.colour], GROUND)
    # A unit of a glyph is 4 pixels wide: two lighter chequers and two darker ones, which even out where the eyes see a
    # square of 8 pixels as one
    glyph = np.array([[int(unit) for unit in row] for row in GLYPHS[cell.digit].split()])
    strokes = np.kron(glyph, np.kron([[STROKE, -STROKE], [-STROKE, STROKE]], np.ones((2, 2), int)))
    top, left = (MARGIN + 4 * units for units in cell.shift)
    pixels[top : top + strokes.shape[0], left : left + strokes.shape[1]] += strokes[..., None]
    return pixels.astype(np.uint8)


class Magnifier:
    """What a row looks through: the environment of one question."""

    def reset(self, image: Image.Image, **kwargs) -> None:
        self._picture = image

    def fork(self) -> "Magnifier":
        copied = Magnifier()
        copied._picture = self._picture  # which nobody changes
        return copied

    def zoom(self, row: int, column: int) -> list:
        """
        Enlarge one cell of the picture.

        Args:
            row: Row of the cell, from 1 at the top.
            column: Column of the cell, from 1 at the left.

        Returns:
            The cell as a picture of its own.
        """
        for name, value in (("row", row), ("column", column)):
            if value not in range(1, SIDE + 1):
                raise ValueError(f"There is no {name} {value}: the picture has {SIDE}.")
        left, top = (column - 1) * CELL, (row - 1) * CELL
        cell = self._picture.crop((left + MARGIN, top + MARGIN, left + CELL - MARGIN, top + CELL - MARGIN))
        return [{"type": "image", "image": cell.resize(self._picture.size, Image.Resampling.NEAREST)}]


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
        names = rng.sample([(colour, shape) for colour in COLOURS for shape in SHAPES], SIDE**2)
        shifts = [(rng.randint(0, 1), rng.randint(0, 3)) for _ in names]
        cells = tuple(Cell(*name, rng.randint(0, 9), shift) for name, shift in zip(names, shifts, strict=True))
        return Question(cells, draw_place(rng))

    @cached_property
    def _splits(self) -> dict[str, list[Question]]:
        rngs = {split: random.Random(f"{split} {self.seed}") for split in self.sizes}
        return {split: [self.draw_question(rngs[split]) for _ in range(size)] for split, size in self.sizes.items()}

    def questions(self, split: str) -> list[Question]:
        """The questions of a split: `"rl"` or `"held_out"`."""
        return self._splits[split]

    def rows(self, split: str) -> list[dict]:
        """The questions of a split as rows for a trainer: `prompt` (messages), `image`, `answer` (`str`) and `place`."""
        return [
            {
                "prompt": [{"role": "user", "content": question.text}],
                "image": question.picture,
                "answer": question.answer,
                "place": dict(zip(("row", "column"), question.place, strict=True)),
            }
            for question in self.questions(split)
        ]

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
            wrong = question.place
            while wrong == question.place:
                wrong = draw_place(rng)
            messages = [{"role": "system", "content": system}, *self.trace(question, mistake, wrong)]
            yield {"messages": messages, "images": [], "mistake": mistake}

    def trace(self, question: Question, mistake: str | None, wrong: tuple[int, int]) -> list[dict]:
        """
        The messages of a demonstration.

        Args:
            question ([`Question`]): The question.
            mistake (`str`, *optional*): What goes wrong, a key of `MISTAKES`.
            wrong (`tuple[int, int]`): Row and column of where a mistake zooms.
        """
        picture = question.picture
        magnifier = Magnifier()
        magnifier.reset(picture)
        places = {None: [question.place], "believes": [wrong], "looks_again": [wrong, question.place]}[mistake]
        ask = [{"type": "image", "image": picture}, {"type": "text", "text": question.text}]
        messages: list[dict] = [{"role": "user", "content": ask}]
        for row, column in places:
            call = {"name": "zoom", "arguments": {"row": row, "column": column}}
            messages += [
                {"role": "assistant", "content": [], "tool_calls": [{"type": "function", "function": call}]},
                {"role": "tool", "name": "zoom", "content": magnifier.zoom(row, column)},
            ]
        digit = str(question.at(places[-1]).digit)
        return [*messages, {"role": "assistant", "content": [{"type": "text", "text": digit}]}]


def draw_place(rng: random.Random) -> tuple[int, int]:
    return rng.randint(1, SIDE), rng.randint(1, SIDE)


class Qwen3VLProcessor(Qwen3VLVideoProcessor):
    """Qwen3-VL's processor of text and images. The part for videos, which it leaves out, alone needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        names = ("image_token", "video_token", "vision_start_token", "vision_end_token")
        for name in names:
            setattr(self, name, getattr(tokenizer, name))
            setattr(self, f"{name}_id", tokenizer.convert_tokens_to_ids(getattr(tokenizer, name)))
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def build_processor() -> Qwen3VLProcessor:
    """
    A processor with Qwen3-VL's chat template, in which every phrase of the world is one token, the system message that
    tells of the tool among them. Any other text is spelt in bytes. An image has a token for each 4 × 4 pixels that the
    eyes see, and these are means of the pixels of the image.
    """
    special = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
    }
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    base.decoder = decoders.ByteLevel()
    call = json.dumps({"name": "zoom", "arguments": {"row": 0, "column": 0}}).split("0")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=base,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        extra_special_tokens={**special, "im_start_token": "<|im_start|>"},
        chat_template=qwen3_vl_chat_template,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens(
        [
            *("system\n", "user\n", "assistant\n"),
            *("<tool_call>", "\n" + call[0], call[1], call[2] + "\n", "</tool_call>"),
            *("<tool_response>\n", "\n</tool_response>"),
            *("Which digit is on the ", "?", *(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)),
        ]
    )
    images = Qwen2VLImageProcessorPil(
        patch_size=EYES // SIDE,
        merge_size=1,
        min_pixels=EYES**2,
        max_pixels=EYES**2,
        resample=Image.Resampling.BOX,
    )
    processor = Qwen3VLProcessor(images, tokenizer, chat_template=tokenizer.chat_template)
    tokenizer.add_tokens([system_message(processor)])
    return processor


def system_message(processor: Qwen3VLProcessor) -> str:
    """What the chat template tells the model of `zoom`."""
    hello = [{"role": "user", "content": "?"}]
    rendered = processor.apply_chat_template(hello, tools=[Magnifier().zoom], tokenize=False)
    return rendered.removeprefix("<|im_start|>system\n").split("<|im_end|>")[0]


def build_model(processor: Qwen3VLProcessor) -> Qwen3VLForConditionalGeneration:
    """
    A new Qwen3-VL-shaped model of about half a million parameters; seed torch before.

    Args:
        processor ([`Qwen3VLProcessor`]): What it will read through.
    """
    tokenizer = processor.tokenizer
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_interleaved": True,
            "mrope_section": [8, 4, 4],
        },
        "initializer_range": 0.05,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": 64,
        "depth": 2,
        "num_heads": 4,
        "intermediate_size": 128,
        "out_hidden_size": 128,
        "patch_size": EYES // SIDE,
        "spatial_merge_size": 1,
        "num_position_embeddings": SIDE**2,
        "deepstack_visual_indexes": [],
        "initializer_range": 0.05,
    }
    ids = {
        f"{name}_id": getattr(processor, f"{name}_id")
        for name in ("image_token", "video_token", "vision_start_token", "vision_end_token")
    }
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    return Qwen3VLForConditionalGeneration(config)
