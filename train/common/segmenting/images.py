"""Images with the numbers of their classes: random crops to train on, whole images to test on."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.functional import pil_to_tensor

from ..data.order import sample_seed, seeded
from .classes import IGNORED, Classes
from .masks import read_ids
from .opening import Masked
from .settings import Augment

Sample = tuple[torch.Tensor, torch.Tensor]  # pixels (3, H, W) uint8, numbers of classes (H, W) int16


class Crops(Dataset):
    """`crops[epoch, index]`: a square of S pixels of the image, resized, flipped, its colours changed, and its classes.

    What is random about it is a function of (seed, epoch, index). Where the image ends, no class is known.
    """

    def __init__(
        self, masked: Masked, classes: Classes, augment: Augment, size: int, mean: Sequence[float], seed: int
    ) -> None:
        """size: S. mean: the colour beyond the image, 0 … 1."""
        self.masked, self.classes, self.augment, self.size, self.seed = masked, classes, augment, size, seed
        self.beyond = torch.tensor([round(255 * part) for part in mean], dtype=torch.uint8)
        self.distort = _distort(augment.distort)

    def __len__(self) -> int:
        return len(self.masked)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        picture, numbers = _read(self.masked, self.classes, key[1])
        with seeded(sample_seed(self.seed, *key)):
            draws = torch.rand(4, dtype=torch.float64).tolist()
            image, numbers = self._cut(picture, numbers, *draws)
            return self.distort(image), numbers

    def _cut(
        self, picture: Image.Image, numbers: np.ndarray, factor: float, down: float, across: float, flip: float
    ) -> Sample:
        """factor, down, across, flip: random numbers, 0 … 1, that say which square. Only what it shows is resized."""
        least, most = self.augment.scale
        factor = least + factor * (most - least)
        rows, columns = (
            _span(side, factor, self.size, share) for side, share in zip(numbers.shape, (down, across), strict=True)
        )
        box = (columns.begin, rows.begin, columns.end, rows.end)
        part = picture.resize((len(columns.pixels), len(rows.pixels)), Image.Resampling.BILINEAR, box=box)
        image = self.beyond[:, None, None].repeat(1, self.size, self.size)
        mask = torch.full((self.size, self.size), IGNORED, dtype=torch.int16)
        image[:, : part.height, : part.width] = pil_to_tensor(part)
        mask[: part.height, : part.width] = torch.from_numpy(numbers[rows.pixels[:, None], columns.pixels])
        return (image.flip(2), mask.flip(1)) if flip < self.augment.flip else (image, mask)


@dataclass(frozen=True)
class _Span:
    """What is seen of one side of an image, in its own pixels."""

    begin: float
    end: float
    pixels: np.ndarray  # (n,) the nearest one for each of the n pixels of the resized image that are seen


def _span(side: int, factor: float, size: int, share: float) -> _Span:
    """size: most pixels to be seen of the resized side. share: which of its places the square takes, 0 … 1."""
    whole = max(1, round(side * factor))
    seen = min(size, whole)
    start, step = int(share * (whole - seen + 1)), side / whole
    pixels = ((start + np.arange(seen) + 0.5) * step).astype(int)
    return _Span(start * step, min(side, (start + seen) * step), pixels.clip(max=side - 1))


class Whole(Dataset):
    """`whole[index]`: the index, and the image at its own size with its classes."""

    def __init__(self, masked: Masked, classes: Classes) -> None:
        self.masked, self.classes = masked, classes

    def __len__(self) -> int:
        return len(self.masked)

    def __getitem__(self, index: int) -> tuple[int, Sample]:
        picture, numbers = _read(self.masked, self.classes, index)
        return index, (pil_to_tensor(picture), torch.from_numpy(numbers))


def _read(masked: Masked, classes: Classes, index: int) -> tuple[Image.Image, np.ndarray]:
    return masked.images.picture(index), classes.numbers(masked.masks.read(index, read_ids))


def _distort(chance: float) -> v2.Transform:
    """torchvision's RandomPhotometricDistort without its swapping of channels, which mmsegmentation's has not."""
    changes = [{"brightness": 0.125}, {"contrast": 0.5}, {"saturation": 0.5}, {"hue": 0.05}]
    return v2.Compose([v2.RandomApply([v2.ColorJitter(**change)], chance) for change in changes])
