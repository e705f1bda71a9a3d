"""What changes over a run, as pure functions of the share of it that is done, 0 to 1."""

import math
from dataclasses import dataclass

from ..pretraining.settings import Config


@dataclass(frozen=True)
class Now:
    """The scheduled values at one moment."""

    lr: float
    weight_decay: float
    momentum: float  # of the target's moving average
    regions: float  # lambda: the chance of a sample to be trained on its regions


def at(config: Config, samples: int, epoch: int, total: int) -> Now:
    """The values after `samples` of `total` samples; epoch: samples in one."""
    optim, done = config.optim, samples / total
    return Now(
        lr=warmup_cosine(samples, total, optim.warmup_epochs * epoch, optim.lr_start, optim.lr, optim.lr_end),
        weight_decay=cosine(done, optim.weight_decay, optim.weight_decay_end),
        momentum=linear(done, optim.momentum, optim.momentum_end),
        regions=linear(done, optim.regions, optim.regions_end),
    )


def linear(done: float, start: float, end: float) -> float:
    return start + (end - start) * min(done, 1.0)


def cosine(done: float, start: float, end: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(done, 1.0))) / 2


def warmup_cosine(samples: int, total: int, warmup: float, start: float, peak: float, end: float) -> float:
    """Linear from start to peak over the warm-up, then a cosine to the end."""
    if samples < warmup:
        return linear(samples / warmup, start, peak)
    return cosine((samples - warmup) / max(1.0, total - warmup), peak, end)
