"""
Images with vLLM: what it is given in the place of one, what it must not write, and what it has to forget.

What is not here: how an engine is asked (`vllm.py`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...protocols.images import ImageReader

# Where a vLLM server turns images into what goes with tokens
_RENDER = "/v1/chat/completions/render"


def engine_prompts(
    contexts: list[list[int]], images: Sequence[Sequence[Any]], image_reader: ImageReader | None
) -> list[list[int]]:
    """Contexts with one token for each image: vLLM puts in as many as it has features."""
    if image_reader is None or not images:
        return contexts
    return [image_reader.unexpanded(*row) if row[1] else row[0] for row in zip(contexts, images, strict=True)]


def check_read(
    read: Sequence[Sequence[int]], contexts: Sequence[Sequence[int]], images: Sequence[Sequence[Any]]
) -> None:
    """
    Refuse an engine that reads an image as other tokens than the processor has written, which training scores.

    Raises:
        ValueError: It does.
    """
    for ids, context, own in zip(read, contexts, images or [], strict=False):
        if own and list(ids) != list(context):
            raise ValueError(
                f"vLLM reads a prompt with an image as {len(ids)} tokens, and the processor has written "
                f"{len(context)}: what it samples would be scored after another prompt. Set `use_vllm=False` for "
                "images with this model."
            )


def never_written(image_reader: ImageReader) -> dict[int, float]:
    """
    The `logit_bias` with which a model does not write the token of an image itself. vLLM would put the next image of
    the row in its place, and no model finds an image for it.
    """
    return dict.fromkeys(sorted(image_reader.never_sampled), -100.0)


def forget_images(generation: Any) -> None:
    """
    Have the engine read images anew. It keeps what its vision tower has made of each, and TRL resets no more than the
    cache of prefixes after an update.
    """
    client = getattr(generation, "vllm_client", None)  # with a server, of the main process
    if generation.mode == "colocate":
        generation.llm.llm_engine.reset_encoder_cache()
    elif client is not None:
        answer = client.session.post(f"{client.base_url}/reset_encoder_cache")
        if not answer.ok:
            raise RuntimeError(
                f"The vLLM server at {client.base_url} answers {answer.status_code} to `/reset_encoder_cache`, and "
                "would see images through the weights that it began with: use vLLM 0.22 or later."
            )


def server_reads_images(trainer: Any) -> bool:
    """
    Whether the vLLM engine of a trainer takes images; a server may not. All processes are told what the main one has
    asked, which alone has a client.

    Args:
        trainer ([`ARPOTrainer`]): Trainer with `use_vllm`, constructed as far as its data.

    Raises:
        ValueError: The data have images, and the server was not started for them.
    """
    if trainer.vllm_mode != "server":
        return True
    accelerator, taken = trainer.accelerator, 1
    if accelerator.is_main_process:
        client = trainer.vllm_generation.vllm_client
        # 404 where there is no such path, else that the method is not allowed
        taken = int(client.session.get(client.base_url + _RENDER).status_code != 404)
    taken = int(accelerator.gather(torch.tensor([taken], device=accelerator.device)).min())
    if not taken and _have_images(trainer.train_dataset, trainer.eval_dataset):
        args = trainer.args
        address = args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}"
        raise ValueError(
            f"The data have images, and the vLLM server at {address} takes none: start it with `--enable-scale-out` "
            "(vLLM 0.30 or later), or set `vllm_mode='colocate'`."
        )
    return bool(taken)


def _have_images(*data: Any) -> bool:
    """Whether some of the data sets, or of those in a `dict`, has a column of images; `None` has none."""
    sets = [own for each in data for own in (each.values() if isinstance(each, Mapping) else [each])]
    return any({"image", "images"} & set(getattr(own, "column_names", None) or ()) for own in sets)
