"""Batches from pixels that were decoded once: crops of a whole batch on the device.

Every sample is the one that the decoded path gives: the same order, the same box, the same image in the place of one
that cannot be read.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch

from timm_dseq import UserError
from timm_dseq.host import to_device

from .crops import box_draws, crop_boxes, cropped
from .order import Share, sample_seeds
from .pixels import Place
from .source import TRIES, Source

_OF_DEVICE = 0.3  # share of the device's free memory


class Resident:
    """This process's endless micro-batches: crops (B, 3, S, S) uint8, (epoch, index) (B, 2), what is broken.

    Crops are on the device, cut from pixels that lie there, or in the mapped file where they are too many.
    """

    def __init__(
        self,
        place: Place,
        source: Source,
        size: int,
        scale: tuple[float, float],
        seed: int,
        share: Share,
        device: torch.device,
    ) -> None:
        """size: side of the crops. scale: least and greatest share of an image's area."""
        self.source, self.size, self.scale, self.seed = source, size, scale, seed
        self.device = device if device.type == "cuda" else torch.device("cpu")
        images, self.sizes = place.read()
        self.readable = _readable(self.sizes, source)
        self.pixels = torch.from_numpy(images)
        self.there = self.device.type == "cpu"  # whether pixels lie where they are cropped
        if not self.there and images.nbytes <= _OF_DEVICE * torch.cuda.mem_get_info(self.device)[0]:
            self.pixels, self.there = _on(self.device, self.pixels), True
        self.reason = cache(self._reason)
        self.batches = self._batches(share)

    def describe(self) -> str:
        where = "in the mapped file" if self.pixels.device.type == "cpu" else "on the device"
        count, _, side, _ = self.pixels.shape
        return f"resident: {count:,} images at {side} px, {self.pixels.nbytes / 2**30:.1f} GiB, {where}"

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[str]]]:
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        samples, images = next(self.batches)
        indices = samples[:, 1].numpy()
        at = self.readable[indices]
        boxes = crop_boxes(box_draws(sample_seeds(self.seed, samples), self.scale), self.sizes[at])
        broken = [line for index in indices[at != indices].tolist() for line in self._broken(index)]
        return cropped(images, self.sizes[at], boxes, self.size), samples, broken

    def _batches(self, share: Share) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Samples, and their pixels on the device."""
        if self.there:
            for samples in share.tensors():
                yield samples, self._rows(samples)
        with ThreadPoolExecutor(1) as reader:  # one batch is read while the device is busy with the one before
            coming = None
            for samples in share.tensors():
                waiting, coming = coming, (samples, reader.submit(self._rows, samples))
                if waiting:
                    yield waiting[0], waiting[1].result().to(self.device, non_blocking=True)

    def _rows(self, samples: torch.Tensor) -> torch.Tensor:
        at = torch.from_numpy(self.readable[samples[:, 1].numpy()])
        if self.there:
            return self.pixels.index_select(0, to_device(at, self.device))
        rows = torch.empty(len(at), *self.pixels.shape[1:], dtype=torch.uint8, pin_memory=True)
        return torch.index_select(self.pixels, 0, at, out=rows)

    def _broken(self, index: int) -> list[str]:
        """What stands between an image and the next that can be read, by name."""
        steps = (int(self.readable[index]) - index) % len(self.source)
        return [self.reason((index + step) % len(self.source)) for step in range(steps)]

    def _reason(self, index: int) -> str:
        try:
            self.source.picture(index)
        except Exception as error:  # PIL's readers raise almost anything on damaged files
            return f"{self.source.where(index)}: {type(error).__name__}: {error}"
        return f"{self.source.where(index)}: it could not be read when the file of pixels was built"


def _readable(sizes: np.ndarray, source: Source) -> np.ndarray:
    """Each image's number, or that of the next one that can be read: (N,) int64."""
    (whole,) = sizes.all(1).nonzero()
    every = np.arange(len(sizes))
    found = whole[np.searchsorted(whole, every) % len(whole)] if len(whole) else every
    lost = (found - every) % len(sizes) >= TRIES if len(whole) else every >= 0
    if lost.any():
        first = source.where(int(lost.argmax()))
        raise UserError(f"{TRIES} images in a row cannot be read, the first {first}: is this an image column?")
    return found


def _on(device: torch.device, pixels: torch.Tensor) -> torch.Tensor:
    """A copy on the device, in pieces: the mapped file is never in memory as a whole."""
    there = torch.empty(pixels.shape, dtype=torch.uint8, device=device)
    for piece, place in zip(pixels.split(4096), there.split(4096), strict=True):
        place.copy_(piece)
    return there
