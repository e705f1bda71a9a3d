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
from ..salient_crop import CROP
from .heads import HeadTraining
from .probe_run import ProbeRun


@dataclass(frozen=True)
class Answers:
    """Of H heads: which of the n test images each got right, and the accuracy by which the best is chosen."""

    correct: torch.Tensor  # (H, n) bool
    scores: torch.Tensor  # (H,) float64


def key_of(*about: Any) -> str:
    """A few digits for values that JSON can write."""
    return hashlib.blake2b(json.dumps(about).encode(), digest_size=8).hexdigest()


def _digest(numbers: np.ndarray) -> str:
    return hashlib.blake2b(numbers.astype(np.int64).tobytes(), digest_size=8).hexdigest()


def checkpoint_folder(probe: ProbeRun, training: HeadTraining) -> Path:
    """Where the heads' checkpoints lie while they are trained: what they learn from is in the key."""
    config, train = probe.config, probe.data.train
    digests = [_digest(training.rows), _digest(train.truth[training.rows].numpy())]
    key = key_of(
        *(config.protocol, probe.function, data_digest(train), train.label, config.data.subset, probe.preprocessing),
        *(config.precision, config.cache.dtype, training.views, digests, training.batch, training.steps),
        training.seed,
        *([config.salient_crop, *CROP] if probe.closer else []),
    )
    return Path(config.output_dir) / key


def answers_file(probe: ProbeRun, training: HeadTraining) -> Path:
    """Where the answers lie when the heads are trained: what they are asked joins the key."""
    train, test = probe.data.train, probe.data.test
    arrays = [test.truth.numpy()]
    if training.validation is not None:
        arrays += [training.validation, train.truth[training.validation].numpy()]
    digests = [_digest(array) for array in arrays]
    folder = checkpoint_folder(probe, training)
    return folder.with_name(f"answers-{key_of(folder.name, data_digest(test), test.label, digests)}.safetensors")


def load_answers(path: Path, probe: ProbeRun) -> Answers | None:
    """The answers in a file, None where there is none. All processes have to call it, and all get the same."""
    found: list[Answers | None] = [None]
    if probe.accelerator.is_main_process and path.is_file():
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
