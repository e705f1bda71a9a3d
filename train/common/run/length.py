"""How long a run is, and how its global batch is split into micro-batches of processes and accumulation rounds."""

from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from timm_dseq import UserError

from ..system.machine import memory

WARM, TIMED = 3, 5  # steps of a dry run: the first ones start workers and libraries, and compile


class Optim(Protocol):
    """The settings that say how long a run is."""

    epochs: float
    batch_size: int
    accumulation: int


class Warming(Protocol):
    """The settings of a schedule that begins with a warm-up."""

    epochs: float
    warmup_epochs: float


Settings = TypeVar("Settings", bound=Warming)  # a dataclass


def check_warmup(optim: Warming) -> None:
    """One line for a warm-up that takes the whole run."""
    if optim.warmup_epochs >= optim.epochs:
        raise UserError(
            f"optim.warmup_epochs={optim.warmup_epochs:g} leaves nothing of optim.epochs={optim.epochs:g}: give less."
        )


def fitted_warmup(optim: Settings, usual: float) -> tuple[Settings, list[str]]:
    """A recipe's warm-up, shorter where it would take more than half the run, and what to say. usual: the recipe's."""
    if optim.warmup_epochs != usual or usual <= optim.epochs / 2:
        return optim, []
    optim = replace(optim, warmup_epochs=optim.epochs / 20)
    return optim, [f"optim.warmup_epochs is {optim.warmup_epochs:g}, a twentieth of the run"]


def check_max_steps(max_steps: int | None, dry_run: bool) -> None:
    """One line for a dry run that is told where to end."""
    if max_steps is not None and dry_run:
        raise UserError("dry_run has steps of its own: leave max_steps out.")


@dataclass(frozen=True)
class Length:
    """A number of steps of `batch` images each; `micro_batch` is what one process computes in one round."""

    steps: int
    batch: int
    micro_batch: int

    @classmethod
    def of(cls, optim: Optim, images: int, processes: int, pairs: bool = False) -> "Length":
        """images: in an epoch. pairs: whether images are mixed in pairs, for which a micro-batch has to be even."""
        batch, parts = optim.batch_size, optim.accumulation * processes
        unit = parts * (2 if pairs else 1)
        if batch % unit:
            raise UserError(
                f"optim.batch_size={batch} is no multiple of {processes} processes × optim.accumulation="
                f"{optim.accumulation}{' × 2 images to mix' if pairs else ''}: take "
                f"{max(1, round(batch / unit)) * unit}."
            )
        if batch > images:
            raise UserError(f"optim.batch_size={batch} is more than the {images} images of the data set: give less.")
        return cls(max(1, round(optim.epochs * images / batch)), batch, batch // parts)

    @property
    def samples(self) -> int:
        """Images seen at the end of the schedules."""
        return self.steps * self.batch

    def last(self, max_steps: int | None) -> int:
        """The step at which a run ends that takes `max_steps` at most."""
        return min(self.steps, max_steps or self.steps)

    def describe(self, done: int) -> str:
        """The length in words, of a run that has done so many steps."""
        begin = f"going on after step {done}" if done else "from the start"
        return f"{self.steps} steps of {self.batch} images, {begin}"

    def estimate(self, seconds: float) -> str:
        """What a dry run says whose steps took so many seconds each."""
        return (
            f"dry run: {seconds:.2f} s a step ({self.batch / seconds:.0f} images/s), "
            f"{memory() / 2**10:.1f} GiB; the whole run of {self.steps} steps would take about "
            f"{duration(self.steps * seconds)}"
        )


def duration(seconds: float) -> str:
    """Seconds in words, in the unit that suits them."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
