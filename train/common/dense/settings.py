"""The settings of optimisation that all dense tasks share, and the learning rate that they give."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ..run.schedules import linear, warmup_cosine
from ..system.numbers import BelowOne, Count, NotNegative, Positive, Share


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

    peak: ClassVar[str] = "optim.lr"

    def learning_rate(self, samples: int, epoch: int, total: int) -> float:
        """After `samples` of `total` samples. epoch: samples in one."""
        warmup = self.warmup_epochs * epoch
        if self.schedule == "cosine":
            return warmup_cosine(samples, total, warmup, 0.0, self.lr, self.lr_end)
        if samples < warmup:
            return linear(samples / warmup, 0.0, self.lr)
        if self.schedule == "linear":
            return linear((samples - warmup) / (total - warmup), self.lr, self.lr_end)
        return self.lr * 0.1 ** sum(samples >= share * total for share in self.drops)
