"""Images in prompts and in what tools return, with forks and without; GRPO stays the special case."""

import base64
import gzip
import importlib.resources
import io
import itertools
import json
import logging
import re

import multimodal
import numpy as np
import pytest
import torch
import trl_suite
from datasets import Dataset
from multimodal import PICTURE, PROMPT, photo, records, trainer_of, weather
from PIL import Image
from transformers import ProcessorMixin
from trl import GRPOConfig, GRPOTrainer

from arpo_trl.evaluation import Agent, evaluate
from arpo_trl.execution.images import image_saver, images_of
from arpo_trl.protocols.chat_template import ChatTemplateProtocol
from arpo_trl.protocols.images import ImageReader
from arpo_trl.protocols.suffix import suffix_renderer
from arpo_trl.scoring.images import tiles_by_row, with_images
from arpo_trl.tools import ToolCall, ToolExecutor, tool
from arpo_trl.viewer import render

FAMILIES = ("Qwen3-VL", "Qwen3.5, no thinking", "Gemma 4")
UNUSED = "`generate` is given `token_type_ids`, which it refuses"
TRL_FAILS = {
    ("Gemma 4", "tool"): UNUSED,
    ("LFM2-VL", "prompt"): "`KeyError: 'num_tiles'`",
    ("LFM2-VL", "tool"): UNUSED,
}
"""Family, and where images are → how TRL's trainer with tools fails, where it takes the chat template."""
EQUAL = [(family, place) for family in FAMILIES for place in ("prompt", "tool", "both")]
EQUAL = [pair for pair in EQUAL if pair[0] != "Gemma 4" or pair[1] == "prompt"]
ROWS = [{"prompt": PROMPT}] * 4
WITH_PICTURES = [{"prompt": PROMPT, "image": PICTURE}] * 4
PLACES = {"prompt": (WITH_PICTURES, weather), "tool": (ROWS, photo), "both": (WITH_PICTURES, photo)}
"""Where images are → rows of the data, and the tool."""


def skip_without_torchvision(family) -> None:
    if family == "LFM2-VL" and not trl_suite.has_torchvision():
        pytest.skip("its image processor needs torchvision")


