"""What a run says: one JSON line a step on the disk, a progress bar or plain lines for whoever watches."""

import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from timm_dseq import DSeqJEPA, UserError
from timm_dseq.host import to_device

from ..run.log import reopened
from ..run.resume import Done
from ..system.command_line import flat
from ..system.machine import memory
from ..system.screen import Screen
from .figures import Counts, Figures
from .precision import Precision
from .schedule import Now
from .settings import Config
from .utilisation import Utilisation, matrix_rate


@dataclass(frozen=True)
class Waiting:
    """A step whose line is not written yet."""

    step: int
    samples: int
    now: Now
    figures: Figures
    counted: list[float] | None  # None: they are at the end of `numbers`
    numbers: torch.Tensor  # on the device: loss, sums and tokens by step, count, gradient norm
    seconds: float


class Recorder:
    """Steps → lines of `log.jsonl`, in order, each once.

    A step's figures are read when the next one is under way, so that nobody waits for them.
    """

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        model: DSeqJEPA,
        precision: Precision,
        done: Done,
        screen: Screen,
    ) -> None:
        self.config, self.accelerator, self.done, self.screen = config, accelerator, done, screen
        self.utilisation = Utilisation(model)
        self.rate = matrix_rate(accelerator.device, precision.product_dtype) * accelerator.num_processes
        self.folder = Path(config.output_dir)
        self.stopping = self.told = False
        self.waiting: Waiting | None = None
        self.begin()
        self.file = None
        if accelerator.is_main_process and not config.dry_run:
            self.file = reopened(self.folder / "log.jsonl", done.step)

    @property
    def numbers(self) -> torch.Tensor | None:
        """What the device holds of the step that waits; the next step's copy may bring it along."""
        return self.waiting.numbers if self.waiting else None

    def add(self, done: Done, now: Now, figures: Figures, stop: bool) -> None:
        """Take a step's figures; write those of the step before, which came along with this one's copy."""
        counted: list[float] | None = figures.counted(stop)
        numbers = torch.cat([figures.loss.reshape(1), figures.by_step.flatten()])
        own = torch.stack([figures.total, figures.gradient_norm.to(numbers)])  # the same in every process
        if self.accelerator.num_processes > 1:
            local = to_device(torch.tensor(counted, dtype=numbers.dtype), numbers.device)
            numbers, local = self.accelerator.reduce(torch.cat([numbers, local]), "sum").split(
                [len(numbers), len(local)]
            )
            own, counted = torch.cat([own, local]), None
        if self.waiting:
            self._write(figures.fetched)
        seconds = time.perf_counter() - self.clock
        self.begin()
        self.waiting = Waiting(done.step, done.samples, now, figures, counted, torch.cat([numbers, own]), seconds)

    def begin(self) -> None:
        """From here on time counts for the next step: probes, pictures and checkpoints lie behind."""
        self.clock = time.perf_counter()

    def flush(self, more: dict[str, Any] | None = None) -> None:
        """Write what waits; `more` joins its line."""
        if self.waiting:
            self._write(self.waiting.numbers, more)

    def _write(self, numbers: torch.Tensor, more: dict[str, Any] | None = None) -> None:
        """The line of the step that waits. numbers: its own, on the host or to be brought there."""
        waiting, self.waiting = self.waiting, None
        now, figures, seconds = waiting.now, waiting.figures, waiting.seconds
        loss, *rest = numbers.tolist()
        places = figures.by_step.shape[1]
        sums, tokens, (total, norm, *counted) = rest[:places], rest[places : 2 * places], rest[2 * places :]
        counts = Counts.of(waiting.counted or counted)
        skipped = not math.isfinite(norm)
        self.done.broken += int(counts.broken)
        self.done.skipped = self.done.skipped + 1 if skipped else 0
        self.stopping = self.stopping or counts.stop > 0
        record = {
            "step": waiting.step,
            "samples": waiting.samples,
            "loss": loss / total,
            "loss_by_step": [s / t if t else None for s, t in zip(sums, tokens, strict=True)],
            "lr": now.lr,
            "weight_decay": now.weight_decay,
            "momentum": now.momentum,
            "lambda": now.regions,
            "region_share": counts.on_regions / counts.images,
            "region_counts": [int(count) for count in counts.regions],
            "regions_found": sum(i * n for i, n in enumerate(counts.regions)) / max(1.0, sum(counts.regions)),
            "gradient_norm": norm if not skipped else None,
            "skipped": skipped,
            "broken": self.done.broken,
            "encoder_fill": sum(fill for fill, _ in figures.fill) / len(figures.fill),
            "predictor_fill": sum(fill for _, fill in figures.fill) / len(figures.fill),
            "seconds": seconds,
            "images_per_second": counts.images / seconds,
            "mfu": self.utilisation.flops(counts.images, counts.work) / seconds / self.rate,
            "graphs": graphs(),
            "memory_mib": memory(),
            **(more or {}),
        }
        record["loss"] = record["loss"] if math.isfinite(record["loss"]) else None
        if self.file:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()  # a killed process loses no line
        if self.accelerator.trackers:
            numbers = {name: value for name, value in flat(record).items() if isinstance(value, (int, float))}
            self.accelerator.log(numbers, step=waiting.step)
        shown = "not finite" if record["loss"] is None else f"{record['loss']:.4f}"
        self.screen.show(
            waiting.step,
            f"loss {shown}  lambda {record['lambda']:.2f}  regions {record['regions_found']:.1f}"
            f"  {record['images_per_second']:.0f} images/s",
        )
        self._judge(figures, waiting.samples)

    def _judge(self, figures: Figures, samples: int) -> None:
        """Stop a run that reads or learns nothing any more."""
        if figures.broken and not self.config.dry_run:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / "unreadable.txt").open("a") as file:
                file.writelines(f"{line}\n" for line in figures.broken)
            if not self.told:
                self.told = True
                self.screen.say(
                    f"an image cannot be read and is replaced by another: {figures.broken[0]}. All such are listed in "
                    f"{self.folder / 'unreadable.txt'}."
                )
        if self.done.broken > self.config.data.max_broken * max(samples, 1000):
            raise UserError(
                f"{self.done.broken} of {samples} images cannot be read, more than data.max_broken="
                f"{self.config.data.max_broken}: see {self.folder / 'unreadable.txt'}."
            )
        if self.done.skipped >= self.config.optim.max_skipped:
            file = self.folder / f"not_finite-{self.accelerator.process_index}.json"
            file.write_text(
                json.dumps({"step": self.done.step, "epoch_and_index": torch.cat(figures.samples).tolist()})
            )
            raise UserError(
                f"the loss or its gradient was not finite for {self.done.skipped} steps in a row: look at the images "
                f"named in {file}, lower optim.lr, or go on from an earlier checkpoint with --resume PATH."
            )


def available(trackers: list[str]) -> list[str] | None:
    """The trackers, if all are installed; accelerate would pass over one that is not. None for none."""
    for name in set(trackers) - {str(tracker) for tracker in get_available_trackers()}:
        raise UserError(f"watch.trackers: {name} is not installed: pip install {name}.")
    return trackers or None


def graphs() -> int:
    """How many graphs torch.compile has made so far: a number that goes on growing is time lost."""
    dynamo = sys.modules.get("torch._dynamo")
    return dynamo.utils.counters["stats"]["unique_graphs"] if dynamo else 0
