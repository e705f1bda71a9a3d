"""The scheduled values of pretraining, at any moment of it."""

from dataclasses import dataclass

from ..run import schedules
from .settings import Config


@dataclass(frozen=True)
class Now:
    """The scheduled values at one moment."""

    lr: float
    weight_decay: float
    momentum: float  # of the target's moving average
    regions: float  # lambda: the probability that a sample is trained on its regions


def at(config: Config, samples: int, epoch: int, total: int) -> Now:
    """The values after `samples` of `total` samples; epoch: samples in one."""
    optim, done, warm = config.optim, samples / total, config.optim.warmup_epochs * epoch
    if config.minutes:  # nobody knew how many epochs they would be
        warm = min(warm, total / 10)
    return Now(
        lr=schedules.warmup_cosine(samples, total, warm, optim.lr_start, optim.lr, optim.lr_end),
        weight_decay=schedules.cosine(done, optim.weight_decay, optim.weight_decay_end),
        momentum=schedules.linear(done, optim.momentum, optim.momentum_end),
        regions=schedules.linear(done, optim.regions, optim.regions_end),
    )