@pytest.mark.parametrize("family, place", EQUAL)
def test_grpo_is_the_special_case(family, place, tmp_path):
    rows, tool = PLACES[place]
    shared = {"rows": rows, "tools": [tool], "max_steps": 2, "max_completion_length": 300}
    shared |= {"per_device_train_batch_size": 2, "steps_per_generation": 2}  # rows are shuffled and dealt out
    ours = {"num_initial_generations": 4, "prefix_sharing": False}
    arpo = trainer_of(family, tmp_path / "arpo", **shared, **ours)
    arpo.train()
    assert {len(row.images) for group in arpo._groups for row in group.trajectories} == {2 if place == "both" else 1}
    grpo = trainer_of(family, tmp_path / "grpo", trainer=GRPOTrainer, config=GRPOConfig, **shared)
    grpo.train()
    for stock, own in zip(grpo.state.log_history, arpo.state.log_history, strict=True):
        same = {name for name in stock if not re.search("time|per_second", name)}
        assert {name: own[name] for name in same} == {name: stock[name] for name in same}
    assert grpo.state.log_history[0]["tools/call_frequency"] == 1
    for left, right in zip(arpo.model.parameters(), grpo.model.parameters(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("family, place", TRL_FAILS)
def test_where_trl_fails(family, place, tmp_path):
    """What `docs/models.md` says of it; ours is held by the tests below."""
    skip_without_torchvision(family)
    rows, tool = PLACES[place]
    settings = {"rows": rows, "tools": [tool], "max_completion_length": 300}
    grpo = trainer_of(family, tmp_path, trainer=GRPOTrainer, config=GRPOConfig, **settings)
    with pytest.raises((ValueError, KeyError), match="token_type_ids|num_tiles"):
        grpo.train()


OTHER = Image.new("RGB", (96, 64), "blue")
ONE_OR_TWO = [{"prompt": PROMPT, "images": [PICTURE, OTHER][:count]} for count in (1, 2, 2, 1)]
NONE_OR_TWO = [{"prompt": PROMPT, "images": [PICTURE, OTHER][:count]} for count in (0, 2, 2, 0)]


@pytest.mark.parametrize("family", multimodal.IMAGE_MODELS)
def test_grpo_is_the_special_case_where_there_are_no_tools(family, tmp_path):
    skip_without_torchvision(family)
    shared = {"rows": ONE_OR_TWO, "tools": (), "max_steps": 2, "max_completion_length": 20, "num_generations": 2}
    shared |= {"per_device_train_batch_size": 2, "steps_per_generation": 2}
    arpo = trainer_of(family, tmp_path / "arpo", **shared, num_initial_generations=2, prefix_sharing=False)
    arpo.train()
    grpo = trainer_of(family, tmp_path / "grpo", trainer=GRPOTrainer, config=GRPOConfig, **shared)
    grpo.train()
    assert sorted(len(row.images) for group in arpo._groups for row in group.trajectories) == [1, 1, 2, 2]
    for stock, own in zip(grpo.state.log_history, arpo.state.log_history, strict=True):
        same = {name for name in stock if not re.search("time|per_second", name)}
        assert {name: own[name] for name in same} == {name: stock[name] for name in same}
    for left, right in zip(arpo.model.parameters(), grpo.model.parameters(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("family", ["Qwen3-VL", "Gemma 3", "Idefics3"])
def test_without_tools_a_micro_batch_may_hold_no_image_while_others_do(family, tmp_path):
    settings = {"tools": (), "max_completion_length": 20, "num_generations": 2, "num_initial_generations": 2}
    settings |= {"per_device_train_batch_size": 1, "steps_per_generation": 4, "learning_rate": 0.0}
    trainer = trainer_of(family, tmp_path, rows=NONE_OR_TWO, **settings)
    trainer.train()  # as many images as rows
    assert sorted(len(row.images) for group in trainer._groups for row in group.trajectories) == [0, 0, 2, 2]
    check_scores(trainer)


def sometimes_a_photo():
    """A tool that returns a photo with every third call, the first one included, and else text alone."""
    number = itertools.count()

    def weather(city: str) -> list:
        """
        Weather.

        Args:
            city: Where.
        """
        return photo(city)[next(number) % 3 > 0 :]

    return weather


def check_images_of_rows(rows, reader) -> None:
    """Each row has the images of its prompt and of its own results, and its tokens stand for these."""
    for row in rows:
        shown = [image for own in row.calls for image in images_of(own.call.result)]
        assert row.images[len(row.images) - len(shown) :] == shown
        wanted = sum(sum(reader.types(reader.ids(image))) for image in row.images)
        assert sum(reader.types(row.prompt_ids + row.completion_ids)) == wanted
        if row.parent is not None:
            parent = next(other for other in rows if other.row == row.parent)
            before = sum(place.tokens < row.fork_token for place in row.starts)
            shared = [image for own in row.calls if own.shared for image in images_of(own.call.result)]
            kept = len(row.images) - len(shown) + len(shared)
            assert before and row.images[:kept] == parent.images[:kept]


# Other templates know no tools
FORKED = [(family, protocol) for family in (*FAMILIES, "LFM2-VL") for protocol in ("chat_template", "tags")]
FORKED += [(family, "tags") for family in multimodal.IMAGE_MODELS if family != "LFM2-VL"]


@pytest.mark.parametrize("family, protocol", FORKED)
def test_a_fork_shares_the_images_up_to_its_fork_token_and_each_row_is_scored_with_its_own(family, protocol, tmp_path):
    skip_without_torchvision(family)
    trainer = trainer_of(
        family,
        tmp_path,
        rows=ROWS if protocol == "chat_template" else WITH_PICTURES,
        tools=[sometimes_a_photo()],
        questions=2,
        tool_protocol=protocol,
        num_generations=6,
        per_device_train_batch_size=1,
        steps_per_generation=6,  # a row a micro-batch, some without an image of a tool
        max_completion_length=600,
        learning_rate=0.0,
    )
    trainer.train()
    rows = [row for group in trainer._groups for row in group.trajectories]
    check_images_of_rows(rows, trainer._image_reader)
    assert len({len(row.images) for row in rows}) > 1
    assert sum(row.kind == "fork" for row in rows) == 4
    check_scores(trainer)


def check_scores(trainer, model=None) -> None:
    """
    Micro-batches of one row hold its images, and score it as the model (that of before training, if it has changed)
    does with it and its images alone.
    """
    rows = [row for group in trainer._groups for row in group.trajectories]
    for batch in trainer._buffered_inputs:  # shuffled
        ids = batch["completion_ids"][0][batch["completion_mask"][0].bool()].tolist()
        row = next(row for row in rows if row.completion_ids == ids and has_images_of(batch, row, trainer))
        tokens = row.prompt_ids + row.completion_ids
        fields = trainer._image_reader.fields([tokens], [row.images])
        fields = {name: torch.tensor(x) if isinstance(x, list) else x for name, x in fields.items()}
        with torch.no_grad():
            logits = (model or trainer.model)(input_ids=torch.tensor([tokens]), **fields).logits[0]
        alone = logits.log_softmax(-1)[torch.arange(len(tokens) - 1), tokens[1:]][len(row.prompt_ids) - 1 :]
        old = batch["old_per_token_logps"][0, : len(row.completion_ids)]
        torch.testing.assert_close(old, alone, rtol=0, atol=1e-4)


def has_images_of(batch, row, trainer) -> bool:
    """Whether a batch of one row holds the images of that row and no others."""
    pixels, reader = batch["pixel_values"], trainer._image_reader
    own = reader.fields([[]], [row.images]).get("pixel_values")
    if reader.by_row:  # filled up to the row with the most tiles
        tiles = 0 if own is None else own.size(1)
        return not pixels[:, tiles:].any() and (own is None or torch.equal(pixels[:, :tiles], own))
    if batch["num_images"] != [len(row.images)]:
        return False
    return len(pixels) == 0 if own is None else torch.equal(pixels, own)


@pytest.mark.parametrize("together", (False, True))
@pytest.mark.parametrize("family", [*FAMILIES, "SmolVLM", "LFM2-VL"])
def test_a_batch_may_hold_prompts_with_images_and_without(family, together, tmp_path):
    skip_without_torchvision(family)
    questions = [{"role": "user", "content": "What is the weather there?"}]
    trainer = trainer_of(
        family,
        tmp_path,
        rows=[{"prompt": PROMPT, "image": PICTURE}, {"prompt": questions, "image": None}] * 2,
        per_device_train_batch_size=4,
        steps_per_generation=2,
        keep_groups_together=together,
        max_completion_length=300,
        tool_protocol="tags" if family == "SmolVLM" else "chat_template",
    )
    trainer.train()
    rows = [row for group in trainer._groups for row in group.trajectories]
    assert sorted(len(row.images) for row in rows) == [0] * 4 + [1] * 4
    check_images_of_rows(rows, trainer._image_reader)
    for batch in trainer._buffered_inputs:
        counts = batch.get("num_images") or [int(own.any()) for own in batch["pixel_values"]]
        for ids, count in zip(batch["prompt_ids"], counts, strict=True):
            assert count == (1 if sum(trainer._image_reader.types(ids.tolist())) else 0)


def test_an_evaluation_reads_images_too(tmp_path):
    trainer = trainer_of("Qwen3-VL", tmp_path, rows=WITH_PICTURES, tools=[photo], per_device_eval_batch_size=4)
    metrics = trainer.evaluate(Dataset.from_list(WITH_PICTURES))
    rows = [row for group in trainer._groups for row in group.trajectories]
    assert metrics["eval_arpo/initial"] == 4 and all(len(row.images) == 2 for row in rows)


class Camera:
    """An environment whose tool takes a photo, and that counts them."""

    def __init__(self):
        self.taken = 0

    def reset(self, **kwargs) -> None:
        self.taken = 0

    def weather(self, city: str) -> list:
        """
        Weather.

        Args:
            city: Where.
        """
        self.taken += 1
        return photo(city)


def test_a_stateful_environment_may_return_images(tmp_path):
    trainer = trainer_of("Qwen3-VL", tmp_path, tools=[], environment_factory=Camera, questions=2)
    trainer.train()
    rows = [row for group in trainer._groups for row in group.trajectories]
    check_images_of_rows(rows, trainer._image_reader)
    assert [len(row.images) for row in rows] == [2] * 4 and [row.kind for row in rows][2:] == ["fork"] * 2


def test_a_row_that_is_out_of_the_loss_keeps_its_images_in_place():
    mask = torch.tensor([[0, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0, 0]])
    of_image = torch.tensor([[0, 1, 0, 0, 1, 0, 0], [0, 0, 0, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0]]).bool()
    kept = with_images(mask, of_image, logits_to_keep=4)
    assert kept.tolist() == [[0, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0, 0]]
    assert with_images(mask[1:], of_image[1:], 4) is not None and torch.equal(
        with_images(mask[1:], of_image[1:], 4), mask[1:]
    )


@pytest.mark.parametrize("length", [12, 120])  # shorter and longer than an image
@pytest.mark.parametrize("family", [*FAMILIES, *multimodal.IMAGE_MODELS])
def test_a_row_that_is_read_for_another_process_changes_no_other(family, length, tmp_path, monkeypatch):
    skip_without_torchvision(family)
    trainer = trainer_of(family, tmp_path, tool_protocol="tags")
    trainer.model.eval()
    ids = torch.arange(100, 100 + 3 * length).view(3, length) % 250
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    alone = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 5, 2, True)
    reader, seen = trainer._image_reader, []
    monkeypatch.setattr(trainer, "_image_guest", lambda shown: (reader.ids(OTHER), OTHER))
    trainer.model.register_forward_pre_hook(lambda *call: seen.append(call[2]), with_kwargs=True)
    beside = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 5, 2, True)
    assert [len(call["input_ids"]) for call in seen] == [3, 2] and all("pixel_values" in call for call in seen)
    for left, right in zip(alone[:2], beside[:2], strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-5)


def test_tiles_are_dealt_to_the_rows_whose_tokens_stand_for_them():
    of_image = torch.tensor([[0, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]]).bool()  # two tokens a tile
    pixels = torch.arange(1.0, 4.0).view(1, 3, 1, 1, 1)
    made = tiles_by_row({"pixel_values": pixels, "pixel_attention_mask": pixels[:, :, 0], "other": 1}, of_image)
    assert made["pixel_values"].flatten(1).tolist() == [[1, 2], [0, 0], [3, 0]]
    assert made["pixel_attention_mask"].shape == (3, 2, 1, 1) and set(made) == {"pixel_values", "pixel_attention_mask"}
    assert tiles_by_row(made, of_image) == {}, "there is one entry a row already"


def test_a_template_of_ones_own_shows_tiles_that_tools_return():
    _, processor = multimodal.build("Idefics3")
    template = (importlib.resources.files("trl") / "chat_templates" / "lfm2_2_5_vl.jinja").read_text()
    protocol = ChatTemplateProtocol(processor.tokenizer, ["weather"], suffix_renderer(processor, template))
    protocol.image_reader = ImageReader(processor, template)
    (call,) = [ToolCall("weather", {}, result=photo("a"))]
    assert protocol.shows_images() and protocol.images([call])[0].size == (96, 64)
    ids = protocol.result_ids([call])
    assert sum(protocol.image_reader.types(ids)) == 4 * 7, "of two rows of three tiles, and the whole"


@pytest.mark.parametrize("family", FAMILIES)
def test_an_engine_that_expands_images_itself_is_given_what_the_template_writes(family):
    _, processor = multimodal.build(family)
    reader = ImageReader(processor)
    texts = [processor.tokenizer.encode(text, add_special_tokens=False) for text in ("see ", " and ", "!")]
    other = Image.new("RGB", (96, 64))
    row = [*texts[0], *reader.ids(PICTURE), *texts[1], *reader.ids(other), *texts[2]]
    mark = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "image"}]}], tokenize=False
    )
    mark = mark.split("see")[1].split("<|im_end|>")[0].split("<turn|>")[0].strip()
    marks = processor.tokenizer.encode(mark, add_special_tokens=False)
    assert reader.unexpanded(row, [PICTURE, other]) == [*texts[0], *marks, *texts[1], *marks, *texts[2]]
    assert reader.unexpanded(row, []) == row and reader.unexpanded(texts[0], [PICTURE]) == texts[0]


