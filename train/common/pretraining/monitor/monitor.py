"""Monitors the encoders while they learn: probes, signs of a collapse, pictures of saliency and regions."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from timm_dseq import rank_regions

from ...data.crops import normalised
from ...data.source import Source
from ...run.log import records
from ...system.screen import Screen
from ..precision import Precision
from ..settings import Config
from .images import BATCH, Shared, in_order, picture_images, probe_images, sources
from .pictures import save_sheet
from .probes import Phase, moments, phase, probe


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
        found = {encoder: self._probe(encoder) for encoder in ("target", "student")}
        if not self.accelerator.is_main_process:
            return {}
        target, student = found["target"], found["student"]
        figures = {**target, "student": {name: student[name] for name in ("knn", "linear", "rank_me")}}
        before = self._before if step else figures
        if words := phase(figures, before, step):
            figures["collapse" if words.collapse else "phase"] = words.sign
        self._show(step, figures, words)
        if not step:
            self._before = figures
        return {"probe" if step else "probe_before": figures}

    @cached_property
    def _before(self) -> dict[str, Any] | None:
        """What was found before the first step: of a run that was resumed, its log says it."""
        log = Path(self.config.output_dir) / "log.jsonl"
        return next((line.get("probe_before") for line in records(log)[:1]), None) if log.exists() else None

    def _probe(self, encoder: str) -> dict[str, Any]:
        """The figures of an encoder's features, in the main process; all have to call it."""
        train, tokens, sums = self._features(self.train, encoder)
        test, _, _ = self._features(self.test, encoder)
        train, tokens = (in_order(part, self.train.count, self.accelerator) for part in (train, tokens))
        test = in_order(test, self.test.count, self.accelerator)
        sums = self.accelerator.reduce(sums, "sum")
        if not self.accelerator.is_main_process:
            return {}
        return probe(train, self.train.labels, test, self.test.labels, tokens, sums)

    def _show(self, step: int, figures: dict[str, Any], words: Phase | None) -> None:
        """On the screen."""
        if figures["knn"] is not None:
            student = figures["student"]["knn"]
            chance = self.test.labels.bincount().max() / len(
                self.test.labels
            )  # as of an answer that is always the same
            self.screen.say(
                f"after step {step}: kNN {figures['knn']:.1%}, linear {figures['linear']:.1%} (chance {chance:.1%}), "
                f"RankMe {figures['rank_me']:.1f} (tokens {figures['rank_me_tokens']:.1f}), "
                f"feature std {figures['feature_std']:.3f}; of the tokens' variance {figures['share_image']:.0%} is "
                f"the image's mean and {figures['share_place']:.0%} the place"
                + (f"; student: kNN {student:.1%}" if student is not None else "")
            )
        if words:
            self.screen.say(f"after step {step}: {words.sign}. {words.advice}")

    def _features(self, part: Shared, encoder: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean patch features (n, D), float32, of this process's images; one token of each, (n, D); the `moments` of
        all tokens, of each image once."""
        means, tokens, sums, images = [], [], 0.0, part.images
        for start in range(0, len(images), BATCH):
            features = self._encode(images[start : start + BATCH], encoder)[0].float()
            of_batch = torch.arange(len(features), device=features.device)
            index = self.accelerator.process_index + self.accelerator.num_processes * (start + of_batch)  # among all
            means.append(features.mean(1))
            tokens.append(features[of_batch, index % features.shape[1]])
            sums = sums + moments(features, index < part.count)
            self.screen.note(f"probing: {encoder}'s features of {start + len(features)} of {len(images)} images")
        return torch.cat(means), torch.cat(tokens), sums

    @torch.no_grad()
    def _encode(self, images: torch.Tensor, encoder: str = "target") -> tuple[torch.Tensor, torch.Tensor]:
        """An encoder's patch tokens (n, N, D) and saliency (n, h, w)."""
        images = normalised(images.to(self.accelerator.device), self.precision.dtype)
        with self.precision.autocast():  # FSDP's wrapper does not switch it on, DDP's does
            return self.model(images, encode=encoder)

    def _draw(self, step: int) -> None:
        """The sheet of this step. All processes compute, as FSDP needs it; the main one writes."""
        saliency = torch.cat([self._encode(images)[1].float().cpu() for images in self.pictures.split(BATCH)])
        if self.accelerator.is_main_process:
            regions = rank_regions(saliency, self.config.model.num_regions, self.config.model.min_area)
            save_sheet(self.folder / f"step-{step:08d}.png", self.pictures, saliency, regions)
