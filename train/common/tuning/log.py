"""What a fine-tuning run says: one JSON line a step, each once and in order, and when to give up."""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from timm_dseq import UserError

from ..run.log import reopened
from ..run.resume import Done
from ..system.machine import memory
from ..system.screen import Screen
from .settings import Tuning


@dataclass
class Figures:
    """Sums over the rounds of one step, in this process; tensors stay on the device."""

    loss: torch.Tensor | float = 0.0
    images: int = 0
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
        local = torch.tensor([figures.images, float(stop)]).to(figures.loss)
        total = self.accelerator.reduce(torch.cat([figures.loss.reshape(1), local]), "sum")
        ready = torch.cat([total, figures.gradient_norm.reshape(1).to(total)])
        seconds = time.perf_counter() - self.clock
        self.clock += seconds
        self.flush()
        self.waiting = (done.step, done.samples, lr, ready, seconds)

    def flush(self, more: dict[str, Any] | None = None) -> None:
        """Write what waits; `more` joins its line."""
        if not self.waiting:
            return
        step, samples, lr, ready, seconds = self.waiting
        self.waiting = None
        loss, images, stop, norm = ready.tolist()
        skipped = not math.isfinite(norm)
        self.done.skipped = self.done.skipped + 1 if skipped else 0
        self.stopping = self.stopping or stop > 0
        record = {
            "step": step,
            "samples": samples,
            "loss": loss / images if math.isfinite(loss) else None,
            "lr": lr,
            "gradient_norm": norm if not skipped else None,
            "skipped": skipped,
            "seconds": seconds,
            "images_per_second": images / seconds,
            "memory_mib": memory(),
            **(more or {}),
        }
        if self.file:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()  # a killed process loses no line
        shown = "not finite" if record["loss"] is None else f"{record['loss']:.4f}"
        self.screen.show(step, f"loss {shown}  lr {lr:.2e}  {record['images_per_second']:.0f} images/s")
        if self.done.skipped >= self.config.optim.max_skipped:
            raise UserError(
                f"the loss or its gradient was not finite for {self.done.skipped} steps in a row: lower optim.base_lr, "
                "set optim.clip, or go on from an earlier checkpoint with --resume PATH."
            )
