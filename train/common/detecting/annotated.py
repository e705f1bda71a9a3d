"""Images with their objects, by number, however they were stored: what the readers of files end in."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from timm_dseq import UserError
from timm_dseq.images import UnreadableImage

from ..data.source import Source

Segmentation = list | dict | None  # polygons [[x, y, …], …] or a run-length code {"size", "counts"}, as COCO has them
Pair = tuple[int, int]  # height and width
Classes = tuple[tuple[int, ...], tuple[str, ...]]  # ids in the file, and names
LEAST_SIDE = 1e-3  # pixels; a box with a smaller side has no area


@dataclass(frozen=True)
class Objects:
    """The n objects of one image, in pixels of the image as it is stored."""

    boxes: np.ndarray  # (n, 4) float64: left, top, right, bottom
    labels: np.ndarray  # (n,) int64, 0 … classes - 1
    crowd: np.ndarray  # (n,) bool: a group, which is neither trained on nor counts in evaluation
    areas: np.ndarray  # (n,) float64, by which COCO tells small, medium and large
    masks: list[Segmentation]

    @property
    def trainable(self) -> np.ndarray:
        """(n,) bool: neither crowds nor boxes without an area."""
        return ~self.crowd & ((self.boxes[:, 2:] - self.boxes[:, :2]) >= LEAST_SIDE).all(1)


@dataclass(frozen=True)
class Annotated:
    """One split: images, their objects, and the classes."""

    source: Source
    objects: Sequence[Objects]  # of each image
    names: tuple[str, ...]  # of the classes
    ids: tuple[int, ...]  # of the classes, in the file; they may have gaps
    split: str
    sizes: Sequence[Pair | None]  # where the annotations tell
    keys: Sequence[int]  # the images' ids in the file
    repeated: int = 0  # images whose file another one before has, too

    def __len__(self) -> int:
        return len(self.objects)

    @cached_property
    def has_masks(self) -> bool:
        """Whether every object has one."""
        return all(mask is not None for objects in self.objects for mask in objects.masks)

    @cached_property
    def with_objects(self) -> list[int]:
        """The images that have something to train on."""
        return [index for index, objects in enumerate(self.objects) if objects.trainable.any()]

    def picture(self, index: int) -> Image.Image:
        """Upright 8-bit RGB, or UnreadableImage, also of a size that its annotations are not for."""
        try:
            picture = self.source.picture(index)
            self.check_size(index, (picture.height, picture.width))
        except UnreadableImage as error:  # a row of a table does not say its split
            raise UnreadableImage(f"{self.split}, {error}") from error
        return picture

    def check_size(self, index: int, size: Pair) -> None:
        """UnreadableImage if the image is not of the (height, width) that its annotations are for."""
        told = self.sizes[index]
        if told is not None and told != size:
            where, name = self.source.where(index), self.source.name
            raise UnreadableImage(f"{where} is {size[1]} × {size[0]}, and {name} says {told[1]} × {told[0]}")

    def said(self) -> str:
        """What there is, and what is left out, in words."""
        every = sum(len(objects.labels) for objects in self.objects)
        crowds = sum(int(objects.crowd.sum()) for objects in self.objects)
        bare = sum(mask is None for objects in self.objects for mask in objects.masks)
        lacking = len(self) - len(self.with_objects)
        empty = every - crowds - sum(int(objects.trainable.sum()) for objects in self.objects)
        words = [
            f"{len(self):,} images of {self.split}, {every:,} objects of {len(self.names)} classes",
            "with masks" if self.has_masks else f"boxes only{f', as {bare:,} have no mask' * (bare < every)}",
        ]
        words += [f"{crowds:,} crowds, not trained on"] * bool(crowds)
        words += [f"{empty:,} boxes without an area, left out"] * bool(empty)
        words += [f"{lacking:,} images without objects"] * bool(lacking)
        words += [f"{self.repeated:,} listed again with a file of another"] * bool(self.repeated)
        return ", ".join(words)

    def check(self) -> None:
        """One line if there is nothing to learn from, or to test on."""
        if not len(self):
            raise UserError(f"{self.source.name}, {self.split}, has no images: check data.path.")
        if not any(len(objects.labels) for objects in self.objects):
            raise UserError(f"{self.source.name}, {self.split}, has no annotations: check data.path and the split.")
        if not self.with_objects:
            raise UserError(
                f"{self.source.name}, {self.split}: no object can be trained on, all are crowds or boxes without an "
                "area: check data.box_format and the annotations."
            )