@pytest.mark.parametrize("family", [*FAMILIES, *multimodal.IMAGE_MODELS])
def test_tokens_are_of_an_image_where_the_processor_says_so(family):
    skip_without_torchvision(family)
    model, processor = multimodal.build(family)
    reader = ImageReader(processor)
    ids = processor.tokenizer.encode("see", add_special_tokens=False) + reader.ids(PICTURE)
    assert reader.image_tokens == {model.config.image_token_id}
    (wanted,) = ProcessorMixin.create_mm_token_type_ids(processor, [ids])
    assert reader.types(ids) == wanted and sum(wanted) > 1
    if reader.type_name is not None:
        assert reader.fields([ids], [[PICTURE]])[reader.type_name] == [wanted]


# A model that would write the token of an image


def prefers_the_tokens_of_images(family) -> list[int]:
    _, processor = multimodal.build(family)
    return sorted(ImageReader(processor).never_sampled)


PREFERRING = [("Qwen3-VL", "chat_template"), ("Gemma 4", "chat_template"), ("Gemma 3", "tags"), ("SmolVLM", "tags")]
OTHERS_SUPPRESSED = [None, {"suppress_tokens": [5]}]


@pytest.mark.parametrize("own", OTHERS_SUPPRESSED)
@pytest.mark.parametrize("family, protocol", PREFERRING)
def test_a_model_that_would_write_the_token_of_an_image_trains(family, protocol, own, tmp_path):
    trainer = trainer_of(
        family,
        tmp_path,
        prefers=prefers_the_tokens_of_images(family),
        tools=[photo],
        tool_protocol=protocol,
        generation_kwargs=own,
        per_device_train_batch_size=1,
        steps_per_generation=4,
        max_completion_length=300,
        learning_rate=0.0,
    )
    trainer.train()
    rows = [row for group in trainer._groups for row in group.trajectories]
    check_images_of_rows(rows, trainer._image_reader)
    assert all(len(row.images) == 1 for row in rows)
    check_scores(trainer)
    assert own is None or set(own["suppress_tokens"]) < set(trainer.generation_config.suppress_tokens)


