"""What a supervised run needs of the settings of its program, and which of them may differ when it is resumed."""

from __future__ import annotations

from typing import ClassVar, Protocol

from ..run.resume import Checkpoint
from ..system.computing import System

# None of them changes what is computed.
FREE = (
    *("data.path", "workers", "optim.accumulation", "optim.max_skipped", "system.checkpointing"),
    *("checkpoint.", "output_dir", "results", "resume", "eval_every", "max_steps", "dry_run"),
)


class Optim(Protocol):
    """Length, batch and schedule of a run; AdamW."""

    peak: ClassVar[str]  # the setting from which its learning rates come, for advice
    epochs: float
    batch_size: int
    accumulation: int
    betas: tuple[float, float]
    clip: float | None
    max_skipped: int

    def learning_rate(self, samples: int, epoch: int, total: int) -> float:
        """After `samples` of `total` samples, that of the last layer. epoch: samples in one."""


class Settings(Protocol):
    """A dataclass of values and dataclasses."""

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
