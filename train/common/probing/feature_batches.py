"""Batches of features and labels that heads are trained on, and features of a split that they are tested on.

`LiveFeatures` runs the backbone on fresh augmentations, each process on its share of a batch; `StoredFeatures` reads
the feature cache. Either way every process gets the complete batch: all train the same heads, and batch statistics are
those of the complete batch.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch.utils.data import Dataset, Subset
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.functional import hflip, pil_to_tensor, resized_crop

from timm_dseq import UserError

from ..data.digests import Pictures, collate_pictures
from ..data.order import DistributedBatchSampler, sample_seed, samples_at, seeded
from ..data.source import Source
from ..data.unreadable import batches_of_all
from ..labels.subsets import select_rows
from .feature_cache import CachedFeatures, eval_transform
from .heads import TOKENS, HeadTraining
from .probe_run import ProbeRun

Views = dict[str, torch.Tensor]  # view → (B, its width), or TOKENS → (B, N, D)
_AHEAD = 2  # batches that are read while the heads train on another
_ROWS = 4096  # of stored features that are tested together


class RandomCrops(Dataset):
    """`crops[epoch, index]`: a random crop, flipped in half of the cases, (3, H, W) uint8, and its label."""

    def __init__(self, source: Source, size: tuple[int, int], interpolation: str, seed: int) -> None:
        self.source, self.size, self.seed = source, list(size), seed
        self.interpolation = InterpolationMode(interpolation)

    def __getitem__(self, sample: tuple[int, int]) -> tuple[torch.Tensor, int]:
        _, index = sample
        picture = self.source.picture(index)
        with seeded(sample_seed(self.seed, *sample)):
            box = RandomResizedCrop.get_params(picture, (0.08, 1.0), (3 / 4, 4 / 3))
            flip = torch.rand(1).item() < 0.5
        crop = resized_crop(picture, *box, self.size, self.interpolation)
        return pil_to_tensor(hflip(crop) if flip else crop), int(self.source.truth[index])


class LiveFeatures:
    """The backbone on augmented images of the training split."""

    def __init__(self, training: HeadTraining, train: Source, probe: ProbeRun) -> None:
        self.training, self.probe = training, probe
        self.source = select_rows(train, torch.from_numpy(training.rows))
        batch, processes = training.batch, probe.accelerator.num_processes
        if batch % processes:
            raise UserError(f"heads.batch_size={batch} is no multiple of {processes} processes.")
        share, most = batch // processes, probe.config.heads.at_once
        self.micro_batch = next(size for size in range(min(share, most), 0, -1) if share % size == 0)

    def width(self, view: str) -> int:
        """Numbers that a head on this view reads: of an image, or of a token."""
        if view == TOKENS:
            return self.probe.backbone.token_width(self.probe.preprocessing["input_size"])
        return self.probe.layout.width_of(view)

    def batches(self, start: int) -> Iterator[tuple[Views, torch.Tensor]]:
        """Features by view and labels (B,) of each step from `start` on, without end."""
        accelerator, preprocessing = self.probe.accelerator, self.probe.preprocessing
        rank, processes = accelerator.process_index, accelerator.num_processes
        seed, batch, images = self.training.seed, self.training.batch, len(self.source)
        sampler = DistributedBatchSampler(seed, images, batch, self.micro_batch, rank, processes, start * batch)
        crops = RandomCrops(self.source, preprocessing["input_size"][1:], preprocessing["interpolation"], seed)
        pinned = accelerator.device.type == "cuda"
        loader = batches_of_all(crops, batch_sampler=sampler, num_workers=self.probe.config.workers, pin_memory=pinned)
        checked = False
        while True:
            parts, labels = [], []
            for _ in range(batch // self.micro_batch // processes):
                images, own = next(loader)
                parts.append(accelerator.gather(self._features(images)))
                labels.append(accelerator.gather(own.to(accelerator.device)))
            features = torch.cat(parts)
            if not checked and not features.isfinite().all():
                raise UserError("the features are not finite: check the weights, or use --precision no.")
            checked = True
            yield self._by_view(features), torch.cat(labels)

    def tested(self, source: Source, rows: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, Views]]:
        """This process's share of these rows (None: all) of a split, without augmentation: places, features by view."""
        accelerator = self.probe.accelerator
        source = source if rows is None else select_rows(source, torch.from_numpy(rows))
        mine = range(accelerator.process_index, len(source), accelerator.num_processes)
        batches = batches_of_all(
            Subset(Pictures(source, eval_transform(self.probe.preprocessing)), mine),
            collate_pictures,
            batch_size=self.probe.config.heads.at_once,
            num_workers=self.probe.config.workers,
            pin_memory=accelerator.device.type == "cuda",
        )
        for indices, images, _ in batches:
            yield indices, self._by_view(self._features(images))

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, H, W) → rows (B, width) or, for heads that read tokens, (B, N, D)."""
        backbone = self.probe.backbone
        images = images.to(self.probe.accelerator.device, non_blocking=True)
        with self.probe.accelerator.autocast():
            if TOKENS in self.training.views:
                return backbone.tokens(images).float()
            return self.probe.layout.rows(backbone.features(images)).float()

    def _by_view(self, features: torch.Tensor) -> Views:
        if TOKENS in self.training.views:
            return {TOKENS: features}
        return {view: self.probe.layout.view(features, view) for view in self.training.views}


class StoredFeatures:
    """The feature cache of the training split."""

    def __init__(self, training: HeadTraining, train: CachedFeatures, device: torch.device) -> None:
        self.training, self.train, self.layout, self.device = training, train, train.layout, device
        self.columns = self.layout.span(training.views)  # those of the cache that are read

    def width(self, view: str) -> int:
        """Numbers that a head on this view reads."""
        return self.layout.width_of(view)

    def batches(self, start: int) -> Iterator[tuple[Views, torch.Tensor]]:
        """Features by view and labels (B,) of each step from `start` on, without end; the next ones are read ahead."""
        with ThreadPoolExecutor(1) as pool:
            ahead: deque = deque()
            step = start
            while True:
                while len(ahead) <= _AHEAD:
                    ahead.append(pool.submit(self._read, self.train, self._rows_of(step)))
                    step += 1
                features, labels = ahead.popleft().result()
                yield self._by_view(features), labels.to(self.device, non_blocking=True)

    def tested(self, split: CachedFeatures, rows: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, Views]]:
        """These rows (None: all) of a split, in every process: places, features by view."""
        rows = np.arange(len(split.rows)) if rows is None else rows
        for start in range(0, len(rows), _ROWS):
            features, _ = self._read(split, rows[start : start + _ROWS])
            yield np.arange(start, start + len(features)), self._by_view(features)

    def _rows_of(self, step: int) -> np.ndarray:
        """The training rows of a step (B,): the samples that `LiveFeatures` takes, too."""
        batch, rows = self.training.batch, self.training.rows
        samples = samples_at(self.training.seed, step * batch, batch, len(rows))  # (epoch, place in the rows)
        return rows[samples[:, 1].numpy()]

    def _read(self, split: CachedFeatures, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        return split.read(rows, self.columns), split.labels[rows]

    def _by_view(self, features: torch.Tensor) -> Views:
        features = features.to(self.device, non_blocking=True).float()
        return {view: self.layout.view(features, view, self.columns.start) for view in self.training.views}
