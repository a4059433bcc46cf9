"""
What a model takes of images when rows are scored, put right where TRL's own batch does not fit rows that branch.

TRL says which tokens are of images from the prompt, or under a name of its own choice; a micro-batch may hold no image
while others do; and a row that is taken out of the loss is taken out of the attention, by which the images of the rows
after it would come to other places. Where tensors have one entry a row (Idefics, SmolVLM), TRL makes one row of all
images that tools return, and takes rows for images where there are as many. Under FSDP and ZeRO each process has to
read an image if one does.

What is not here: the tensors of images themselves, which are TRL's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

if TYPE_CHECKING:
    from ..protocols.images import ImageReader


def score_with_images(
    score: Callable[..., tuple],
    reader: ImageReader,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    logits_to_keep: int,
    batch_size: int | None,
    inputs: Mapping[str, Any],
    guest: tuple[list[int], Any] | None = None,
) -> tuple:
    """
    Score rows of which some have images.

    Args:
        score (`Callable`): Takes tokens, mask, the completion's length, the rows of a chunk and what a model takes
            beside; returns log-probabilities, entropies and the auxiliary loss, the last two perhaps `None`.
        reader ([`ImageReader`]): How the model reads images.
        input_ids, attention_mask (`torch.Tensor` of shape `(B, T)`): Rows.
        logits_to_keep (`int`): Tokens of the completion.
        batch_size (`int`, *optional*): Rows that are scored at once.
        inputs (`Mapping[str, Any]`): TRL's: `num_images`, tensors, and types of tokens.
        guest (`tuple[list[int], PIL.Image.Image]`, *optional*): Tokens of an image and the image, to read beside rows
            that have none, because another process reads some.

    Returns:
        `tuple`: as `score` returns.
    """
    taken = (reader.names - {reader.type_name}) | {"num_images", "num_tiles"}  # some processors tell more
    inputs = {name: value for name, value in inputs.items() if value is not None and name in taken}
    of_image = reader.of_image(input_ids)
    if reader.type_name is not None:
        inputs[reader.type_name] = of_image.to(input_ids.dtype)
    attention_mask = with_images(attention_mask, of_image, logits_to_keep)
    if inputs.get("pixel_values") is None:
        shown: Sequence[int] = [0] * len(input_ids)
    elif reader.by_row:
        inputs |= tiles_by_row(inputs, of_image)
        inputs["num_images"] = [0] * len(input_ids)  # TRL takes tensors by row where they are not as many as images
        shown = of_image.any(dim=1).tolist()
    else:
        shown = inputs["num_images"]
    size = batch_size or len(input_ids)
    if all(any(shown[start : start + size]) for start in range(0, len(shown), size)):
        return score(input_ids, attention_mask, logits_to_keep, batch_size, inputs)
    whole = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
    scores = []
    for chunk in _chunks(whole, shown, size, reader.type_name):
        rows = len(chunk["input_ids"])
        if guest is not None and "pixel_values" not in chunk:
            chunk = with_guest(chunk, reader, *guest)
        *by_token, loss = score(chunk.pop("input_ids"), chunk.pop("attention_mask"), logits_to_keep, None, chunk)
        scores.append((*(None if values is None else values[:rows] for values in by_token), loss))
    logps, entropies, losses = zip(*scores, strict=True)
    return (
        torch.cat(logps),
        None if entropies[0] is None else torch.cat(entropies),
        None if losses[0] is None else torch.stack(losses).mean(),
    )


def with_images(attention_mask: torch.Tensor, of_image: torch.Tensor, logits_to_keep: int) -> torch.Tensor:
    """
    The mask, with all tokens of a completion up to its last image where that image is masked. Such a row is not in the
    loss, and a model counts its images.
    """
    start = attention_mask.size(1) - logits_to_keep
    hidden = of_image[:, start:] & (attention_mask[:, start:] == 0)
    if not hidden.any():
        return attention_mask
    through = hidden.flip(1).cumsum(1).flip(1) > 0
    return torch.cat([attention_mask[:, :start], torch.where(through, 1, attention_mask[:, start:])], dim=1)


def tiles_by_row(tensors: Mapping[str, Any], of_image: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    Tensors of tiles with one entry a row, as the model takes them, from those that TRL has made of one row that holds
    the images of all. Every tile has as many tokens as any other, so a row's tokens tell how many are its own.

    Args:
        tensors (`Mapping[str, Any]`): `pixel_values` of shape `(1, tiles, …)`, perhaps `pixel_attention_mask`.
        of_image (`torch.Tensor` of shape `(B, T)`): Which tokens stand for a part of an image.

    Returns:
        `dict[str, torch.Tensor]`: of shape `(B, tiles of the row that has most, …)`, with zeros for those that a row
        has not; empty where `tensors` have one entry a row already.
    """
    rows, tiles = len(of_image), tensors["pixel_values"].size(1)
    if len(tensors["pixel_values"]) == rows:
        return {}
    tokens = of_image.sum(dim=1)
    own = (tokens * tiles // tokens.sum()).tolist()
    names = {"pixel_values", "pixel_attention_mask"} & tensors.keys()
    return {name: pad_sequence(tensors[name][0].split(own), batch_first=True) for name in names}


def with_guest(
    chunk: Mapping[str, torch.Tensor], reader: ImageReader, ids: list[int], image: Any
) -> dict[str, torch.Tensor | list[int]]:
    """
    Rows of text with one more row, which holds an image and is as long as they are, or they as it.

    Args:
        chunk (`Mapping[str, torch.Tensor]`): `input_ids`, `attention_mask` and perhaps types of tokens, of shape
            `(B, T)`.
        reader ([`ImageReader`]): How the model reads images.
        ids (`list[int]`): Tokens that stand for the image.
        image (`PIL.Image.Image`): The image.
    """
    rows, length = chunk["input_ids"].shape
    values = {"input_ids": ids, "attention_mask": [1] * len(ids), reader.type_name: reader.types(ids)}
    made: dict[str, Any] = {}
    for name, value in chunk.items():
        made[name] = pad(value, (max(len(ids) - length, 0), 0, 0, 1))
        made[name][-1, : len(ids)] = value.new_tensor(values[name])
    fields = reader.fields([*([[]] * rows), ids], [*([[]] * rows), [image]])
    device = chunk["input_ids"].device
    made |= {name: value.to(device) for name, value in fields.items() if name != reader.type_name}
    if reader.by_row:
        return {**made, "num_images": [0] * (rows + 1)}
    return {**made, "num_images": [0] * rows + [1], "num_tiles": [0] * rows + [len(made["pixel_values"])]}


def _chunks(
    batch: Mapping[str, Any], shown: Sequence[int], size: int, type_name: str | None
) -> Iterator[dict[str, Any]]:
    """
    The batch in parts of `size` rows, the last perhaps smaller. A part in which no row is `shown` an image has no
    tensors of any.
    """
    rows = split_pixel_values_by_grid(dict(batch))
    texts = {"input_ids", "attention_mask", type_name}
    for start in range(0, len(batch["input_ids"]), size):
        part: Any = {name: value[start : start + size] for name, value in rows.items()}
        part = unsplit_pixel_values_by_grid(part)
        if not any(shown[start : start + size]):
            part = {name: value for name, value in part.items() if name in texts}
        yield part


class ImageScoringMixin:
    """Goes before [`~trl.GRPOTrainer`] among the bases of a trainer whose rows have images of their own."""

    accelerator: Any
    is_fsdp_enabled: bool
    is_deepspeed_enabled: bool
    tools: Any
    _image_reader: Any

    def _anyone(self, here: bool) -> bool:
        raise NotImplementedError

    def _get_per_token_logps_and_entropies(
        self,
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        batch_size=None,
        compute_entropy=False,
        compute_aux_loss=False,
        **inputs,
    ):
        def score(ids, mask, keep, size, beside):
            return super(ImageScoringMixin, self)._get_per_token_logps_and_entropies(  # type: ignore[misc]
                model, ids, mask, keep, size, compute_entropy, compute_aux_loss, **beside
            )

        reader, counts = self._image_reader, inputs.get("num_images")
        shown = inputs.get("pixel_values") is not None
        guest = self._image_guest(shown and len(inputs["pixel_values"]) > 0)
        # Without tools the batch is TRL's own, where TRL can score it
        own = shown and (reader.by_row or counts is not None and (self.tools or 0 in counts))
        if own or guest is not None:
            return score_with_images(
                score, reader, input_ids, attention_mask, logits_to_keep, batch_size, inputs, guest
            )
        return score(input_ids, attention_mask, logits_to_keep, batch_size, inputs)

    def _image_guest(self, shown: bool) -> tuple[list[int], Any] | None:
        """
        Tokens and the image of a row to read beside rows without images, where `shown` says that this process, or
        another, has an image. FSDP and ZeRO-3 gather the vision tower's weights from all processes, and ZeRO-2 its
        gradients.
        """
        spread = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if self._image_reader is None or not spread or not self._anyone(shown):
            return None
        return self._image_reader.ids(self._image_reader.sample), self._image_reader.sample

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        if output.get("pixel_values") is not None and self._image_reader.by_row:
            of_image = self._image_reader.of_image(torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1))
            output |= tiles_by_row(output, of_image)
            # By the number of images TRL would take the tensors apart; without it they go with their rows
            del output["num_images"]
        return output
