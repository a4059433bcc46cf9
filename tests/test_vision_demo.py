"""The world of the vision demo, and the demo itself at the size of a toy."""

import json
import random
import re
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from trl.chat_template_utils import get_training_chat_template

from arpo_trl.viewer.records import read_file

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import vision_demo  # noqa: E402
from vision_world import (  # noqa: E402
    COLOURS,
    EYES,
    GLYPHS,
    MARGIN,
    MISTAKES,
    PLACES,
    SIDE,
    TILE,
    Magnifier,
    Question,
    World,
    build_model,
    build_processor,
    draw,
    system_message,
)

SIZES = {"rl": 4, "held_out": 4}


@pytest.fixture(scope="module")
def world():
    return World(seed=0, sizes={"rl": 50, "held_out": 50})


@pytest.fixture(scope="module")
def processor():
    return build_processor()


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_same_seed_same_world(world):
    same, other = World(0, SIZES), World(1, SIZES)
    assert world.questions("rl")[:4] == same.questions("rl") != other.questions("rl")
    assert next(world.demonstrations("S"))["messages"][1:] == next(same.demonstrations("S"))["messages"][1:]


def test_a_question_has_one_answer(world):
    for question in world.questions("held_out"):
        colours = [colour for colour, _ in question.tiles]
        assert sorted(colours) == sorted(COLOURS) and len(colours) == SIDE**2
        (asked,) = (tile for tile in question.tiles if f" {tile[0]} " in question.text)
        assert question.answer == str(asked[1]) and question.tile(question.place) == asked
    assert len({question.tiles for split in ("rl", "held_out") for question in world.questions(split)}) == 100


def test_no_digit_can_be_read_without_the_tool(processor):
    colours = [*COLOURS]
    seen = []
    for digit in range(10):
        picture = Question(tuple((colour, digit) for colour in colours), 1).picture
        assert picture.size == (SIDE * TILE, SIDE * TILE)
        seen.append(processor.image_processor(images=[picture], return_tensors="pt")["pixel_values"])
    assert seen[0].shape == (1, 3, EYES, EYES)
    assert all(torch.equal(seen[0], other) for other in seen[1:])


def test_every_digit_can_be_read_with_it(processor):
    for colour in COLOURS:
        seen = []
        for digit in range(10):
            question = Question(((colour, digit),) * SIDE**2, 1)
            (block,) = Magnifier(question.picture).zoom("red", 6)
            seen.append(processor.image_processor(images=[block["image"]], return_tensors="pt")["pixel_values"])
        gaps = [(one - other).abs().sum() for index, one in enumerate(seen) for other in seen[:index]]
        assert min(gaps) > 1
    assert len(set(GLYPHS)) == 10


def test_the_tool_enlarges_the_tile_at_its_place(world):
    question = world.questions("rl")[0]
    magnifier = Magnifier()
    magnifier.reset(image=question.picture, answer="7")
    assert [*PLACES] == [*range(1, 10)]
    for place in PLACES:
        (block,) = magnifier.zoom("red", place)
        assert block["type"] == "image" and block["image"].size == question.picture.size
        inner = draw(*question.tile(place))[MARGIN:-MARGIN, MARGIN:-MARGIN]
        assert np.array_equal(pixels(block["image"].resize(inner.shape[:2], Image.Resampling.NEAREST)), inner)
    for place in (0, 10):
        with pytest.raises(ValueError, match=f"There is no tile {place}: the picture has 9"):
            magnifier.zoom("red", place)
    assert magnifier.fork() is not magnifier
    assert magnifier.fork().zoom("red", 5)[0]["image"].tobytes() == magnifier.zoom("red", 5)[0]["image"].tobytes()


def test_half_of_the_demonstrations_look_at_a_wrong_place(world):
    rows = [*islice(world.demonstrations("S"), 2000)]
    kinds = Counter(row["mistake"] for row in rows)
    for kind, share in MISTAKES.items():
        assert abs(kinds[kind] / 2000 - share) < 0.05
    assert 0.45 < kinds[None] / 2000 < 0.55


def places_of(messages: list[dict]) -> list[int]:
    calls = [call["function"] for message in messages for call in message.get("tool_calls", ())]
    return [call["arguments"]["tile"] for call in calls]


