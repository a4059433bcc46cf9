"""Which checkpoint of a run to go on from. A kill or a full disk in the midst of saving leaves one that is not whole.

A checkpoint is whole if everything that resuming reads is there to its end: the formats in it (safetensors, PyTorch's
zip archives, JSON) tell that without being loaded. What is not here: a check of contents, and of texts such as a model
card, which resuming does not read. Shards of `torch.distributed.checkpoint` are taken for whole where their metadata,
which is written last, is.
"""

import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers.utils import logging

logger = logging.get_logger(__name__)

_NAME = re.compile(r"checkpoint-(\d+)")
_WEIGHTS = ("model", "adapter_model", "pytorch_model", "pytorch_model_fsdp")


def newest_whole_checkpoint(output_dir: str | os.PathLike, save_only_model: bool = False) -> Path | None:
    """
    The newest checkpoint of a run that is whole. Those after it are named in a warning.

    Args:
        output_dir (`str` or `os.PathLike`): Folder of the run.
        save_only_model (`bool`, *optional*, defaults to `False`): Whether the run saves no optimizer.

    Returns:
        `Path`: the checkpoint; `None` where there is none at all.

    Raises:
        ValueError: There are checkpoints, and none is whole.
    """
    root = Path(output_dir)
    found = {
        int(match[1]): path
        for path in (root.iterdir() if root.is_dir() else ())
        if (match := _NAME.fullmatch(path.name)) and path.is_dir()
    }
    faults: dict[str, str] = {}
    for step in sorted(found, reverse=True):
        fault = find_fault(found[step], save_only_model)
        if fault is None:
            if faults:
                damaged = "; ".join(f"{name}: {reason}" for name, reason in faults.items())
                logger.warning(f"Resuming from {found[step]}. What was saved after it is not whole ({damaged}).")
            return found[step]
        faults[found[step].name] = fault
    if faults:
        damaged = "; ".join(f"{name}: {reason}" for name, reason in faults.items())
        raise ValueError(
            f"`resume_from_checkpoint=True`, but no checkpoint in {str(root)!r} is whole ({damaged}). Start anew "
            "without `resume_from_checkpoint`, or name a folder."
        )
    return None


def find_fault(checkpoint: Path, save_only_model: bool = False) -> str | None:
    """What is missing in a checkpoint or cut off, or `None` if it is whole."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    names = {path.relative_to(checkpoint).as_posix() for path in files}
    for path in files:
        if not _is_whole(path):
            return f"{path.relative_to(checkpoint)} is cut off or cannot be read"
    for path in files:
        if path.name.endswith(".index.json"):
            shards = set(json.loads(path.read_bytes()).get("weight_map", {}).values())
            missing = sorted(shard for shard in shards if not (path.parent / shard).is_file())
            if missing:
                return f"{missing[0]} is missing"
    return _missing(checkpoint, names, save_only_model)


def _missing(checkpoint: Path, names: set[str], save_only_model: bool) -> str | None:
    """What a checkpoint lacks of what saving it writes, in the layout in which it was saved."""
    if "trainer_state.json" not in names:
        return "trainer_state.json is missing"
    folders = {name.split("/")[0] for name in names if "/" in name}
    for folder in sorted(folders):
        inside = [name for name in names if name.startswith(f"{folder}/")]
        if any(name.endswith(".distcp") for name in inside) and f"{folder}/.metadata" not in names:
            return f"{folder}/.metadata is missing"
    if "latest" in names:  # DeepSpeed's own checkpoint, in the folder that this file names
        deepspeed = (checkpoint / "latest").read_text(encoding="utf-8", errors="replace").strip()
        return None if deepspeed and deepspeed in folders else "the folder that `latest` names is missing"
    file_names = {
        name.rsplit("/", 1)[-1].split(".")[0] for name in names if name.endswith((".safetensors", ".bin", ".json"))
    }
    sharded = any(folder.startswith("pytorch_model_fsdp") for folder in folders)
    if not sharded and not file_names & set(_WEIGHTS):
        return "the model is missing"
    if save_only_model:
        return None
    if not {"optimizer.pt", "optimizer.bin"} & names and not any(folder.startswith("optimizer") for folder in folders):
        return "optimizer.pt is missing"
    if "scheduler.pt" not in names:
        return "scheduler.pt is missing"
    if not any(re.fullmatch(r"rng_state(_\d+)?\.pth", name) for name in names):
        return "rng_state.pth is missing"
    return None


def _is_whole(path: Path) -> bool:
    """Whether a file is there to its end, as far as its format tells."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_bytes())
        elif path.suffix == ".safetensors":
            return _is_whole_safetensors(path)
        elif path.suffix in (".pt", ".pth", ".bin"):
            with zipfile.ZipFile(path) as archive:  # its table of contents stands at the end
                return bool(archive.namelist())
    except (ValueError, OSError, LookupError, AttributeError, TypeError, RecursionError, zipfile.BadZipFile):
        return False
    return True


def _is_whole_safetensors(path: Path) -> bool:
    """Whether the header can be read and the file is as long as the header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 + length:
            return False
        header = json.loads(file.read(length))
    ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
    return size == 8 + length + max(ends, default=0)


def shared_choice(trainer: Any) -> str | None:
    """The newest whole checkpoint of a trainer's run. The main process looks, so that all resume from the same one."""
    answer: list[Any] = [None]
    if trainer.is_world_process_zero():
        try:
            answer[0] = newest_whole_checkpoint(trainer.args.output_dir, trainer.args.save_only_model)
        except ValueError as error:
            answer[0] = error
    broadcast_object_list(answer)
    if isinstance(answer[0], ValueError):
        raise answer[0]
    return answer[0] and str(answer[0])
