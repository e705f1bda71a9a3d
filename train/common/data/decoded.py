"""Batches of random crops, from images that are decoded each time they are taken: uint8."""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from timm_dseq.engine.views.windows import cut
from timm_dseq.images import as_unreadable, decode, measure

from .crops import crop_boxes
from .framing import Draws, Framing
from .source import Source
from .unreadable import first_readable, none_readable

Pixels = dict[str, torch.Tensor]  # "images" and "pixels", as `Framing` has them
Item = tuple[Pixels, tuple[int, int], list[str]]  # a sample's pixels, (epoch, index), broken images
Batch = tuple[Pixels, torch.Tensor, list[str]]  # pixels, (epoch, index) (B, 2), broken images


class Crops(Dataset):
    """`crops[epoch, index]`: what is seen of an image in an epoch, or of the next image if it cannot be read."""

    def __init__(self, source: Source | None, framing: Framing) -> None:
        self.source, self.framing = source, framing

    def __getitem__(self, sample: tuple[int, int]) -> Item:
        return self.__getitems__([sample])[0]

    def __getitems__(self, samples: list[tuple[int, int]]) -> list[Item]:
        return [self._item(sample, draws) for sample, draws in zip(samples, self.draws(samples), strict=True)]

    def draws(self, samples: list[tuple[int, int]]) -> list[Draws]:
        """The random choices of each sample."""
        return self.framing.draw_each(torch.tensor(samples))

    @as_unreadable()
    def crop(self, value: Any, draws: Draws) -> Pixels:
        """What is seen of an image by a sample's random choices."""
        framing, (image, shape) = self.framing, measure(value)
        boxes = crop_boxes(draws.boxes, np.array([shape] * len(draws.boxes)))
        picture = decode(image, boxes[:, 2:].min() / framing.size)
        shrunk = round(shape[1] / picture.width)
        size, bicubic, crops = (framing.size, framing.size), Image.Resampling.BICUBIC, []
        for (top, left, height, width), flip in zip(boxes.tolist(), draws.flips.tolist(), strict=True):
            box = (left, top, left + width, top + height)
            if shrunk == 1:
                crop = picture.crop(box).resize(size, bicubic)
            else:  # the box lies between pixels
                crop = picture.resize(size, bicubic, box=tuple(edge / shrunk for edge in box))
            crops.append(pil_to_tensor(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else crop))
        pixels = {"images": crops[0][None]} if framing.whole else {}
        if draws.windows is not None:
            pixels["pixels"] = cut(torch.stack(crops), draws.windows, framing.grid)
        return pixels

    def _item(self, sample: tuple[int, int], draws: Draws) -> Item:
        _, index = sample
        source = self.source
        indices = chain(range(index, len(source)), range(index))
        pixels, _, broken = first_readable(indices, lambda at: source.read(at, lambda value: self.crop(value, draws)))
        return pixels or {}, sample, broken


def collate(items: list[Item]) -> Batch:
    """One batch; no pixels at all where one of them has found no image that can be read."""
    pixels, samples, broken = zip(*items, strict=True)
    if lost := next((lines for own, lines in zip(pixels, broken, strict=True) if not own), None):
        return {}, torch.zeros(0), lost
    together = {name: torch.cat([own[name] for own in pixels]) for name in pixels[0]}
    return together, torch.tensor(samples), [line for lines in broken for line in lines]


def readable(loader: Iterable[Batch]) -> Iterator[Batch]:
    """A loader's batches, until one has no pixels: an error that a worker raises would be a traceback."""
    for pixels, samples, broken in loader:
        if not pixels:
            raise none_readable(len(broken), broken[0])
        yield pixels, samples, broken
