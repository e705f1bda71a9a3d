"""What the trained heads of one seed answered, kept on the disk: a probe that is finished is never trained again.

    OUTPUT_DIR/answers-KEY.safetensors   correct (H, n) bool, scores (H,) float64

The key is made of everything that decides the answers, so no file can be stale. The heads themselves are not kept.
"""

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from timm_dseq import UserError

from ..data.digests import data_digest
from .task import Task


@dataclass(frozen=True)
class Rows:
    """Rows of the training split."""

    train: np.ndarray  # heads are trained on these
    validation: np.ndarray | None  # and the best is chosen on these; None: on the test split


@dataclass(frozen=True)
class Answers:
    """Of H heads: which of the n test images each got right, and the accuracy by which the best is chosen."""

    correct: torch.Tensor  # (H, n) bool
    scores: torch.Tensor  # (H,) float64


def key_of(*about: Any) -> str:
    """A few digits for values that JSON can write."""
    return hashlib.blake2b(json.dumps(about).encode(), digest_size=8).hexdigest()


def answers_file(task: Task, heads: str, rows: Rows) -> Path:
    """heads: a key of the weights, the training images and the settings; the rows, labels and test images join it."""
    train, test = task.data.train, task.data.test
    arrays = [rows.train, train.truth[rows.train].numpy(), test.truth.numpy()]
    if rows.validation is not None:
        arrays += [rows.validation, train.truth[rows.validation].numpy()]
    digests = [hashlib.blake2b(array.astype(np.int64).tobytes(), digest_size=8).hexdigest() for array in arrays]
    key = key_of(heads, data_digest(test), test.label, digests)
    return Path(task.config.output_dir) / f"answers-{key}.safetensors"


def load_answers(path: Path, task: Task) -> Answers | None:
    """The answers in a file, None where there is none. All processes have to call it, and all get the same."""
    found: list[Answers | None] = [None]
    if task.accelerator.is_main_process and path.is_file():
        with suppress(SafetensorError, TypeError):  # damaged: the heads are trained again
            found = [Answers(**load_file(path))]
    broadcast_object_list(found)
    return found[0]


def save_answers(path: Path, answers: Answers) -> None:
    """Write the file; it gets its name when it is complete."""
    unfinished = path.with_suffix(".new")
    try:
        save_file({"correct": answers.correct, "scores": answers.scores}, unfinished)
        unfinished.replace(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"{path} cannot be written ({reason}): mend that and give the same command again, the heads are saved."
        ) from error
