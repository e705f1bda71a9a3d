"""`log.jsonl`: one JSON line a step, in order and each once, even where a run was killed and resumed."""

import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator

from timm_dseq import UserError
from timm_dseq.host import to_device

from ..system.command_line import flat
from ..system.machine import memory
from ..system.screen import Screen
from .resume import Progress, Settings


def records(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; of none that is there, none. A line that is none of ours, as a kill cuts it off, ends it."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            break
        if lines and record["step"] <= lines[-1]["step"]:
            break
        lines.append(record)
    return lines


def reopened(path: Path, last_step: int):
    """The log, open for more lines, without those of steps that will be repeated."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [line for line in records(path) if line["step"] <= last_step]
    fresh = path.with_suffix(".new")
    fresh.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    os.replace(fresh, path)
    return path.open("a", encoding="utf-8")


@dataclass(frozen=True)
class Step:
    """A step whose line is not written yet."""

    number: int
    samples: int  # seen so far
    seconds: float
    facts: Any  # what `StepLog.line` needs besides sums and counts
    counts: dict[str, float]  # of this process
    numbers: torch.Tensor  # (n,) on the device: the gradient's norm, the sums and, of several processes, their counts


class StepLog:
    """Writes `log.jsonl`, the line on the screen and the trackers' figures; ends a run that learns nothing any more.

    A step's numbers are read from the device when the next step has been given to it, so the host does not wait for
    them. Each kind of run defines `line`, `advice` and `shown`.
    """

    shown: ClassVar[dict[str, str]]  # fields of a line that the screen shows, and as what

    def __init__(self, config: Settings, accelerator: Accelerator, progress: Progress, screen: Screen) -> None:
        self.config, self.accelerator, self.progress, self.screen = config, accelerator, progress, screen
        self.folder = Path(config.output_dir)
        self.stopping = False  # some process was asked to stop
        self._pending: Step | None = None
        self._file = None
        if accelerator.is_main_process and not config.dry_run:
            self._file = reopened(self.folder / "log.jsonl", progress.step)
        self.start_clock()

    def line(self, step: Step, sums: list[float], counts: dict[str, float]) -> dict[str, Any]:
        """What a line holds besides the fields that all have; "loss" is a must."""
        raise NotImplementedError

    def advice(self, step: Step) -> str:
        """What to do about a loss that stays not finite."""
        raise NotImplementedError

    @property
    def numbers(self) -> torch.Tensor | None:
        """(n,), what the device holds of the pending step: the next step may copy them to the host with its own."""
        return self._pending.numbers if self._pending else None

    def start_clock(self) -> None:
        """The next step's time starts here, so that probes, pictures and checkpoints are not counted."""
        self._clock = time.perf_counter()

    def push(
        self,
        facts: Any,
        sums: torch.Tensor,
        counts: dict[str, float],
        gradient_norm: torch.Tensor,
        stop: bool,
        fetched: torch.Tensor | None = None,
    ) -> None:
        """Take the step that `progress` has just counted, and write the line of the step before.

        sums (k,) on the device and counts on the host, "images" among them, are this process's; gradient_norm () is the
        same in all. stop: whether this process was asked to stop. fetched: `numbers`, if this step copied them.
        """
        counts = {**counts, "stop": float(stop)}
        if self.accelerator.num_processes > 1:
            local = to_device(torch.tensor(list(counts.values()), dtype=sums.dtype), sums.device)
            sums = self.accelerator.reduce(torch.cat([sums, local]), "sum")
        self.flush(numbers=fetched)
        seconds = time.perf_counter() - self._clock
        self.start_clock()
        numbers = torch.cat([gradient_norm.reshape(1).to(sums), sums])
        self._pending = Step(self.progress.step, self.progress.samples, seconds, facts, counts, numbers)

    def flush(self, more: dict[str, Any] | None = None, numbers: torch.Tensor | None = None) -> None:
        """Write the line of the pending step, if there is one. `more` joins it; numbers: its own, on the host."""
        step, self._pending = self._pending, None
        if step is None:
            return
        norm, *sums = (step.numbers if numbers is None else numbers).tolist()
        counts = step.counts
        if self.accelerator.num_processes > 1:
            counts = dict(zip(counts, sums[-len(counts) :], strict=True))
            sums = sums[: -len(counts)]
        skipped = not math.isfinite(norm)
        self.progress.skipped = self.progress.skipped + 1 if skipped else 0
        self.stopping = self.stopping or counts["stop"] > 0
        line = {
            "step": step.number,
            "samples": step.samples,
            **self.line(step, sums, counts),
            "gradient_norm": None if skipped else norm,
            "skipped": skipped,
            "seconds": step.seconds,
            "images_per_second": counts["images"] / step.seconds,
            "memory_mib": memory(),
            **(more or {}),
        }
        line["loss"] = line["loss"] if math.isfinite(line["loss"]) else None
        if self._file:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()  # a killed process loses no line
        if self.accelerator.trackers:
            figures = {name: value for name, value in flat(line).items() if isinstance(value, (int, float))}
            self.accelerator.log(figures, step=step.number)
        words = ["loss not finite" if line["loss"] is None else f"loss {line['loss']:.4f}"]
        words += [words_for.format(line[name]) for name, words_for in self.shown.items() if line[name] is not None]
        self.screen.show(step.number, "  ".join([*words, f"{line['images_per_second']:.0f} images/s"]))
        self.check(step)

    def check(self, step: Step) -> None:
        """End the run if too many steps in a row were not finite, or all that it has."""
        if self.progress.skipped >= min(self.config.optim.max_skipped, self.screen.total):
            raise UserError(
                f"the loss or its gradient was not finite for {self.progress.skipped} steps in a row: "
                f"{self.advice(step)}, or go on from an earlier checkpoint with --resume PATH."
            )
