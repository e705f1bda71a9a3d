"""What a fine-tuning run says: one JSON line a step, each once and in order, and when to give up."""

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from timm_dseq import UserError

from .keeper import Done
from .record import Screen, memory, reopened
from .tuning import Tuning


@dataclass
class Figures:
    """Sums over the rounds of one step, in this process; tensors stay on the device."""

    loss: torch.Tensor | float = 0.0
    images: int = 0
    broken: list[str] = field(default_factory=list)
    gradient_norm: torch.Tensor | None = None


class Journal:
    """Steps → lines of `log.jsonl`. A step's figures are read when the next one is under way: nobody waits for them."""

    def __init__(self, config: Tuning, accelerator: Accelerator, done: Done, screen: Screen) -> None:
        self.config, self.accelerator, self.done, self.screen = config, accelerator, done, screen
        self.folder = Path(config.output_dir)
        self.stopping = False
        self.waiting: tuple | None = None
        self.clock = time.perf_counter()
        self.file = None
        if accelerator.is_main_process and not config.dry_run:
            self.file = reopened(self.folder / "log.jsonl", done.step)

    def add(self, done: Done, lr: float, figures: Figures, stop: bool) -> None:
        """Take a step's figures; write those of the step before."""
        local = torch.tensor([figures.images, len(figures.broken), float(stop)]).to(figures.loss)
        total = self.accelerator.reduce(torch.cat([figures.loss.reshape(1), local]), "sum")
        ready = torch.cat([total, figures.gradient_norm.reshape(1).to(total)])
        seconds = time.perf_counter() - self.clock
        self.clock += seconds
        self.flush()
        self.waiting = (done.step, done.samples, lr, figures.broken, ready, seconds)

    def flush(self, more: dict[str, Any] | None = None) -> None:
        """Write what waits; `more` joins its line."""
        if not self.waiting:
            return
        step, samples, lr, unreadable, ready, seconds = self.waiting
        self.waiting = None
        loss, images, broken, stop, norm = ready.tolist()
        skipped = not math.isfinite(norm)
        self.done.broken += int(broken)
        self.done.skipped = self.done.skipped + 1 if skipped else 0
        self.stopping = self.stopping or stop > 0
        record = {
            "step": step,
            "samples": samples,
            "loss": loss / images if math.isfinite(loss) else None,
            "lr": lr,
            "gradient_norm": norm if not skipped else None,
            "skipped": skipped,
            "broken": self.done.broken,
            "seconds": seconds,
            "images_per_second": images / seconds,
            "memory_mib": memory(),
            **(more or {}),
        }
        if self.file:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()  # a killed process loses no line
        self.screen.step(record, f"lr {lr:.2e}")
        self._judge(unreadable, samples)

    def _judge(self, unreadable: list[str], samples: int) -> None:
        """Stop a run that reads or learns nothing any more."""
        if unreadable and not self.config.dry_run:
            with (self.folder / "unreadable.txt").open("a") as file:
                file.writelines(f"{line}\n" for line in unreadable)
        if self.done.broken > self.config.data.max_broken * max(samples, 1000):
            raise UserError(
                f"{self.done.broken} of {samples} images cannot be read, more than data.max_broken="
                f"{self.config.data.max_broken}: see {self.folder / 'unreadable.txt'}."
            )
        if self.done.skipped >= self.config.optim.max_skipped:
            raise UserError(
                f"the loss or its gradient was not finite for {self.done.skipped} steps in a row: lower optim.base_lr, "
                "set optim.clip, or go on from an earlier checkpoint with --resume PATH."
            )
