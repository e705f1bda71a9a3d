"""The settings of a dense training run that all tasks share, and the learning rate that they give."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

from timm_dseq import UserError

from ..run.resume import Checkpoint
from ..run.schedules import linear, warmup_cosine
from ..system.computing import System
from ..system.numbers import BelowOne, Count, NotNegative, Positive, Share

# Settings that may differ when a run is resumed: none of them changes what is computed.
FREE = (
    *("data.path", "data.images", "workers", "optim.accumulation", "optim.max_skipped", "system.checkpointing"),
    *("checkpoint.", "output_dir", "results", "resume", "eval_every", "max_steps", "dry_run"),
)


@dataclass
class Optim:
    """Length, batch and schedule of the run; AdamW.

    Args:
        epochs: length of the run
        batch_size: images in a step, of all processes and accumulation rounds together
        accumulation: rounds in which a process computes its part of a step
        lr: learning rate of all that is built on the ViT
        schedule: step (a tenth at each of `drops`), cosine or linear, all after a linear warm-up from 0
        drops: where the learning rate falls to a tenth, as shares of the run
        lr_end: learning rate at the end of a cosine or line
        warmup_epochs: length of the warm-up
        layer_decay: learning rate of a layer of the ViT, as a factor of the next layer's
        weight_decay: of matrices; biases and norms have none
        betas: of AdamW
        drop_path: stochastic depth rate of the last block; it rises linearly from 0 at the first block
        clip: largest norm of the gradient (null: no clipping)
        max_skipped: the run ends after so many steps in a row whose loss or gradient is not finite
    """

    epochs: Positive = 25
    batch_size: Count = 16
    accumulation: Count = 1
    lr: Positive = 1e-4
    schedule: Literal["step", "cosine", "linear"] = "step"
    drops: list[Share] = field(default_factory=lambda: [0.88, 0.96])
    lr_end: NotNegative = 0.0
    warmup_epochs: NotNegative = 0.1
    layer_decay: Share = 0.7
    weight_decay: NotNegative = 0.1
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    drop_path: BelowOne = 0.1
    clip: Positive | None = 1.0
    max_skipped: Count = 20


class Settings(Protocol):
    """What a run needs of the settings of a task, which are a dataclass of values and dataclasses."""

    optim: Optim
    system: System
    checkpoint: Checkpoint
    output_dir: str
    resume: str
    seed: int
    workers: int
    eval_every: int
    max_steps: int | None
    dry_run: bool


def learning_rate(optim: Optim, samples: int, epoch: int, total: int) -> float:
    """After `samples` of `total` samples. epoch: samples in one."""
    warmup = optim.warmup_epochs * epoch
    if optim.schedule == "cosine":
        return warmup_cosine(samples, total, warmup, 0.0, optim.lr, optim.lr_end)
    if samples < warmup:
        return linear(samples / warmup, 0.0, optim.lr)
    if optim.schedule == "linear":
        return linear((samples - warmup) / (total - warmup), optim.lr, optim.lr_end)
    return optim.lr * 0.1 ** sum(samples >= share * total for share in optim.drops)


def check(config: Settings) -> None:
    """One line for settings that contradict each other, which their types cannot say."""
    if config.optim.warmup_epochs >= config.optim.epochs:
        raise UserError(
            f"optim.warmup_epochs={config.optim.warmup_epochs:g} leaves nothing of optim.epochs="
            f"{config.optim.epochs:g}: give less."
        )
    if config.max_steps is not None and config.dry_run:
        raise UserError("dry_run has steps of its own: leave max_steps out.")