@pytest.mark.parametrize("own", OTHERS_SUPPRESSED)
def test_a_model_that_would_write_the_token_of_an_image_trains_without_tools(own, tmp_path):
    settings = {"rows": WITH_PICTURES, "tools": (), "prefers": prefers_the_tokens_of_images("Qwen3-VL")}
    settings |= {"num_initial_generations": 4, "max_completion_length": 20, "generation_kwargs": own}
    trainer = trainer_of("Qwen3-VL", tmp_path, **settings)
    trainer.train()
    check_images_of_rows([row for group in trainer._groups for row in group.trajectories], trainer._image_reader)


@pytest.mark.parametrize("temperature", (1.0, 0.0))
@pytest.mark.parametrize("family, protocol", PREFERRING)
def test_a_model_that_would_write_the_token_of_an_image_answers(family, protocol, temperature):
    model, processor = multimodal.build(family)
    model.generation_config.suppress_tokens = [5]  # the checkpoint's own are followed still
    tokens = prefers_the_tokens_of_images(family)
    multimodal.asks_then_answers(model.eval(), processor, tags=protocol == "tags", prefers=tokens)
    settings = {"tool_protocol": protocol, "max_completion_length": 300, "temperature": temperature}
    agent = Agent(model, processor, [photo], **settings)
    rows = agent.rollout([agent.with_images(row)["prompt"] for row in WITH_PICTURES[:2]])
    agent.close()
    check_images_of_rows(rows, agent.protocol.image_reader)
    assert all(len(row.images) == 2 and not row.truncated for row in rows)
    assert agent.generation_config.suppress_tokens == [5, *tokens]


