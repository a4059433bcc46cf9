"""
Images in what a tool returns, held to what can be read: decoded whole, of no more pixels than Pillow allows, and of no
more tokens than a result may have. What is wrong with one is an error that the model reads. And images as files of
their own, for what is written as JSON.

What it does not do: it fetches nothing. An image that is a path or an address is refused, since what it names may be
the model's own choice.
"""

import hashlib
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_OF_PNG = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "I;16"})


def images_of(result: Any) -> list[Any]:
    """The images among the content blocks of a tool's result, in order; none of a text."""
    blocks = result if isinstance(result, list) else []
    return [block["image"] for block in blocks if isinstance(block, dict) and block.get("type") == "image"]


def opened_image(image: Any) -> Any:
    """
    A picture, decoded whole.

    Args:
        image (`PIL.Image.Image`, `bytes` or `numpy.ndarray`): A picture, the bytes of an image file, or an array that
            `PIL.Image.fromarray` takes, such as one of shape (height, width, 3) and type `uint8`.

    Returns:
        `PIL.Image.Image`: `image` itself, if it is a picture.

    Raises:
        ValueError: It is none of these, is cut off or empty, or has more than `PIL.Image.MAX_IMAGE_PIXELS` pixels.
    """
    from PIL import Image

    picture = image
    try:
        if isinstance(image, bytes):
            picture = Image.open(io.BytesIO(image))
        elif type(image).__module__ == "numpy":
            picture = Image.fromarray(image)
    except Exception as error:  # of Pillow's many decoders
        raise ValueError(f"The tool returned an image that cannot be read: {error}") from error
    if not isinstance(picture, Image.Image):
        raise ValueError(
            f"The tool returned a `{type(image).__name__}` as an image, and only a picture, the bytes of an image "
            "file or an array is read as one."
        )
    pixels, most = picture.width * picture.height, Image.MAX_IMAGE_PIXELS
    if not pixels:
        raise ValueError("The tool returned an image without a pixel.")
    if most is not None and pixels > most:  # before it is decoded, which would take the memory
        raise ValueError(f"The tool returned an image of {pixels:,} pixels, more than the {most:,} that are read.")
    try:
        picture.load()
    except Exception as error:
        raise ValueError(f"The tool returned an image that cannot be read: {error}") from error
    return picture


def read_blocks(
    blocks: Sequence[dict[str, Any]],
    image_tokens: Callable[[Any], int],
    limit: int | None,
    cut: Callable[[str, int], str],
    count_tokens: Callable[[str], int],
) -> list[dict[str, Any]]:
    """
    Content blocks with their images decoded, and with no more tokens than a result may have. Images cannot be cut, so
    texts get what they leave.

    Args:
        blocks (`Sequence[dict]`): What a tool returned.
        image_tokens (`Callable[[PIL.Image.Image], int]`): Tokens that an image becomes; raises where it becomes none.
        limit (`int`, *optional*): Tokens that a result may have; `None` for any number.
        cut (`Callable[[str, int], str]`): Cuts a text to some tokens.
        count_tokens (`Callable[[str], int]`): Tokens of a text.

    Raises:
        ValueError: An image cannot be read, or images alone have more tokens than `limit`.
    """
    read, used = [], 0
    for block in blocks:
        if block["type"] == "image":
            block = {**block, "image": opened_image(block["image"])}
            try:
                used += image_tokens(block["image"])
            except Exception as error:
                raise ValueError(f"The tool returned an image that the model cannot take: {error}") from error
        read.append(block)
    if limit is None:
        return read
    if used > limit:
        raise ValueError(f"The tool returned an image of {used} tokens, and a result may have {limit}.")
    for place, block in enumerate(read):
        if block["type"] == "text":
            text = cut(block["text"], limit - used)
            used = min(used + count_tokens(text), limit)
            read[place] = {**block, "text": text}
    return read


def image_hash(image: Any) -> str:
    """What names a picture: the SHA-256 of its mode, its size and its pixels."""
    said = f"{image.mode} {image.width} {image.height} ".encode()
    palette = image.getpalette("RGBA") if image.mode == "P" else None
    return hashlib.sha256(said + bytes(palette or b"") + image.tobytes()).hexdigest()


def image_saver(folder: Path) -> Callable[[Any], str]:
    """
    A `default` of `json.dumps`: of a picture the hash by which its file in `folder` is called, which is written unless
    it is there; of a picture that cannot be read why; of anything else its text.
    """

    def saved(value: Any) -> str:
        if not hasattr(value, "tobytes") or not hasattr(value, "getpalette"):
            return str(value)
        try:
            name = image_hash(opened_image(value))
        except ValueError as error:
            return str(error)
        path = folder / f"{name}.png"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            started = path.with_suffix(f".{os.getpid()}.tmp")  # whole or not there, whoever else writes it
            (value if value.mode in _OF_PNG else value.convert("RGB")).save(started, "PNG")
            os.replace(started, path)
        return name

    return saved