@pytest.mark.parametrize("mistake", [None, *MISTAKES])
def test_a_demonstration_says_what_it_sees(world, mistake):
    for question in world.questions("held_out"):
        wrong = question.place % len(PLACES) + 1
        messages = world.trace(question, mistake, wrong)
        places = places_of(messages)
        assert places == {None: [question.place], "believes": [wrong], "looks_again": [wrong, question.place]}[mistake]
        magnifier = Magnifier(question.picture)
        results = [message["content"] for message in messages if message["role"] == "tool"]
        for place, (block,) in zip(places, results, strict=True):
            assert block["image"].tobytes() == magnifier.zoom("red", place)[0]["image"].tobytes()
        colour, digit = question.tile(places[-1])
        assert messages[-1]["content"] == [{"type": "text", "text": f"{colour} {digit}"}]
        if mistake != "believes":
            assert str(digit) == question.answer


def test_lessons_tell_what_is_there(world):
    kinds = Counter()
    for row in islice(world.lessons("S"), 150):
        system, user, assistant = row["messages"][:3]
        assert system == {"role": "system", "content": "S"}
        picture, said = user["content"][0]["image"], assistant["content"][0]["text"]
        asked = user["content"][1]["text"]
        kinds[asked.split()[0], asked.split()[1]] += 1
        if asked == "What is this?":
            colour, digit = said.split()
            inner = draw(colour, int(digit))[MARGIN:-MARGIN, MARGIN:-MARGIN]
            assert np.array_equal(pixels(picture.resize(inner.shape[:2], Image.Resampling.NEAREST)), inner)
            continue
        found = json.loads(said)
        found = found if isinstance(found, list) else [found]
        eyes = pixels(picture.resize((SIDE, SIDE), Image.Resampling.BOX))
        for tile in found:
            assert tuple(eyes[divmod(tile["tile"] - 1, SIDE)]) == COLOURS[tile["label"]]
        if asked == "Where are the tiles?":
            assert {tile["tile"] for tile in found} == {*PLACES}
    assert len(kinds) == 3 and min(kinds.values()) > 30


def test_the_system_message_reads_as_the_tool_does(world, processor):
    """TRL renders no tools for data with images."""
    messages = world.trace(world.questions("rl")[0], "looks_again", 1)
    system = {"role": "system", "content": system_message(processor)}
    settings = {"tokenize": True, "return_dict": True}
    told = processor.apply_chat_template([system, *messages], **settings)["input_ids"]
    given = processor.apply_chat_template(messages, tools=[Magnifier().zoom], **settings)["input_ids"]
    assert told == given and len(told[0]) < 100
    assert "Enlarge one tile of the picture." in system["content"]


def test_loss_falls_on_what_the_assistant_wrote(world, processor):
    messages = world.trace(world.questions("rl")[0], "looks_again", 1)
    made = processor.apply_chat_template(
        [messages],
        chat_template=get_training_chat_template(processor),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        return_tensors="pt",
    )
    written = processor.tokenizer.decode(made["input_ids"][made["assistant_masks"].bool()])
    assert re.findall(r'"tile": \d', written) and "tool_response" not in written and "<|image_pad|>" not in written
    assert written.rstrip().endswith(f"{messages[-1]['content'][0]['text']}<|im_end|>")


def test_the_model_sees_a_token_for_each_tile(world, processor):
    torch.manual_seed(0)
    model = build_model(processor)
    assert sum(parameter.numel() for parameter in model.parameters()) < 500_000
    batch = processor.apply_chat_template(
        [world.trace(world.questions("rl")[0], None, 1)],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert (batch["input_ids"] == processor.image_token_id).sum() == 2 * SIDE**2
    assert model(**batch).logits.shape[-1] == len(processor.tokenizer)


def test_other_text_is_spelt_in_bytes(processor):
    text = "Größe: 7 <b>"
    assert processor.tokenizer.decode(processor.tokenizer.encode(text)) == text


def test_the_demo_from_start_to_end(tmp_path, capsys):
    toy = {
        "num_generations": 4,
        "num_initial_generations": 2,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "per_device_eval_batch_size": 4,
        "max_completion_length": 40,
    }
    summary = vision_demo.main(0, tmp_path, lesson_steps=2, cold_start_steps=2, steps=2, sizes=SIZES, **toy)
    assert json.loads((tmp_path / "summary.json").read_text())["seed"] == summary["seed"] == 0
    assert 0 <= summary["sft_accuracy"] <= 1 and 0 <= summary["arpo_accuracy"] <= 1
    assert {"report.png", "report.html", "summary.json", "cold_start", "arpo"} <= {p.name for p in tmp_path.iterdir()}
    for step in range(2):
        records, _ = read_file(tmp_path / "rollouts" / f"step-{step:06}.jsonl.gz")
        assert len(records) == 8
    assert list((tmp_path / "rollouts" / "images").glob("*.png"))
    assert "Held-out questions, sampled at temperature 1" in capsys.readouterr().out


def test_draws_come_from_the_seed_alone():
    first, second = (World.draw_question(random.Random(5)) for _ in range(2))
    assert first == second
