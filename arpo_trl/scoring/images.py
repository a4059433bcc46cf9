"""
What a model takes of images when rows are scored, put right where TRL's own batch does not fit rows that branch.

TRL says which tokens are of images from the prompt, or under a name of its own choice; a micro-batch may hold no image
while others do; and a row that is taken out of the loss is taken out of the attention, by which the images of the rows
after it would come to other places.

What is not here: the tensors of images themselves, which are TRL's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
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

    Returns:
        `tuple`: as `score` returns.
    """
    taken = (reader.names - {reader.type_name}) | {"num_images", "num_tiles"}  # some processors tell more
    inputs = {name: value for name, value in inputs.items() if value is not None and name in taken}
    of_image = torch.isin(input_ids, torch.tensor(sorted(reader.image_tokens), device=input_ids.device))
    if reader.type_name is not None:
        inputs[reader.type_name] = of_image.to(input_ids.dtype)
    attention_mask = with_images(attention_mask, of_image, logits_to_keep)
    counts, size = inputs["num_images"], batch_size or len(input_ids)
    if all(sum(counts[start : start + size]) for start in range(0, len(counts), size)):
        return score(input_ids, attention_mask, logits_to_keep, batch_size, inputs)
    whole = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
    scores = [
        score(chunk.pop("input_ids"), chunk.pop("attention_mask"), logits_to_keep, None, chunk)
        for chunk in _chunks(whole, size, reader.type_name)
    ]
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


def _chunks(batch: Mapping[str, Any], size: int, type_name: str | None) -> Iterator[dict[str, Any]]:
    """The batch in parts of `size` rows, the last perhaps smaller; a part without images has no tensors of any."""
    rows = split_pixel_values_by_grid(dict(batch))
    texts = {"input_ids", "attention_mask", type_name}
    for start in range(0, len(batch["input_ids"]), size):
        part: Any = {name: value[start : start + size] for name, value in rows.items()}
        part = unsplit_pixel_values_by_grid(part)
        yield part if sum(part["num_images"]) else {name: value for name, value in part.items() if name in texts}


class ImageScoringMixin:
    """Goes before [`~trl.GRPOTrainer`] among the bases of a trainer whose rows have images of their own."""

    tools: Any
    _image_reader: Any

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

        # Without tools the batch is TRL's own
        if not self.tools or self._image_reader is None or inputs.get("num_images") is None:
            return score(input_ids, attention_mask, logits_to_keep, batch_size, inputs)
        return score_with_images(
            score, self._image_reader, input_ids, attention_mask, logits_to_keep, batch_size, inputs
        )