def test_a_model_of_text_samples_what_its_config_says(tmp_path):
    assert trainer_of("Qwen3", tmp_path).generation_config.suppress_tokens is None


def test_continuous_batching_is_refused_images(tmp_path):
    trainer = trainer_of("Qwen3-VL", tmp_path, num_initial_generations=4)
    trainer.args.use_transformers_continuous_batching = True
    with pytest.raises(ValueError, match="`use_transformers_continuous_batching` reads no images"):
        trainer._sample_with_trl([[5]], [[PICTURE]])


@pytest.mark.parametrize("family, protocol", [("Qwen3-VL", "chat_template"), ("SmolVLM", "tags")])
def test_an_image_of_a_tool_is_an_error_where_the_engine_takes_none(family, protocol, tmp_path, monkeypatch, caplog):
    """As with a vLLM server that was started without images; no one knows that a tool returns one before it does."""
    logging.Logger.warning_once.cache_clear()
    monkeypatch.setattr("arpo_trl.trainer.reads_images", lambda trainer: False)
    settings = {"tools": [photo], "tool_protocol": protocol, "max_completion_length": 400}
    trainer = trainer_of(family, tmp_path, **settings)
    with caplog.at_level("WARNING"):
        trainer.train()
    for row in records(tmp_path):
        text = trainer._tokenizer.decode(row["completion_ids"])
        assert "{'error': 'The tool returned an image, and you read text only.'}\nsun in " in text
        assert row["images"] == [] and not sum(trainer._image_reader.types(row["completion_ids"]))
    assert sum("and an engine that takes them" in message for message in caplog.messages) == 1


