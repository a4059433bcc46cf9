"""
Images as a multimodal checkpoint reads them: the tokens that stand for one, and the tensors that a model takes beside
the tokens. All of it is asked of the processor, so that no family is named here.

What is not here: what images there are (`execution/images.py`), and videos.
"""

from collections import deque
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from transformers import ProcessorMixin

_BEFORE, _AFTER = "before the picture", "after the picture"


class ImageReader:
    """
    Args:
        processor ([`~transformers.ProcessorMixin`]): Processor of a multimodal checkpoint.
        chat_template (`str`, *optional*): In place of its own template.
        chat_template_kwargs (`dict[str, Any]`, *optional*): Passed to the template.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ):
        self.processor = processor
        self._chat_template = chat_template
        self._chat_template_kwargs = chat_template_kwargs or {}
        self._recent: deque[tuple[Any, list[int]]] = deque(maxlen=32)  # a tool's image is counted, then written

    def tokens(self, image: Any) -> int:
        """How many tokens stand for an image. Raises what the processor raises of one that it cannot take."""
        return len(self.ids(image))

    def ids(self, image: Any) -> list[int]:
        """The tokens that stand for an image, those around it included."""
        for known, ids in list(self._recent):
            if known is image:
                return list(ids)
        ids = self._processed(self._mark, [image])["input_ids"]
        self._recent.append((image, ids))
        return list(ids)

    def fields(self, contexts: Sequence[Sequence[int]], images: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """
        What the model takes beside the tokens of some rows.

        Args:
            contexts (`Sequence[Sequence[int]]`): Tokens of each row.
            images (`Sequence[Sequence[PIL.Image.Image]]`): Images of each row, in the order of their tokens.

        Returns:
            `dict`: tensors by name, such as `pixel_values`, and for a model that is told which tokens are of images
            (`mm_token_type_ids`, `token_type_ids`) one list a row, not padded. Empty where no row has an image.
        """
        if not any(images):
            return {}
        pictures: Any = [image for row in images for image in row]
        if self.by_row:
            pictures = [list(row) for row in images]
        made = self.processor.image_processor(images=pictures, return_tensors="pt")
        fields = {name: value for name, value in made.items() if name in self.names}
        if self.type_name is not None:
            fields[self.type_name] = [self.types(context) for context in contexts]
        return fields

    def types(self, context: Sequence[int]) -> list[int]:
        """For each token 1 if it stands for a part of an image, else 0."""
        return [int(token in self.image_tokens) for token in context]

    def of_image(self, ids: torch.Tensor) -> torch.Tensor:
        """Which tokens stand for a part of an image: truth values in the shape of `ids`."""
        return torch.isin(ids, torch.tensor(sorted(self.image_tokens), device=ids.device))

    def unexpanded(self, context: Sequence[int], images: Sequence[Any]) -> list[int]:
        """A row with what the chat template writes for each image, as an engine takes it that puts in the rest."""
        mark = self.processor.tokenizer.encode(self._mark, add_special_tokens=False)
        written: list[int] = []
        done, place = 0, 0
        for image in images:
            ids = self.ids(image)
            while place <= len(context) - len(ids) and list(context[place : place + len(ids)]) != ids:
                place += 1
            if place > len(context) - len(ids):  # its tokens have merged with the text around it
                return list(context)
            written += [*context[done:place], *mark]
            done = place = place + len(ids)
        return [*written, *context[done:]]

    @cached_property
    def by_row(self) -> bool:
        """
        Whether the tensors have one entry a row, padded to the row with the most tiles, as Idefics and SmolVLM have
        them.
        """
        made = self.processor.image_processor(images=[self.sample] * 2, return_tensors="pt")
        return made["pixel_values"].dim() == 5 and len(made["pixel_values"]) == 1

    @cached_property
    def type_name(self) -> str | None:
        """What the processor calls the types of tokens; `None` for a model that is not told."""
        return next((name for name in self._example if name.endswith("token_type_ids")), None)

    @cached_property
    def image_tokens(self) -> frozenset[int]:
        """
        The tokens that stand for the parts of an image, in whose places a model puts what it sees. Gemma 3's processor
        has another one in its template, which it calls `image_token` and which begins them.
        """
        return frozenset(token for token in self.processor.image_token_ids if token is not None) or self._written

    @cached_property
    def never_sampled(self) -> frozenset[int]:
        """
        The tokens that no engine may sample: a model finds no image for one of its parts, and vLLM puts the next image
        of the row in the place of what the template writes for a whole one.
        """
        return self.image_tokens | self._written

    @cached_property
    def _written(self) -> frozenset[int]:
        return frozenset({self.processor.tokenizer.convert_tokens_to_ids(self.processor.image_token)})

    @cached_property
    def sample(self) -> Any:
        """A picture to learn from how one is read."""
        from PIL import Image

        return Image.new("RGB", (64, 64))

    @cached_property
    def _mark(self) -> str:
        """What the chat template writes for an image; where it moves images to another place, the token alone."""
        content = [{"type": "text", "text": _BEFORE}, {"type": "image"}, {"type": "text", "text": _AFTER}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=self._chat_template,
            tokenize=False,
            **self._chat_template_kwargs,
        )
        return text.split(_BEFORE)[-1].split(_AFTER)[0].strip() or self.processor.image_token

    @cached_property
    def _example(self) -> dict[str, Any]:
        return self._processed(self._mark, [self.sample])

    @cached_property
    def names(self) -> frozenset[str]:
        """What the model takes beside tokens and their mask."""
        return frozenset(self._example) - {"input_ids", "attention_mask"}

    def _processed(self, text: str, images: list[Any]) -> dict[str, Any]:
        made = self.processor(text=[text], images=[images], add_special_tokens=False)
        return {**made, "input_ids": made["input_ids"][0]}
