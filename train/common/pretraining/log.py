"""What a run says: one JSON line a step on the disk, a progress bar or plain lines for whoever watches."""

import json
import math
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from timm_dseq import DSeqJEPA, UserError
from timm_dseq.host import to_device

from ..run.resume import Done
from ..run.schedules import Now
from .precision import Precision
from .settings import Config, flat
from .utilisation import WORK, Utilisation, matrix_rate

try:
    import resource
except ImportError:  # Windows
    resource = None


@dataclass
class Figures:
    """Sums over the rounds of one step, in this process; tensors stay on the device."""

    weight: torch.Tensor | float = 0.0  # of all rounds, the same in every process
    loss: torch.Tensor | float = 0.0  # times weight
    by_step: torch.Tensor | float = 0.0  # (2, K): sum of losses, and tokens
    regions: list[int] = field(default_factory=list)  # images with 0, 1, … regions
    on_regions: float = 0.0  # images that were trained on them
    images: int = 0
    work: dict[str, int] = field(default_factory=lambda: dict.fromkeys(WORK, 0))
    fill: list[tuple[float, float]] = field(default_factory=list)  # of the encoder's rows, and of the predictor's
    samples: list[torch.Tensor] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    gradient_norm: torch.Tensor | None = None
    fetched: torch.Tensor | None = None  # what came to the host with this step's one copy

    def add(self, loss: torch.Tensor, facts: dict[str, Any], samples: torch.Tensor, broken: list[str]) -> None:
        """Take in one round."""
        tokens = facts["tokens_by_step"]
        self.weight = self.weight + facts["weight"]
        self.loss = self.loss + loss.detach() * facts["weight"]
        self.by_step = self.by_step + torch.stack([facts["loss_by_step"].nan_to_num(0.0) * tokens, tokens])
        counts = facts["region_counts"]
        self.regions = [a + b for a, b in zip(self.regions or [0] * len(counts), counts, strict=True)]
        self.on_regions += facts["region_share"] * len(samples)
        self.images += len(samples)
        self.work = {name: count + facts[name] for name, count in self.work.items()}
        self.fill.append((facts["encoder_fill"], facts["predictor_fill"]))
        self.samples.append(samples)
        self.broken += broken
        self.fetched = self.fetched if facts["fetched"] is None else facts["fetched"]

    def counted(self, stop: bool) -> list[float]:
        """What the host knows of this process's part, to be summed over processes; the inverse of `Counts.of`."""
        return [*self.work.values(), self.images, self.on_regions, len(self.broken), float(stop), *self.regions]


@dataclass(frozen=True)
class Counts:
    """Of a whole step."""

    work: dict[str, float]
    images: float
    on_regions: float
    broken: float
    stop: float
    regions: list[float]

    @classmethod
    def of(cls, numbers: list[float]) -> "Counts":
        work, rest = numbers[: len(WORK)], numbers[len(WORK) :]
        return cls(dict(zip(WORK, work, strict=True)), *rest[:4], rest[4:])


@dataclass(frozen=True)
class Waiting:
    """A step whose line is not written yet."""

    step: int
    samples: int
    now: Now
    figures: Figures
    counted: list[float] | None  # None: they are at the end of `numbers`
    numbers: torch.Tensor  # on the device: loss, sums and tokens by step, weight, gradient norm
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
        screen: "Screen",
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
        own = torch.stack([figures.weight, figures.gradient_norm.to(numbers)])  # the same in every process
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
        sums, tokens, (weight, norm, *counted) = rest[:places], rest[places : 2 * places], rest[2 * places :]
        counts = Counts.of(waiting.counted or counted)
        skipped = not math.isfinite(norm)
        self.done.broken += int(counts.broken)
        self.done.skipped = self.done.skipped + 1 if skipped else 0
        self.stopping = self.stopping or counts.stop > 0
        record = {
            "step": waiting.step,
            "samples": waiting.samples,
            "loss": loss / (weight * self.accelerator.num_processes),
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
        self.screen.step(record)
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


class Screen:
    """A progress bar on a terminal, a line every few seconds elsewhere; silent but in the main process."""

    def __init__(self, total: int, done: int, shown: bool, seconds: float = 20, unit: str = "step") -> None:
        self.total, self.shown, self.seconds, self.unit = total, shown, seconds, unit
        self.first: tuple[float, int] | None = None  # when the first step was shown, and which
        self.last, self.noted = 0.0, time.monotonic()
        self.bar = None
        if shown and sys.stdout.isatty():
            columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}")]
            self.bar = Progress(*columns, TimeRemainingColumn(), TextColumn("left"))
            self.task = self.bar.add_task("", total=total, completed=done)
            self.bar.start()

    def step(self, record: dict[str, Any]) -> None:
        """Show one line of the log."""
        if not self.shown:
            return
        done = record["step"]
        loss = "not finite" if record["loss"] is None else f"{record['loss']:.4f}"
        text = (
            f"loss {loss}  lambda {record['lambda']:.2f}  regions {record['regions_found']:.1f}"
            f"  {record['images_per_second']:.0f} images/s"
        )
        self.show(done, text)

    def show(self, done: int, text: str) -> None:
        """Say how far it is."""
        if not self.shown:
            return
        now = time.monotonic()
        begun, first = self.first = self.first or (now, done)
        if self.bar:
            self.bar.update(self.task, completed=done, description=text)
        elif now - self.last > self.seconds or done == self.total:
            self.last = now
            if done > first:
                hours, rest = divmod(round((now - begun) / (done - first) * (self.total - done)), 3600)
                text += f"  {hours}:{rest // 60:02d}:{rest % 60:02d} left"
            print(f"{self.unit} {done}/{self.total}  {text}", flush=True)

    def note(self, text: str) -> None:
        """What is being done while the steps wait: in the bar's place, or now and then a line."""
        if self.bar:
            self.bar.update(self.task, description=text)
        elif self.shown and time.monotonic() - max(self.last, self.noted) > self.seconds:
            self.noted = time.monotonic()
            print(text, flush=True)

    def say(self, text: str) -> None:
        if self.shown:
            print(text, flush=True)  # rich prints it above the bar

    def close(self) -> None:
        if self.bar:
            self.bar.stop()


def available(trackers: list[str]) -> list[str] | None:
    """The trackers, if all are installed; accelerate would pass over one that is not. None for none."""
    for name in set(trackers) - {str(tracker) for tracker in get_available_trackers()}:
        raise UserError(f"watch.trackers: {name} is not installed: pip install {name}.")
    return trackers or None


def records(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; one that was cut off by a kill is left out, with all behind it."""
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def graphs() -> int:
    """How many graphs torch.compile has made so far: a number that goes on growing is time lost."""
    dynamo = sys.modules.get("torch._dynamo")
    return dynamo.utils.counters["stats"]["unique_graphs"] if dynamo else 0


def memory() -> float:
    """Most memory that was in use so far, in MiB: of the GPU, or of the process (0 on Windows, which does not tell)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if resource is None:
        return 0.0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 2**20 if sys.platform == "darwin" else most / 2**10


def reopened(path: Path, last_step: int):
    """The log, open for more, without the lines of steps that will be done again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [line for line in records(path) if line["step"] <= last_step] if path.exists() else []
    fresh = path.with_suffix(".new")
    fresh.write_text("".join(json.dumps(line) + "\n" for line in kept))
    os.replace(fresh, path)
    return path.open("a")