# What a tool returns


def tokens_of(image) -> int:
    """64 pixels a token; no picture that is longer than 20 times its width."""
    if max(image.size) > 20 * min(image.size):
        raise ValueError("absolute aspect ratio must be smaller than 20")
    return image.width * image.height // 64


def answer_of(result, image_tokens=tokens_of, **options):
    """What becomes of a call whose tool returns `result`."""

    def look():
        return result

    with ToolExecutor(timeout=30, count_tokens=len, image_tokens=image_tokens) as executor:
        (call,) = executor.run([(ToolCall("look"), tool(look, **options))])
    return call


def image_block(image):
    return {"type": "image", "image": image}


def png(size=(16, 16), **settings) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "blue").save(file, "PNG", **settings)
    return file.getvalue()


TEXT = {"type": "text", "text": "a zoomed part"}


@pytest.mark.parametrize(
    "image", [Image.new("RGB", (16, 16), "blue"), png(), np.full((16, 16, 3), (0, 0, 255), np.uint8)], ids=type
)
def test_an_image_is_a_picture_the_bytes_of_a_file_or_an_array(image):
    call = answer_of([image_block(image), TEXT])
    block, text = call.result
    assert call.error is None and text == TEXT
    assert block["image"].size == (16, 16) and block["image"].getpixel((3, 3)) == (0, 0, 255)


