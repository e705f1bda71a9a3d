"""Batches of random crops from pixels that were decoded once, a whole batch cropped at a time, on the device.

The samples are those of data/decoded.py: the same order, the same boxes, the same image in the place of one that cannot
be read.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from timm_dseq.host import to_device
from timm_dseq.images import UnreadableImage

from ..crops import crop_boxes, cropped, cropped_windows
from ..decoded import Batch
from ..framing import Draws, Framing
from ..order import DistributedBatchSampler
from ..source import Source
from ..unreadable import TRIES, none_readable
from .pixel_file import PixelFile

_OF_DEVICE = 0.3  # share of the device's free memory that pixels may take


class Resident:
    """This process's endless micro-batches: pixels, (epoch, index) (B, 2), broken images.

    Crops are made on the device. The pixels are there, too, or in the mapped file if they are too many.
    """

    def __init__(
        self,
        file: PixelFile,
        source: Source,
        framing: Framing,
        sampler: DistributedBatchSampler,
        device: torch.device,
    ) -> None:
        self.source, self.framing = source, framing
        self.device = device if device.type == "cuda" else torch.device("cpu")
        images, self.sizes = file.read()
        self.readable = _readable(self.sizes, source)
        self.pixels = torch.from_numpy(images)
        self.pixels_on_device = self.device.type == "cpu"
        if not self.pixels_on_device and images.nbytes <= _OF_DEVICE * torch.cuda.mem_get_info(self.device)[0]:
            self.pixels, self.pixels_on_device = _copied(self.pixels, self.device), True
        self.reason = cache(self._reason)
        self.batches = self._batches(sampler)

    def describe(self) -> str:
        where = "in the mapped file" if self.pixels.device.type == "cpu" else "on the device"
        count, _, side, _ = self.pixels.shape
        return f"resident: {count:,} images at {side} px, {self.pixels.nbytes / 2**30:.1f} GiB, {where}"

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        ready, images = next(self.batches)
        sizes, boxes, draws, framing = ready.sizes, ready.boxes, ready.draws, self.framing
        first, pixels = slice(None, None, framing.crops), {}
        if framing.whole:
            pixels["images"] = cropped(images, sizes[first], boxes[first], framing.size, draws.flips[first])
        if framing.views:
            pixels["pixels"] = cropped_windows(
                images, sizes, boxes, framing.size, draws.flips, draws.windows, framing.grid
            )
        return pixels, ready.samples, ready.broken

    def _batches(self, sampler: DistributedBatchSampler) -> Iterator[tuple["_Ready", torch.Tensor]]:
        """What the host has to know of each batch, and the pixels of its images (B, 3, W, W) on the device."""
        if self.device.type == "cpu":
            for samples in sampler.tensors():
                ready = self._ready(samples)
                yield ready, ready.rows
        with ThreadPoolExecutor(1) as ahead:  # one batch is prepared while the device works on the one before
            following = None
            for samples in sampler.tensors():
                batch, following = following, ahead.submit(self._ready, samples)
                if batch:
                    yield (ready := batch.result()), self._on_device(ready.rows)

    def _ready(self, samples: torch.Tensor) -> "_Ready":
        indices, framing = samples[:, 1].numpy(), self.framing
        taken = self.readable[indices]
        broken = [line for index in indices[taken != indices].tolist() for line in self._broken(index)]
        draws, sizes = framing.draw(samples), self.sizes[taken].repeat(framing.crops, axis=0)
        rows = torch.from_numpy(taken)
        if self.device.type == "cpu":
            rows = self.pixels.index_select(0, rows)
        elif not self.pixels_on_device:
            pinned = torch.empty(len(taken), *self.pixels.shape[1:], dtype=torch.uint8, pin_memory=True)
            rows = torch.index_select(self.pixels, 0, rows, out=pinned)
        return _Ready(samples, broken, draws, sizes, crop_boxes(draws.boxes, sizes), rows)

    def _on_device(self, rows: torch.Tensor) -> torch.Tensor:
        if self.pixels_on_device:
            return self.pixels.index_select(0, to_device(rows, self.device))
        return rows.to(self.device, non_blocking=True)

    def _broken(self, index: int) -> list[str]:
        """One line for each image from this one up to the next that can be read."""
        steps = (int(self.readable[index]) - index) % len(self.source)
        return [self.reason((index + step) % len(self.source)) for step in range(steps)]

    def _reason(self, index: int) -> str:
        try:
            self.source.picture(index)
        except UnreadableImage as error:
            return str(error)
        return f"{self.source.where(index)}: it could not be read when the file of pixels was built"


@dataclass(frozen=True)
class _Ready:
    """What the host does for a batch."""

    samples: torch.Tensor  # (epoch, index) (B, 2)
    broken: list[str]
    draws: Draws
    sizes: np.ndarray  # (height, width) of each crop's image (B·crops, 2)
    boxes: np.ndarray  # (B·crops, 4)
    rows: torch.Tensor  # the images' pixels (B, 3, W, W), or their numbers (B,) if all pixels are on another device


def _readable(sizes: np.ndarray, source: Source) -> np.ndarray:
    """For each image its index, or that of the next one that can be read: (N,) int64."""
    (readable,) = sizes.all(1).nonzero()
    if not len(readable):
        raise none_readable(min(TRIES, len(sizes)), source.where(0))
    indices = np.arange(len(sizes))
    following = readable[np.searchsorted(readable, indices) % len(readable)]
    lost = (following - indices) % len(sizes) >= TRIES
    if lost.any():
        raise none_readable(TRIES, source.where(int(lost.argmax())))
    return following


def _copied(pixels: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on the device, made in pieces: the mapped file is never in memory as a whole."""
    copy = torch.empty(pixels.shape, dtype=torch.uint8, device=device)
    for source, target in zip(pixels.split(4096), copy.split(4096), strict=True):
        target.copy_(source)
    return copy
