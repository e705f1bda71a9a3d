"""Checkpoints that are whole or not there: safetensors and JSON in a folder that gets its name last.

    checkpoints/step-00000100/  model.safetensors  optimizer.safetensors  state.json  manifest.json

The manifest holds every file's size and SHA-256, so a truncated or damaged checkpoint is told from a whole one.
"""

import errno
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from timm_dseq import UserError

Tensors = dict[str, torch.Tensor]
MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"


@dataclass
class Saved:
    """A checkpoint in memory."""

    model: Tensors
    optimizer: Tensors
    state: dict[str, Any]


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def save(folder: Path, step: int, saved: Saved) -> Path:
    """Write one checkpoint beside the others; it gets its name when all of it is on the disk."""
    final, unfinished = path_of(folder, step), folder / f".unfinished-{step:08d}"
    need = sum(t.numel() * t.element_size() for part in (saved.model, saved.optimizer) for t in part.values())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".unfinished-*"):  # of a process that was killed
            shutil.rmtree(leftover)
        unfinished.mkdir()
        if shutil.disk_usage(folder).free < need:
            raise OSError(errno.ENOSPC, "no space left on the disk")
        save_file(saved.model, unfinished / MODEL, metadata={"format": "pt"})
        save_file(saved.optimizer, unfinished / OPTIMIZER)
        (unfinished / STATE).write_text(json.dumps(saved.state, indent=1))
        manifest = {name: {"size": size, "sha256": digest} for name, size, digest in _files(unfinished)}
        (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in (*unfinished.iterdir(), unfinished):
            _sync(path)
        if final.exists():  # one that was found damaged
            shutil.rmtree(final)
        unfinished.rename(final)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"{final} cannot be written ({reason}; it takes {need / 2**20:.0f} MiB): mend that and start again, "
            "the earlier checkpoints are whole."
        ) from error
    return final


def prune(folder: Path, keep: int, keep_every: int | None) -> None:
    """Remove all but the newest `keep` checkpoints and those of every `keep_every`-th step."""
    for path in steps(folder)[:-keep]:
        if not keep_every or number(path) % keep_every:
            shutil.rmtree(path)


def steps(folder: Path) -> list[Path]:
    """The named checkpoints, oldest first."""
    return sorted(folder.glob("step-*"), key=number)


def number(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def fault(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is whole."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError):
        return f"{MANIFEST} is missing or damaged"
    found = {name: (size, digest) for name, size, digest in _files(path) if name != MANIFEST}
    for name, expected in manifest.items():
        if name not in found:
            return f"{name} is missing"
        size, digest = found[name]
        if size != expected["size"]:
            return f"{name} has {size} bytes instead of {expected['size']}"
        if digest != expected["sha256"]:
            return f"{name} is damaged (its SHA-256 is not the one written)"
    return None


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and why newer ones were passed over."""
    skipped = []
    for path in reversed(steps(folder)):
        if (wrong := fault(path)) is None:
            return path, skipped
        skipped.append(f"{path.name}: {wrong}")
    return None, skipped


def state_of(path: Path) -> dict[str, Any]:
    """What stands in a whole checkpoint beside tensors."""
    return json.loads((path / STATE).read_text())


def load(path: Path) -> Saved:
    """A checkpoint that is whole. Its tensors are mapped: read when used, and in memory once for all of a node."""
    return Saved(load_file(path / MODEL), load_file(path / OPTIMIZER), state_of(path))


def _files(folder: Path) -> list[tuple[str, int, str]]:
    """Name, size and SHA-256 of every file."""
    files = []
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        files.append((path.name, path.stat().st_size, digest.hexdigest()))
    return files


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
