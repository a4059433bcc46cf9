"""Send a picture to where the metrics go.

What it does not do: backends other than TensorBoard, trackio and Weights & Biases get no picture; the file is all there is.
"""

from collections.abc import Sequence
from pathlib import Path

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback


def report_image(
    name: str, path: Path, step: int, report_to: Sequence[str], callbacks: Sequence[TrainerCallback]
) -> None:
    """
    Log the image at `path` under `name`, as the callbacks of transformers log the metrics.

    Args:
        name (`str`): Name of the series, with the prefix `train/` that the callbacks put before metrics.
        path (`Path`): The image file.
        step (`int`): Global step.
        report_to (`Sequence[str]`): Backends in use, of [`~transformers.TrainingArguments`].
        callbacks (`Sequence[TrainerCallback]`): Callbacks of the trainer: TensorBoard's holds the writer.
    """
    if "wandb" in report_to:
        import wandb

        if wandb.run is not None:
            wandb.log({name: wandb.Image(str(path)), "train/global_step": step})
    if "trackio" in report_to:
        import trackio

        trackio.log({name: trackio.Image(path), "train/global_step": step}, step=step)
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            import numpy as np
            from PIL import Image

            callback.tb_writer.add_image(name, np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")
