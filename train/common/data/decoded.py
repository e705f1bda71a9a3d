"""Batches of random crops, from images that are decoded each time they are taken: uint8 (B·V, 3, S, S)."""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from .crops import box_draws, crop_boxes
from .images import as_unreadable, decode, measure
from .order import view_seeds
from .source import Source
from .unreadable import first_readable, none_readable

Item = tuple[torch.Tensor, tuple[int, int], list[str]]  # V crops (V, 3, S, S) uint8, (epoch, index), broken images
# crops (B·V, 3, S, S) uint8, those of a sample side by side; (epoch, index) (B, 2); broken images
Batch = tuple[torch.Tensor, torch.Tensor, list[str]]


class Crops(Dataset):
    """`crops[epoch, index]`: an image's crops in an epoch, or the next image's if it cannot be read."""

    def __init__(self, source: Source | None, size: int, scale: tuple[float, float], seed: int, views: int = 1) -> None:
        """size: side of the crops. scale: least and greatest share of an image's area. views: V, crops of an image."""
        self.source, self.size, self.scale, self.seed, self.views = source, size, scale, seed, views

    def __getitem__(self, sample: tuple[int, int]) -> Item:
        return self.__getitems__([sample])[0]

    def __getitems__(self, samples: list[tuple[int, int]]) -> list[Item]:
        return [self._item(sample, draws) for sample, draws in zip(samples, self.draws(samples), strict=True)]

    def draws(self, samples: list[tuple[int, int]]) -> np.ndarray:
        """The random numbers that give the samples' boxes, (B, V, 10, 4)."""
        draws = box_draws(view_seeds(self.seed, torch.tensor(samples), self.views), self.scale)
        return draws.reshape(len(samples), self.views, *draws.shape[1:])

    @as_unreadable()
    def crop(self, value: Any, draws: np.ndarray) -> torch.Tensor:
        """A sample's crops of an image, by its random numbers (V, 10, 4): (V, 3, S, S) uint8."""
        image, shape = measure(value)
        boxes = crop_boxes(draws, np.array([shape] * len(draws)))
        picture = decode(image, boxes[:, 2:].min() / self.size)
        shrunk = round(shape[1] / picture.width)
        size, bicubic, crops = (self.size, self.size), Image.Resampling.BICUBIC, []
        for top, left, height, width in boxes.tolist():
            box = (left, top, left + width, top + height)
            if shrunk == 1:
                crop = picture.crop(box).resize(size, bicubic)
            else:  # the box lies between pixels
                crop = picture.resize(size, bicubic, box=tuple(edge / shrunk for edge in box))
            crops.append(pil_to_tensor(crop))
        return torch.stack(crops)

    def _item(self, sample: tuple[int, int], draws: np.ndarray) -> Item:
        _, index = sample
        source = self.source
        indices = chain(range(index, len(source)), range(index))
        crop, _, broken = first_readable(indices, lambda at: source.read(at, lambda value: self.crop(value, draws)))
        return (torch.zeros(0) if crop is None else crop), sample, broken


def collate(items: list[Item]) -> Batch:
    """One batch; no images at all where one of them has found no image that can be read."""
    images, samples, broken = zip(*items, strict=True)
    if lost := next((lines for image, lines in zip(images, broken, strict=True) if not image.numel()), None):
        return torch.zeros(0), torch.zeros(0), lost
    return torch.cat(images), torch.tensor(samples), [line for lines in broken for line in lines]


def readable(loader: Iterable[Batch]) -> Iterator[Batch]:
    """A loader's batches, until one has no images: an error that a worker raises would be a traceback."""
    for images, samples, broken in loader:
        if not len(images):
            raise none_readable(len(broken), broken[0])
        yield images, samples, broken
