"""Writes checkpoints: safetensors and JSON in a folder that gets its name last, so that one with a name is complete.

timm_dseq.hub.checkpoints describes such a folder, reads it and checks it.
"""

import errno
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from timm_dseq import UserError
from timm_dseq.hub.checkpoints import MANIFEST, MODEL, OPTIMIZER, STATE, fault, newest, number, state_of, steps
from timm_dseq.hub.weights import save_tensors, sha256

__all__ = ["MANIFEST", "Saved", "fault", "load", "newest", "number", "path_of", "prune", "save", "state_of", "steps"]

Tensors = dict[str, torch.Tensor]


@dataclass
class Saved:
    """A checkpoint in memory."""

    model: Tensors
    optimizer: Tensors
    state: dict[str, Any]


def path_of(folder: Path, step: int) -> Path:
    """The folder of one step's checkpoint."""
    return folder / f"step-{step:08d}"


def save(folder: Path, step: int, saved: Saved) -> Path:
    """Write one checkpoint beside the others, and rename it when all of it is on the disk."""
    final, unfinished = path_of(folder, step), folder / f".unfinished-{step:08d}"
    need = sum(t.numel() * t.element_size() for part in (saved.model, saved.optimizer) for t in part.values())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".unfinished-*"):  # by a process that was killed
            shutil.rmtree(leftover)
        unfinished.mkdir()
        if shutil.disk_usage(folder).free < need:
            raise OSError(errno.ENOSPC, "no space left on the disk")
        save_tensors(saved.model, unfinished / MODEL)
        save_tensors(saved.optimizer, unfinished / OPTIMIZER)
        (unfinished / STATE).write_text(json.dumps(saved.state, indent=1), encoding="utf-8")
        written = sorted(unfinished.iterdir())
        manifest = {path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in written}
        (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in (*unfinished.iterdir(), unfinished):
            _sync(path)
        if final.exists():  # it is damaged, and was passed over
            shutil.rmtree(final)
        unfinished.rename(final)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"{final} cannot be written ({reason}; it takes {need / 2**20:.0f} MiB): mend that and start again, "
            "the earlier checkpoints are complete."
        ) from error
    return final


def prune(folder: Path, keep: int, keep_every: int | None) -> None:
    """Remove all but the newest `keep` checkpoints and those of every `keep_every`-th step."""
    for path in steps(folder)[:-keep]:
        if path.is_symlink():  # somebody's, who wants the checkpoint kept elsewhere
            continue
        if not keep_every or number(path) % keep_every:
            shutil.rmtree(path)


def load(path: Path) -> Saved:
    """A complete checkpoint. Its tensors are memory-mapped: read when used, and once for all processes of a node."""
    return Saved(load_file(path / MODEL), load_file(path / OPTIMIZER), state_of(path))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
