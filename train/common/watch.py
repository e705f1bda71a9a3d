"""Looking at the target encoder while it learns: probes, signs of collapse, and pictures of what it finds salient."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision.transforms.v2 import CenterCrop, Compose, PILToTensor, Resize

from timm_dseq import rank_regions
from timm_dseq.explain import draw_regions, draw_saliency

from .config import Config
from .data import Source, load, normalised, open_source, source_of, test_split
from .precision import Precision
from .record import Screen

_BATCH = 64
_CELL = 160  # pixels of one picture on the sheet


class Watch:
    """Probes and pictures of one run, on images that stay the same."""

    def __init__(
        self, config: Config, accelerator: Accelerator, model: nn.Module, precision: Precision, screen: Screen
    ) -> None:
        self.config, self.accelerator, self.model, self.screen = config, accelerator, model, screen
        self.precision = precision
        self.folder = Path(config.output_dir) / "pictures"
        self.learned = self.tested = None  # (images, labels)
        if config.dry_run:
            return
        train, test, why_off = _probe_sources(config)
        if why_off:
            screen.say(f"probes: off, {why_off}")
        if config.watch.pictures_every:
            count = min(config.watch.pictures, len(test))
            self.shown = _pixels(test, range(count), config.model.img_size)
        if config.watch.probe_every and not why_off:
            self.learned, self.tested = _probe_images(config, train, test)

    def due(self, step: int) -> bool:
        watch = self.config.watch
        return any(every and step % every == 0 for every in (watch.probe_every, watch.pictures_every))

    def look(self, step: int) -> dict[str, Any]:
        """What is found after a step: {"probe": {…}}, for the log. All processes have to call it."""
        if self.config.dry_run:
            return {}
        watch = self.config.watch
        if watch.pictures_every:
            self._draw(step)
        if not self.learned:
            return {}
        features, labels, tested, truth = (x for part in (self.learned, self.tested) for x in self._features(*part))
        if not features.isfinite().all():
            self.screen.say(f"after step {step}: the features are not finite. See docs/pretraining.md.")
            nothing = dict.fromkeys(("knn", "linear", "rank_me", "feature_std"))
            return {"probe": {**nothing, "collapse": "the features are not finite"}}
        near, far = whitened(features, tested)
        found = {
            "knn": knn(near, labels, far, truth),
            "linear": linear(features, labels, tested, truth),
            "rank_me": rank_me(features),
            "feature_std": feature_std(features),
        }
        self.screen.say(
            f"after step {step}: kNN {found['knn']:.1%}, linear {found['linear']:.1%}, RankMe {found['rank_me']:.1f}, "
            f"feature std {found['feature_std']:.3f}"
        )
        if sign := collapse(found):
            self.screen.say(f"after step {step}: {sign}: a collapse. See docs/pretraining.md.")
            found["collapse"] = sign
        return {"probe": found}

    def _features(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean patch features (n, D), float32 on the host, and the labels."""
        means = []
        for part in images.split(_BATCH):
            means.append(self._look(part)[0].float().mean(1).cpu())
            self.screen.note(f"probing: features of {sum(map(len, means))} of {len(images)} images")
        return torch.cat(means), labels

    @torch.no_grad()
    def _look(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        images = normalised(images.to(self.accelerator.device), self.precision.dtype)
        with self.precision.autocast():  # FSDP does not bring it
            return self.model(images, look=True)

    def _draw(self, step: int) -> None:
        """One sheet: each image with its saliency and its ranked regions below."""
        saliency = torch.cat([self._look(images)[1].float().cpu() for images in self.shown.split(_BATCH)])
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


def knn(learned: torch.Tensor, labels: torch.Tensor, tested: torch.Tensor, truth: torch.Tensor, k: int = 20) -> float:
    """Accuracy of the k nearest by cosine, votes weighted by exp(similarity / 0.07)."""
    similarity = F.normalize(tested, dim=1) @ F.normalize(learned, dim=1).T
    nearest, which = similarity.topk(min(k, len(learned)), dim=1)
    votes = torch.zeros(len(tested), int(labels.max()) + 1).scatter_add(1, labels[which], (nearest / 0.07).exp())
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
    weights = torch.zeros(classes, x.shape[1] + 1, requires_grad=True)
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


def _probe_sources(config: Config) -> tuple[Source, Source, str | None]:
    """What probes learn from, what they are tested on, and why there are none."""
    data = config.data
    if data.streaming:
        return _first_of_stream(config)
    train = open_source(data)
    split = data.probe_split or ("test" if data.path == "scenes" else test_split(data.path, data.config))
    test = open_source(data, split) if split and split != data.split else train
    off = None
    if train.label is None or test.label is None:
        off = "the data set has no labels (data.label names their column)"
    return train, test, off


def _first_of_stream(config: Config) -> tuple[Source, Source, str | None]:
    """The first images of a stream, as both: nothing else of it can be had without reading on."""
    count = max(2 * config.watch.probe_images * bool(config.watch.probe_every), config.watch.pictures)
    rows = load(config.data, config.data.split, streaming=True)
    source = source_of(config.data, rows, list(rows.take(count)))
    return source, source, None if source.label else "the data set has no labels (data.label names their column)"


def _probe_images(config: Config, train: Source, test: Source) -> tuple[tuple, tuple]:
    """Evenly spaced images and labels of both; without a test split, others of the training split."""
    count, size = config.watch.probe_images, config.model.img_size
    if train is test:
        wanted = [int(i) for i in torch.linspace(0, len(train) - 1, min(2 * count, len(train)))]
        choices = (train, wanted[::2]), (train, wanted[1::2])
    else:
        choices = tuple(
            (source, [int(i) for i in torch.linspace(0, len(source) - 1, min(count, len(source)))])
            for source in (train, test)
        )
    return tuple((_pixels(source, wanted, size), source.labels(wanted)) for source, wanted in choices)


def _pixels(source: Source, indices, size: int) -> torch.Tensor:
    """The centre of images, as the evaluation sees it: (n, 3, S, S) uint8."""
    resize = Compose([Resize(round(size / 0.875), interpolation=3), CenterCrop(size), PILToTensor()])
    return torch.stack([resize(source.picture(index)) for index in indices])
