"""The log of a pretraining run: what its lines hold, and when the run is ended."""

import json
import sys
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from timm_dseq import DSeqJEPA, UserError

from ..run.log import Step, StepLog
from ..run.resume import Progress
from ..system.command_line import flat
from ..system.screen import Screen
from .figures import Figures
from .precision import Precision
from .schedule import Now
from .settings import Config
from .utilisation import WORK, Utilisation, matrix_rate


class PretrainingLog(StepLog):
    """The log of a pretraining run, which also counts images that cannot be read."""

    shown: ClassVar = {"lambda": "lambda {:.2f}", "regions_found": "regions {:.1f}"}

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        model: DSeqJEPA,
        precision: Precision,
        progress: Progress,
        screen: Screen,
    ) -> None:
        self.utilisation = Utilisation(model)
        self.rate = matrix_rate(accelerator.device, precision.product_dtype) * accelerator.num_processes
        self.with_regions, self.predicts = model.with_regions, model.predicts
        self._warned = False  # of an image that cannot be read
        if config.watch.trackers:
            settings = {name: str(value) for name, value in flat(asdict(config)).items()}
            accelerator.init_trackers(config.watch.project, settings)
        super().__init__(config, accelerator, progress, screen)

    def add(self, now: Now, figures: Figures, stop: bool) -> None:
        """Take a step's figures; its line is written when the next one is added."""
        counts = {
            "tokens": figures.count,
            "images": figures.images,
            "on_regions": figures.on_regions,
            "broken": len(figures.broken),
            **figures.work,
            **{f"with {i} regions": images for i, images in enumerate(figures.regions)},
        }
        losses = torch.stack([figures.loss, *figures.losses.values()])
        sums = torch.cat([losses, figures.by_step.flatten()])
        self.push((now, figures), sums, counts, figures.gradient_norm, stop, figures.fetched)

    def line(self, step: Step, sums: list[float], counts: dict[str, float]) -> dict[str, Any]:
        """sums: the loss and what it is made of, then the losses and the numbers of target tokens of each step of the
        sequences."""
        (now, figures), images = step.facts, counts["images"]
        loss, parts, by_step = sums[0], sums[1 : 1 + len(figures.losses)], sums[1 + len(figures.losses) :]
        losses, tokens = by_step[: len(by_step) // 2], by_step[len(by_step) // 2 :]
        regions = [counts[f"with {i} regions"] for i in range(len(figures.regions))]
        work = {name: counts[name] for name in WORK}
        mean_regions = sum(i * count for i, count in enumerate(regions)) / max(1.0, sum(regions))
        self.progress.broken += int(counts["broken"])
        return {
            "loss": loss / counts["tokens"],
            "losses": {name: part / counts["tokens"] for name, part in zip(figures.losses, parts, strict=True)},
            "loss_by_step": [part / count if count else None for part, count in zip(losses, tokens, strict=True)],
            "lr": now.lr,
            "weight_decay": now.weight_decay,
            "momentum": now.momentum,
            "lambda": now.regions if self.with_regions else None,
            "region_share": counts["on_regions"] / images if self.with_regions else None,
            "region_counts": [int(count) for count in regions],
            "regions_found": mean_regions if self.with_regions else None,
            "broken": self.progress.broken,
            **{f"{part}_fill": self._fill(figures, i) for i, part in enumerate(("encoder", "predictor"))},
            "mfu": self.utilisation.flops(images, work) / step.seconds / self.rate,
            "graphs": graphs(),
        }

    def _fill(self, figures: Figures, part: int) -> float | None:
        """Mean fill of the rows of the encoder (0) or the predictor (1); None where nothing is predicted."""
        return sum(fill[part] for fill in figures.fill) / len(figures.fill) if self.predicts else None

    def check(self, step: Step) -> None:
        """End a run that cannot read its images, or learns nothing."""
        _, figures = step.facts
        if figures.broken:
            self._list_unreadable(figures.broken)
        if self.progress.broken > self.config.data.max_broken * max(step.samples, 1000):
            raise UserError(
                f"{self.progress.broken} of {step.samples} images cannot be read, more than data.max_broken="
                f"{self.config.data.max_broken}: see {self.folder / 'unreadable.txt'}."
            )
        super().check(step)

    def advice(self, step: Step) -> str:
        """Write down which images the last step had."""
        file = self.folder / f"not_finite-{self.accelerator.process_index}.json"
        _, figures = step.facts
        file.write_text(
            json.dumps({"step": step.number, "epoch_and_index": torch.cat(figures.samples).tolist()}), encoding="utf-8"
        )
        return f"look at the images named in {file}, lower optim.lr"

    def _list_unreadable(self, lines: list[str]) -> None:
        """Add them to a file, and say so once."""
        path = self.folder / "unreadable.txt"
        self.folder.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
        if not self._warned:
            self._warned = True
            self.screen.say(
                f"an image cannot be read and is replaced by another: {lines[0]}. All such are listed in {path}."
            )


def available(trackers: list[str]) -> list[str] | None:
    """The trackers, if all are installed (accelerate would ignore a missing one); None for none."""
    for name in set(trackers) - {str(tracker) for tracker in get_available_trackers()}:
        raise UserError(f"watch.trackers: {name} is not installed: pip install {name}.")
    return trackers or None


def graphs() -> int:
    """How many graphs torch.compile has made so far. A number that keeps growing is time lost."""
    dynamo = sys.modules.get("torch._dynamo")
    return dynamo.utils.counters["stats"]["unique_graphs"] if dynamo else 0
