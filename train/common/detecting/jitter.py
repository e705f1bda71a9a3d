"""Large-scale jitter (Ghiasi et al., 2021): an annotated image → a square of S pixels, and the objects left in it.

The image is resized to a random share of S and flipped by chance; a random part is cut out of a larger one, a smaller
one lies in the upper left corner. What is random about a sample is a function of (seed, epoch, index).
"""

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from timm_dseq.images import decode, measure

from ..data.order import sample_seed
from . import masks
from .annotated import Annotated, Pair

LEAST = 1.0  # pixels of a side of an object that is kept
Sample = tuple[torch.Tensor, dict[str, torch.Tensor]]


class JitteredImages(Dataset):
    """`images[epoch, index]`: pixels (3, S, S) uint8, and boxes (n, 4), labels (n,) from 1 on, masks (n, S, S) bool."""

    def __init__(
        self, annotated: Annotated, seed: int, size: int, scale: tuple[float, float], flip: float, with_masks: bool
    ) -> None:
        """size: S. Images without objects are left out."""
        self.annotated, self.seed, self.size, self.scale, self.flip = annotated, seed, size, scale, flip
        self.with_masks, self.indices = with_masks, annotated.with_objects

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: Pair) -> Sample:
        draw = random.Random(sample_seed(self.seed, *key))
        index, longest = self.indices[key[1]], draw.uniform(*self.scale) * self.size
        image, size = self.annotated.source.read(index, partial(_reduced, longest=longest))
        self.annotated.check_size(index, size)
        whole = tuple(max(1, round(side * longest / max(size))) for side in size)
        shape = tuple(min(self.size, side) for side in whole)  # what is seen of it
        top, left = (draw.randint(0, side - seen) for side, seen in zip(whole, shape, strict=True))
        flipped = draw.random() < self.flip
        window = (left / whole[1], top / whole[0], (left + shape[1]) / whole[1], (top + shape[0]) / whole[0])
        cut = partial(_cut, window=window, shape=shape, flipped=flipped)
        pixels = _padded(cut(image).transpose(2, 0, 1), self.size)
        return torch.from_numpy(pixels), self._objects(index, size, whole, (top, left), shape, flipped, cut)

    def _objects(
        self, index: int, size: Pair, whole: Pair, corner: Pair, shape: Pair, flipped: bool, cut: Callable
    ) -> dict[str, torch.Tensor]:
        """The objects of which something is seen. size: of the image. whole: when it is resized. All (height, width).

        corner, shape: top and left of the part that is seen, and its size. cut: that part of an image.
        """
        objects = self.annotated.objects[index]
        some = np.flatnonzero(objects.trainable)
        boxes = objects.boxes[some] * np.tile([whole[1] / size[1], whole[0] / size[0]], 2)
        boxes = boxes - np.tile(corner[::-1], 2)
        boxes = boxes.clip(0, np.tile(shape[::-1], 2))
        if flipped:
            boxes[:, [0, 2]] = shape[1] - boxes[:, [2, 0]]
        kept = ((boxes[:, 2:] - boxes[:, :2]) >= LEAST).all(1)
        target = {
            "boxes": torch.from_numpy(boxes[kept]).float(),
            "labels": torch.from_numpy(objects.labels[some][kept]) + 1,
        }
        if self.with_masks:
            bitmaps = np.zeros((int(kept.sum()), self.size, self.size), bool)
            for place, at in enumerate(some[kept]):
                mask = Image.fromarray(255 * masks.bitmap(objects.masks[at], size))
                bitmaps[place, : shape[0], : shape[1]] = cut(mask) > 127
            target["masks"] = torch.from_numpy(bitmaps)
        return target


def _reduced(value: Any, longest: float) -> tuple[Image.Image, Pair]:
    """An image, perhaps decoded at a smaller size that is no less than needed, and its (height, width)."""
    image, size = measure(value)
    return decode(image, oversize=max(size) / longest), size


def _cut(image: Image.Image, window: tuple[float, ...], shape: Pair, flipped: bool) -> np.ndarray:
    """The part of an image within left, top, right, bottom (shares of it), resized to (height, width)."""
    box = tuple(share * side for share, side in zip(window, image.size * 2, strict=True))
    part = image.resize(shape[::-1], Image.Resampling.BILINEAR, box=box)
    return np.array(part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else part)


def _padded(pixels: np.ndarray, size: int) -> np.ndarray:
    """(3, h, w) → (3, S, S)."""
    return np.pad(pixels, [(0, 0), *((0, size - side) for side in pixels.shape[1:])])


def collate(samples: list[Sample]) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """Images (B, 3, S, S), and the objects of each."""
    images, targets = zip(*samples, strict=True)
    return torch.stack(images), list(targets)
