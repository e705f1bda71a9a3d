"""Monitors the target encoder while it learns: probes, signs of a collapse, pictures of its saliency and regions."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from timm_dseq import rank_regions

from ...data.crops import normalised
from ...data.source import Source
from ...system.screen import Screen
from ..precision import Precision
from ..settings import Config
from .images import BATCH, in_order, picture_images, probe_images, sources
from .pictures import save_sheet
from .probes import collapse, probe


class Monitor:
    """Probes and pictures of one run, on images that stay the same."""

    def __init__(
        self,
        config: Config,
        source: Source | None,
        accelerator: Accelerator,
        model: nn.Module,
        precision: Precision,
        screen: Screen,
    ) -> None:
        """source: the training split; None for a stream. model: wrapped for all processes, as a step calls it."""
        self.config, self.accelerator, self.model, self.screen = config, accelerator, model, screen
        self.precision = precision
        self.folder = Path(config.output_dir) / "pictures"
        self.train = self.test = None  # the images that probes learn from, and those that they are tested on
        train, test, why_off = sources(config, source)
        if why_off:
            screen.say(f"probes: off, {why_off}")
        if config.watch.pictures_every:
            self.pictures = picture_images(config, test, screen)
        if config.watch.probe_every and not why_off:
            self.train, self.test = probe_images(config, train, test, accelerator, screen)

    def due(self, step: int) -> bool:
        """Whether this step is one of those that are measured at intervals."""
        watch = self.config.watch
        return any(every and step % every == 0 for every in (watch.probe_every, watch.pictures_every))

    def measure(self, step: int) -> dict[str, Any]:
        """Draw the pictures after a step, and probe: {"probe": {…}} for the log, in the main process. Before the first
        step it is {"probe_before": {…}}. All processes have to call it: each computes the features of its share of the
        images."""
        if self.config.watch.pictures_every:
            self._draw(step)
        if not self.train:
            return {}
        train, test = (
            in_order(self._features(part.images), part.count, self.accelerator) for part in (self.train, self.test)
        )
        if not self.accelerator.is_main_process:
            return {}
        return {"probe" if step else "probe_before": self._probe(step, train, test)}

    def _probe(self, step: int, train: torch.Tensor, test: torch.Tensor) -> dict[str, Any]:
        """The figures of features (n, D), which are also shown."""
        if not train.isfinite().all():
            self.screen.say(f"after step {step}: the features are not finite. See docs/pretraining.md.")
            nothing = dict.fromkeys(("knn", "linear", "rank_me", "feature_std"))
            return {**nothing, "collapse": "the features are not finite"}
        figures = probe(train, self.train.labels, test, self.test.labels)
        self.screen.say(
            f"after step {step}: kNN {figures['knn']:.1%}, linear {figures['linear']:.1%}, "
            f"RankMe {figures['rank_me']:.1f}, feature std {figures['feature_std']:.3f}"
        )
        if sign := collapse(figures):
            self.screen.say(f"after step {step}: {sign}: a collapse. See docs/pretraining.md.")
            figures["collapse"] = sign
        return figures

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        """Mean patch features (n, D), float32, of images (n, 3, S, S) uint8."""
        means = []
        for part in images.split(BATCH):
            means.append(self._encode(part)[0].float().mean(1))
            self.screen.note(f"probing: features of {sum(map(len, means))} of {len(images)} images")
        return torch.cat(means)

    @torch.no_grad()
    def _encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The target's patch tokens (n, N, D) and saliency (n, h, w)."""
        images = normalised(images.to(self.accelerator.device), self.precision.dtype)
        with self.precision.autocast():  # FSDP's wrapper does not switch it on, DDP's does
            return self.model(images, target_only=True)

    def _draw(self, step: int) -> None:
        """The sheet of this step. All processes compute, as FSDP needs it; the main one writes."""
        saliency = torch.cat([self._encode(images)[1].float().cpu() for images in self.pictures.split(BATCH)])
        if self.accelerator.is_main_process:
            regions = rank_regions(saliency, self.config.model.num_regions, self.config.model.min_area)
            save_sheet(self.folder / f"step-{step:08d}.png", self.pictures, saliency, regions)
