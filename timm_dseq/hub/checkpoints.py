"""The checkpoints of a training run, as files: which there are, whether they are complete, and which is the newest.

    RUN/checkpoints/step-00000100/  model.safetensors  optimizer.safetensors  state.json  manifest.json

manifest.json holds the size and SHA-256 of every other file, so that a truncated or damaged checkpoint is noticed. The
recipes in train/ write them.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from .model_args import misfit
from .weights import sha256

MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"


def steps(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first, complete or not."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdecimal() and path.is_dir()]
    return sorted(found, key=number)


def number(path: Path) -> int:
    """The training step of a checkpoint, from its name."""
    return int(path.name.removeprefix("step-"))


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint, and one line for each newer one that is damaged."""
    damaged = []
    for path in reversed(steps(folder)):
        if (reason := fault(path)) is None:
            return path, damaged
        damaged.append(f"{path.name}: {reason}")
    return None, damaged


def latest(folder: Path) -> Path:
    """The newest complete checkpoint of a folder that holds some; UserError if all are damaged."""
    path, damaged = newest(folder)
    if path is None:
        raise UserError(f"{folder} holds no complete checkpoint: {damaged[0]}.")
    return path


def encoder_of(path: Path) -> tuple[str, int, dict[str, Any]]:
    """What timm was told to build in the run of a checkpoint of pretrain.py: name, image size, further arguments."""
    try:
        settings = state_of(path)["config"]["model"]
        if fault := misfit(settings["args"]):
            raise UserError(f"{path / STATE} says {fault}.")
        return settings["name"], settings["img_size"], settings["args"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no checkpoint of pretrain.py: of another program, name the export.") from error


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint, complete or not."""
    return any(os.path.lexists(folder / name) for name in (STATE, MANIFEST))


def check(path: Path, needed: Sequence[str] = (MODEL, OPTIMIZER, STATE)) -> None:
    """Refuse a checkpoint of which these files are not complete."""
    if reason := fault(path, needed):
        raise UserError(f"{path}: {reason}. Take another checkpoint.")


def fault(path: Path, needed: Sequence[str] = (MODEL, OPTIMIZER, STATE)) -> str | None:
    """What is wrong with a checkpoint; None if these files of it are complete and as they were written."""
    if not (path / MANIFEST).is_file():  # a FIFO would be waited for
        return f"{MANIFEST} is missing or damaged"
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        written = {name: (file["size"], file["sha256"]) for name, file in manifest.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} is missing or damaged"
    if lacking := [name for name in needed if name not in written]:
        return f"{MANIFEST} does not name {lacking[0]}"
    for name in needed:
        file, (size, digest) = path / name, written[name]
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        try:
            if sha256(file) != digest:
                return f"{name} is damaged (its SHA-256 is not the one written)"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def state_of(path: Path) -> dict[str, Any]:
    """What a complete checkpoint holds beside tensors: settings, progress, the data set's fingerprint."""
    return json.loads((path / STATE).read_text(encoding="utf-8"))