@pytest.mark.parametrize(
    "image, told",
    [
        (png((64, 64))[:90], "cannot be read"),
        (b"\x89PNG\r\n\x1a\n and no more", "cannot be read"),
        (Image.open(io.BytesIO(png((64, 64))[:90])), "cannot be read"),
        (Image.new("RGB", (0, 4)), "without a pixel"),
        (np.zeros((2, 2, 7), np.uint8), "cannot be read"),
        ("/etc/passwd", "a `str` as an image"),
        ("https://example.com/cat.png", "a `str` as an image"),
        ({"url": "x"}, "a `dict` as an image"),
        (None, "a `NoneType` as an image"),
        (Image.new("RGB", (210, 10)), "the model cannot take: absolute aspect ratio"),
    ],
)
def test_an_image_that_cannot_be_read_is_an_error_that_the_model_reads(image, told):
    call = answer_of([image_block(image), TEXT])
    assert told in call.error and told in call.result and call.result.startswith("{'error': ")


def test_an_image_of_too_many_pixels_is_not_decoded(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    bomb = Image.open(io.BytesIO(png((40, 40))))
    loaded = []
    monkeypatch.setattr(type(bomb), "load", lambda self: loaded.append(self))
    assert "1,600 pixels, more than the 1,000" in answer_of([image_block(bomb)]).result
    assert not loaded
    much_more = answer_of([image_block(png((60, 60)))])  # Pillow itself refuses that
    assert "cannot be read: Image size (3600 pixels) exceeds limit" in much_more.result and not loaded


def test_the_tokens_of_a_result_are_those_of_its_images_too():
    picture, long = image_block(Image.new("RGB", (64, 64))), {"type": "text", "text": "x" * 500}  # 64 and 500 tokens
    image, text = answer_of([picture, long], max_result_tokens=164).result
    assert image["image"].size == (64, 64) and "[... " in text["text"] and len(text["text"]) <= 100
    assert answer_of([picture, TEXT], max_result_tokens=164).result == [picture, TEXT]
    call = answer_of([picture, picture, TEXT], max_result_tokens=100)
    assert "an image of 128 tokens, and a result may have 100" in call.result and call.error is not None


def test_a_model_that_reads_text_is_told_and_the_log_says_so_once(tmp_path, caplog):
    logging.Logger.warning_once.cache_clear()
    trainer = trainer_of("Qwen3", tmp_path, tools=[photo], tool_protocol="tags")
    with caplog.at_level("WARNING"):
        trainer.train()
    text = trainer._tokenizer.decode(records(tmp_path)[0]["completion_ids"])
    assert "{'error': 'The tool returned an image, and you read text only.'}\nsun in " in text
    assert sum("which this model cannot be shown" in message for message in caplog.messages) == 1
    assert not any(row.images for group in trainer._groups for row in group.trajectories)


def test_a_row_ends_where_an_image_does_not_fit(tmp_path):
    trainer = trainer_of("Gemma 4", tmp_path, tools=[photo], max_completion_length=100, tool_protocol="tags")
    trainer.train()  # an image is more than 60 tokens
    for row in trainer._groups[0].trajectories:
        assert row.truncated and row.tool_mask == [1] * len(row.completion_ids)
        assert row.calls[0].call.error is None and row.images == []
    assert all("pixel_values" not in batch for batch in trainer._buffered_inputs)


# Records


def test_records_keep_each_image_once(tmp_path):
    trainer_of("Qwen3-VL", tmp_path, rows=WITH_PICTURES, tools=[photo]).train()
    rows = records(tmp_path)
    files = {path.stem: Image.open(path) for path in (tmp_path / "rollouts" / "images").glob("*")}
    told = {name for row in rows for name in row["images"]}
    assert told == set(files) and all(path.suffix == ".png" for path in (tmp_path / "rollouts" / "images").iterdir())
    prompts = {row["images"][0] for row in rows}
    assert len(prompts) == 1 and files[prompts.pop()].getpixel((0, 0)) == PICTURE.getpixel((0, 0))
    for row in rows:
        ((image, text),) = [call["result"] for call in row["tool_calls"]]
        assert image == {"type": "image", "image": row["images"][1]} and text["type"] == "text"


@pytest.mark.parametrize("mode", ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "F", "I", "I;16"))
def test_a_picture_of_any_mode_is_kept(mode, tmp_path):
    saved = image_saver(tmp_path)
    one, other = Image.new(mode, (4, 3)), Image.new(mode, (3, 4))
    names = {saved(one), saved(other), saved(one.copy())}
    assert len(names) == 2 and {path.stem for path in tmp_path.iterdir()} == names
    assert {Image.open(path).size for path in tmp_path.iterdir()} == {(4, 3), (3, 4)}


