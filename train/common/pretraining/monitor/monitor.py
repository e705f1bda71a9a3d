"""Looking at the target encoder while it learns: probes, signs of collapse, and pictures of what it finds salient."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn
from torch.nn import functional as F

from timm_dseq import rank_regions
from timm_dseq.explain import draw_regions, draw_saliency

from ...data.source import normalised
from ...system.screen import Screen
from ..precision import Precision
from ..settings import Config
from .images import BATCH, in_order, picture_images, probe_images, sources

_CELL = 160  # pixels of one picture on the sheet


class Watch:
    """Probes and pictures of one run, on images that stay the same."""

    def __init__(
        self, config: Config, accelerator: Accelerator, model: nn.Module, precision: Precision, screen: Screen
    ) -> None:
        self.config, self.accelerator, self.model, self.screen = config, accelerator, model, screen
        self.precision = precision
        self.folder = Path(config.output_dir) / "pictures"
        self.learned = self.tested = None  # what probes learn from, and what they are tested on
        if config.dry_run:
            return
        train, test, why_off = sources(config)
        if why_off:
            screen.say(f"probes: off, {why_off}")
        if config.watch.pictures_every:
            self.shown = picture_images(config, test)
        if config.watch.probe_every and not why_off:
            self.learned, self.tested = probe_images(config, train, test, accelerator, screen)

    def due(self, step: int) -> bool:
        watch = self.config.watch
        return any(every and step % every == 0 for every in (watch.probe_every, watch.pictures_every))

    def look(self, step: int) -> dict[str, Any]:
        """What is found after a step, in the main process: {"probe": {…}}, for the log. All processes have to call it.

        Each computes the features of its share; the main one judges, on its device.
        """
        if self.config.dry_run:
            return {}
        if self.config.watch.pictures_every:
            self._draw(step)
        if not self.learned:
            return {}
        features, tested = (
            in_order(self._features(part.images), part.count, self.accelerator) for part in (self.learned, self.tested)
        )
        if not self.accelerator.is_main_process:
            return {}
        if not features.isfinite().all():
            self.screen.say(f"after step {step}: the features are not finite. See docs/pretraining.md.")
            nothing = dict.fromkeys(("knn", "linear", "rank_me", "feature_std"))
            return {"probe": {**nothing, "collapse": "the features are not finite"}}
        found = judged(features, self.learned.labels, tested, self.tested.labels)
        self.screen.say(
            f"after step {step}: kNN {found['knn']:.1%}, linear {found['linear']:.1%}, RankMe {found['rank_me']:.1f}, "
            f"feature std {found['feature_std']:.3f}"
        )
        if sign := collapse(found):
            self.screen.say(f"after step {step}: {sign}: a collapse. See docs/pretraining.md.")
            found["collapse"] = sign
        return {"probe": found}

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        """Mean patch features (n, D), float32."""
        means = []
        for part in images.split(BATCH):
            means.append(self._look(part)[0].float().mean(1))
            self.screen.note(f"probing: features of {sum(map(len, means))} of {len(images)} images")
        return torch.cat(means)

    @torch.no_grad()
    def _look(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        images = normalised(images.to(self.accelerator.device), self.precision.dtype)
        with self.precision.autocast():  # FSDP does not bring it
            return self.model(images, look=True)

    def _draw(self, step: int) -> None:
        """One sheet: each image with its saliency and its ranked regions below."""
        saliency = torch.cat([self._look(images)[1].float().cpu() for images in self.shown.split(BATCH)])
        if not self.accelerator.is_main_process:
            return
        regions = rank_regions(saliency, self.config.model.num_regions, self.config.model.min_area)
        sheet = Image.new("RGB", (len(saliency) * (_CELL + 4) - 4, 3 * (_CELL + 4) - 4), "white")
        for i, pixels in enumerate(self.shown):
            photo = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((_CELL, _CELL), Image.Resampling.BICUBIC)
            rows = photo, draw_saliency(photo, saliency[i]), draw_regions(photo, regions, i)
            for row, picture in enumerate(rows):
                sheet.paste(picture, (i * (_CELL + 4), row * (_CELL + 4)))
        self.folder.mkdir(parents=True, exist_ok=True)
        sheet.save(self.folder / f"step-{step:08d}.png")


def judged(learned: torch.Tensor, labels: torch.Tensor, tested: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    """All figures of features (n, D) float32, on CUDA or else on the CPU."""
    device = learned.device if learned.is_cuda else torch.device("cpu")
    learned, labels, tested, truth = (x.to(device) for x in (learned, labels, tested, truth))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # TF32 would stop the line search early
    try:
        near, far = whitened(learned, tested)
        return {
            "knn": knn(near, labels, far, truth),
            "linear": linear(learned, labels, tested, truth),
            "rank_me": rank_me(learned),
            "feature_std": feature_std(learned),
        }
    finally:
        torch.set_float32_matmul_precision(before)


def knn(learned: torch.Tensor, labels: torch.Tensor, tested: torch.Tensor, truth: torch.Tensor, k: int = 20) -> float:
    """Accuracy of the k nearest by cosine, votes weighted by exp(similarity / 0.07)."""
    similarity = F.normalize(tested, dim=1) @ F.normalize(learned, dim=1).T
    nearest, which = similarity.topk(min(k, len(learned)), dim=1)
    votes = torch.zeros(len(tested), int(labels.max()) + 1, device=tested.device)
    votes = votes.scatter_add(1, labels[which], (nearest / 0.07).exp())
    return (votes.argmax(1) == truth).float().mean().item()


def whitened(learned: torch.Tensor, tested: torch.Tensor, dims: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """Both (n, D) along the leading directions of the first, each of unit variance: (n, dims), or fewer.

    Young features are dominated by a few directions, mean colours above all, and a plain kNN would see nothing else.
    """
    mean = learned.mean(0)
    _, values, directions = torch.linalg.svd(learned - mean, full_matrices=False)
    count = min(dims, int((values > 1e-5 * values[0]).sum()))
    basis = directions[:count].T / values[:count]
    return (learned - mean) @ basis, (tested - mean) @ basis


def linear(learned: torch.Tensor, labels: torch.Tensor, tested: torch.Tensor, truth: torch.Tensor) -> float:
    """Accuracy of logistic regression on standardised features, with a little weight decay."""
    mean, std = learned.mean(0), learned.std(0).clamp(min=1e-6)
    x, classes = (learned - mean) / std, int(labels.max()) + 1
    weights = torch.zeros(classes, x.shape[1] + 1, device=x.device, requires_grad=True)
    solver = torch.optim.LBFGS([weights], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        solver.zero_grad()
        value = F.cross_entropy(F.linear(x, weights[:, :-1], weights[:, -1]), labels)
        value = value + 1e-3 * weights[:, :-1].square().sum()
        value.backward()
        return value

    solver.step(loss)
    scores = F.linear((tested - mean) / std, weights[:, :-1], weights[:, -1])
    return (scores.argmax(1) == truth).float().mean().item()


def rank_me(features: torch.Tensor) -> float:
    """Effective number of dimensions: exp of the entropy of the normalised singular values (Garrido et al., 2023)."""
    values = torch.linalg.svdvals(features.double())
    share = values / values.sum().clamp(min=1e-12)
    return torch.special.entr(share).sum().exp().item()


def feature_std(features: torch.Tensor) -> float:
    """Spread of the features over images, as a share of their length; 0 when all images look alike."""
    centred = features - features.mean(0)
    return (centred.square().sum(1).mean() / features.square().sum(1).mean().clamp(min=1e-12)).sqrt().item()


def collapse(found: dict[str, float]) -> str | None:
    """Words for features that tell nothing apart, or None."""
    if not found["feature_std"] > 0.01:
        return f"all images look alike (feature std {found['feature_std']:.4f})"
    if found["rank_me"] < 2:
        return f"they use {found['rank_me']:.1f} dimensions"
    return None
