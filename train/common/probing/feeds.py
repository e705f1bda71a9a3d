"""What heads learn from: batches of features by view, with labels, from any step of a run on.

`Live` runs the backbone on fresh augmentations, each process on its share of a batch; `Stored` reads features that were
computed once. Either way every process gets the whole batch, so that all train the same heads and batch statistics are
those of the batch.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import Dataset, Subset
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.functional import hflip, pil_to_tensor, resized_crop

from timm_dseq import UserError

from ..data.digests import Pictures, collate_pictures
from ..data.order import DistributedBatchSampler, order, sample_seed, seeded
from ..data.source import Source
from ..data.unreadable import batches_of_all
from ..labels.subsets import select_rows
from .extract import Extracted, eval_transform
from .features import Frozen
from .heads import TOKENS
from .task import Task

Views = dict[str, torch.Tensor]
_AHEAD = 2  # batches that are read while the heads learn from another
_ROWS = 4096  # of features that are judged together


class Augmented(Dataset):
    """`augmented[epoch, index]`: random crop, flipped by a coin, (3, H, W) uint8; the label."""

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


class Live:
    """The backbone on augmented images. `source` has the seed's rows only."""

    def __init__(self, task: Task, source: Source, views: list[str], seed: int, batch: int) -> None:
        self.task, self.source, self.views, self.seed, self.batch = task, source, views, seed, batch
        self.images = len(source)
        self.layout = task.layout
        processes = task.accelerator.num_processes
        if batch % processes:
            raise UserError(f"heads.batch_size={batch} is no multiple of {processes} processes.")
        share, most = batch // processes, task.config.heads.at_once
        self.micro_batch = next(size for size in range(min(share, most), 0, -1) if share % size == 0)

    def width(self, view: str) -> int:
        if view == TOKENS:
            size = self.task.preprocessing["input_size"]
            return self.task.frozen.tokens(_blank(size, self.task.accelerator)).shape[-1]
        return self.layout.width_of(view)

    def batches(self, start: int) -> Iterator[tuple[Views, torch.Tensor]]:
        """From step `start` on, without end."""
        accelerator, preprocessing = self.task.accelerator, self.task.preprocessing
        rank, processes = accelerator.process_index, accelerator.num_processes
        sampler = DistributedBatchSampler(
            self.seed, self.images, self.batch, self.micro_batch, rank, processes, start * self.batch
        )
        crops = Augmented(self.source, preprocessing["input_size"][1:], preprocessing["interpolation"], self.seed)
        pinned = accelerator.device.type == "cuda"
        loader = batches_of_all(crops, batch_sampler=sampler, num_workers=self.task.config.workers, pin_memory=pinned)
        checked = False
        while True:
            parts, labels = [], []
            for _ in range(self.batch // self.micro_batch // processes):
                images, own = next(loader)
                parts.append(accelerator.gather(self._look(images)))
                labels.append(accelerator.gather(own.to(accelerator.device)))
            features = torch.cat(parts)
            if not checked and not features.isfinite().all():
                raise UserError("the features are not finite: check the weights, or use --precision no.")
            checked = True
            yield self._views(features), torch.cat(labels)

    def judged(self, source: Source, rows: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, Views]]:
        """This process's share of these rows (None: all) of a split, without augmentation: places, features by view."""
        accelerator = self.task.accelerator
        source = source if rows is None else select_rows(source, torch.from_numpy(rows))
        mine = range(accelerator.process_index, len(source), accelerator.num_processes)
        batches = batches_of_all(
            Subset(Pictures(source, eval_transform(self.task.preprocessing)), mine),
            collate_pictures,
            batch_size=self.task.config.heads.at_once,
            num_workers=self.task.config.workers,
            pin_memory=accelerator.device.type == "cuda",
        )
        for indices, images, _ in batches:
            yield indices, self._views(self._look(images))

    def _look(self, images: torch.Tensor) -> torch.Tensor:
        """(B, width) or, for heads that see tokens, (B, N, D)."""
        frozen: Frozen = self.task.frozen
        images = images.to(self.task.accelerator.device, non_blocking=True)
        with self.task.accelerator.autocast():
            found = frozen.tokens(images) if TOKENS in self.views else self.layout.rows(frozen.features(images))
        return found.float()

    def _views(self, found: torch.Tensor) -> Views:
        if TOKENS in self.views:
            return {TOKENS: found}
        return {view: self.layout.view(found, view) for view in self.views}


class Stored:
    """Features of a cache. `rows`: those of the training split that are learnt from."""

    def __init__(self, train: Extracted, rows: np.ndarray, views: list[str], seed: int, batch: int, device) -> None:
        self.train, self.rows, self.views, self.seed, self.batch, self.device = train, rows, views, seed, batch, device
        self.images, self.layout = len(rows), train.layout
        self.span = self.layout.span(views)

    def width(self, view: str) -> int:
        return self.layout.width_of(view)

    def batches(self, start: int) -> Iterator[tuple[Views, torch.Tensor]]:
        """From step `start` on, without end; the next ones are read meanwhile."""
        with ThreadPoolExecutor(1) as pool:
            ahead: deque = deque()
            step = start
            while True:
                while len(ahead) <= _AHEAD:
                    ahead.append(pool.submit(self._read, self.train, self.rows[places(self, step)]))
                    step += 1
                features, labels = ahead.popleft().result()
                yield self._views(features), labels.to(self.device, non_blocking=True)

    def judged(self, split: Extracted, rows: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, Views]]:
        """These rows (None: all) of a split: places, features by view."""
        rows = np.arange(len(split.rows)) if rows is None else rows
        for start in range(0, len(rows), _ROWS):
            features, _ = self._read(split, rows[start : start + _ROWS])
            yield np.arange(start, start + len(features)), self._views(features)

    def _read(self, split: Extracted, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(split.rows[rows, self.span]), split.labels[rows]

    def _views(self, features: torch.Tensor) -> Views:
        features = features.to(self.device, non_blocking=True).float()
        return {view: self.layout.view(features, view, self.span.start) for view in self.views}


def places(feed: Stored, step: int) -> np.ndarray:
    """Of the samples of a step in the order of the run: the same as `Live` takes."""
    positions = np.arange(step * feed.batch, (step + 1) * feed.batch)
    epochs = positions // feed.images
    found = [
        order(feed.seed, int(epoch), feed.images).numpy()[positions[epochs == epoch] % feed.images]
        for epoch in np.unique(epochs)
    ]
    return np.concatenate(found)


def _blank(size: tuple[int, ...], accelerator: Accelerator) -> torch.Tensor:
    return torch.zeros(1, *size, dtype=torch.uint8, device=accelerator.device)
