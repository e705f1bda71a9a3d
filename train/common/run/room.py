"""Whether the disk has room for what a run will write, asked before its first step."""

import shutil
from pathlib import Path

import torch

from timm_dseq import UserError

from . import checkpoints


def check_room(output: Path, folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, keep: int) -> None:
    """Refuse a disk that holds less than the checkpoints that stay, one more that is being written, and the export.

    output: of the run. folder: of its checkpoints; what is there already takes no more room.
    """
    weights = _bytes(model.state_dict().values())
    moments = 2 * _bytes(parameter for group in optimizer.param_groups for parameter in group["params"])
    there = sum(file.lstat().st_size for step in checkpoints.steps(folder) for file in step.iterdir())
    needed = (keep + 1) * (weights + moments) + weights - there
    disk = next(place for place in (output, *output.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(disk).free
    if free < needed:
        raise UserError(
            f"output_dir={output} has room for {_size(free)}, and {keep + 1} checkpoints and the export take "
            f"{_size(needed)}: free some, name another, or lower checkpoint.keep."
        )


def _bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _size(count: int) -> str:
    """Bytes in words."""
    return f"{count / 2**20:.0f} MiB" if count < 10 * 2**30 else f"{count / 2**30:.0f} GiB"