# Outside of training


AGENTS = [(family, protocol) for family in FAMILIES for protocol in ("chat_template", "tags")]


@pytest.mark.parametrize("family, protocol", [*AGENTS, ("SmolVLM", "tags")])
def test_an_agent_reads_images(family, protocol, tmp_path):
    model, processor = multimodal.build(family)
    multimodal.asks_then_answers(model.eval(), processor, tags=protocol == "tags")
    agent = Agent(model, processor, [photo], tool_protocol=protocol, max_completion_length=300)
    questions = [{"prompt": PROMPT, "image": PICTURE}, {"prompt": PROMPT, "image": None}]
    path = tmp_path / "records.jsonl"
    for _ in range(2):  # the second time from the file
        results = evaluate(agent, questions, lambda completions, **kwargs: [1.0] * len(completions), records_path=path)
        assert [len(result["records"][0]["images"]) for result in results] == [2, 1]
    rows = agent.rollout([agent.with_images(question)["prompt"] for question in questions])
    agent.close()
    for row, images in zip(rows, (2, 1), strict=True):
        assert len(row.images) == images and not row.truncated
        wanted = sum(sum(agent.protocol.image_reader.types(agent.protocol.image_reader.ids(x))) for x in row.images)
        assert sum(agent.protocol.image_reader.types(row.prompt_ids + row.completion_ids)) == wanted
    assert len(list((tmp_path / "images").iterdir())) >= 2


# The viewer


def test_the_page_holds_each_image_once(tmp_path):
    trainer_of("Qwen3-VL", tmp_path, rows=WITH_PICTURES, tools=[photo]).train()
    page = render(tmp_path)
    index = unpacked(page, "index")
    told = {name for row in records(tmp_path) for name in row["images"]}
    assert set(index["images"]) == told and not index["notes"]
    for name, address in index["images"].items():
        content = base64.b64decode(address.removeprefix("data:image/png;base64,"))
        assert content == (tmp_path / "rollouts" / "images" / f"{name}.png").read_bytes()
    (group,) = unpacked(page, "step-0")
    assert group["images"] == records(tmp_path)[0]["images"][:1]
    calls = [call for row in group["rows"] for part in row["parts"] for call in part.get("calls", [])]
    assert len(calls) == 2, "forks share those of their parents"
    assert {call["images"][0] for call in calls} | set(group["images"]) == told
    assert all(call["result"].startswith("<image>\nsun in ") for call in calls)
    assert "img-src data:;" in page
    for path in (tmp_path / "rollouts" / "images").iterdir():
        path.unlink()
    index = unpacked(render(tmp_path), "index")
    assert index["images"] == {} and f"{len(told)} of {len(told)} images are not shown" in index["notes"][0]


def unpacked(page: str, name: str):
    packed = re.search(f'id="{name}">([^<]*)<', page)[1]
    return json.loads(gzip.decompress(base64.b64decode(packed)))
