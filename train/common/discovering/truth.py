"""Where the objects of an image are: a data set with masks or boxes → for each image a `Truth`, checked.

A mask becomes labels (H, W): 0 is ground, 1 … K are objects, −1 is not known. Boxes become corners in pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import xxhash
from PIL import Image
from torch.utils.data import Dataset

from timm_dseq import UserError
from timm_dseq.images import UnreadableImage, as_unreadable, open_image

from ..boxes import Convention, Evidence, corners, settle
from ..data.opening import SUFFIXES, opening, test_split
from ..data.settings import Data
from ..data.source import Source, open_source
from ..data.unreadable import batches_of_all
from ..system.screen import Screen
from .boxes import coco_rows, voc_rows
from .settings import Objects

UNKNOWN = -1
BOXES = ("boxes", "bbox", "bboxes", "objects")  # columns
_HALF = 127  # greyer than this is object, where masks do not number them


@dataclass(frozen=True)
class Truth:
    """The objects of one image. Arrays: each tensor of a loader's worker would hold a file open."""

    size: tuple[int, int]  # of the image, width and height
    labels: np.ndarray | None = None  # (H, W) int32
    boxes: np.ndarray | None = None  # (k, 4) float32, as written until their convention is known, then corners


@as_unreadable()
def read_mask(value: Any, numbered: bool | None = None, unknown: int | None = None) -> np.ndarray:
    """An encoded mask → labels (H, W) int32. A palette PNG is read as its indices, never as its colours."""
    image = open_image(value)
    if image.mode in ("RGB", "RGBA", "LA", "CMYK"):
        first, *others = image.convert("RGB").split()
        if any(other.tobytes() != first.tobytes() for other in others):
            raise UnreadableImage(f"its mask is a picture in colours ({image.mode}): masks are grey or have a palette")
        image = first
    pixels = np.asarray(image)
    if image.mode == "1":
        return pixels.astype(np.int32)
    labels = pixels.astype(np.int32)
    if not (image.mode == "P" if numbered is None else numbered):
        labels = (pixels > _HALF * (257 if image.mode.startswith("I") else 1)).astype(np.int32)
    if unknown is not None:
        labels[pixels == unknown] = UNKNOWN
    return labels


class Truths(Dataset):
    """`truths[place]`: (row, what `show` makes of the picture, its Truth) of the rows that are judged."""

    def __init__(self, data: Objects, source: Source, column: str, rows: range | list[int], by_mask: bool) -> None:
        self.data, self.source, self.column, self.rows, self.by_mask = data, source, column, rows, by_mask
        self.form: Convention | None = None  # of boxes, once it is known
        self.empty: list[int] = []  # rows without an object, which are not judged
        self.scenes = False  # whether masks number several objects
        self.digest = ""  # of all truths
        self.show: Callable[[Image.Image], Any] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> tuple[int, Any, Truth]:
        row = self.rows[place]
        picture = self.source.picture(row)
        truth = self._masked(row, picture.size) if self.by_mask else self._boxed(row, picture.size)
        return row, self.show(picture) if self.show else None, truth

    def where(self, row: int) -> str:
        """Where a user finds an image."""
        return self.source.where(row)

    def _masked(self, row: int, size: tuple[int, int]) -> Truth:
        masks = replace(self.source, image=self.column)
        labels = masks.read(row, lambda value: read_mask(value, self.data.numbered, self.data.unknown))
        (width, height), (h, w) = size, labels.shape
        if (w, h) != size:
            same_shape = abs(w * height - h * width) <= max(width, height)
            if not (same_shape and self.data.other_size):
                hint = " (--data.other_size true takes it: its shape is the same)" if same_shape else ""
                raise UnreadableImage(
                    f"{self.where(row)}: its mask has {w}×{h} pixels, the image {width}×{height}{hint}"
                )
        return Truth(size, labels=labels)

    def _boxed(self, row: int, size: tuple[int, int]) -> Truth:
        content = self.source.rows[row]
        if content.get("size", list(size)) != list(size):
            told = "×".join(map(str, content["size"]))
            raise UnreadableImage(
                f"{self.where(row)}: the image has {size[0]}×{size[1]} pixels, its description says {told}"
            )
        try:
            boxes = np.array(_listed(content[self.column]), np.float32).reshape(-1, 4)
        except (TypeError, ValueError, KeyError, StopIteration) as error:
            raise UnreadableImage(f"{self.where(row)}: {self.column} holds no boxes of four numbers") from error
        if self.form:
            boxes = corners(boxes, self.form, np.array([size[::-1]])).astype(np.float32)
            boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(1)]  # those that enclose something
        return Truth(size, boxes=boxes)


def open_truths(data: Objects, workers: int, shown: bool = True) -> Truths:
    """The data set that the settings name, its every image and truth read once, so that a fault is told before long
    work. Images without an object are left out. shown: whether to show the progress."""
    source, column, by_mask = _opened(data)
    rows = range(data.skip, min(len(source), data.skip + (data.images or len(source))))
    if not rows:
        raise UserError(f"data.skip={data.skip} leaves none of {len(source)} images: skip fewer.")
    truths = Truths(data, source, column, rows, by_mask)
    screen = Screen(len(rows), 0, shown, unit="image")
    screen.say(f"reading {len(rows)} images of {source.name} and their {'masks' if by_mask else 'boxes'}")
    every: list[Truth] = []
    filled: list[int] = []
    digest = xxhash.xxh3_128()
    for batch in batches_of_all(truths, list, batch_size=64, num_workers=workers):
        for row, _, truth in batch:
            most = int(truth.labels.max()) if by_mask else len(truth.boxes)
            truths.scenes |= by_mask and most > 1
            (filled if most > 0 else truths.empty).append(row)
            digest.update((truth.labels if by_mask else truth.boxes).tobytes())
            if not by_mask and most:
                every.append(truth)
        screen.show(len(filled) + len(truths.empty), "checked")
    screen.close()
    if not filled:
        hint = ""
        if by_mask and not data.numbered:
            hint = ": if they number the objects, give --data.numbered true"
        raise UserError(f"{data.path}: no {'mask' if by_mask else 'image'} holds an object{hint}.")
    if not by_mask:
        boxes = np.concatenate([truth.boxes for truth in every]).astype(float)
        sizes = np.repeat([truth.size[::-1] for truth in every], [len(truth.boxes) for truth in every], axis=0)
        unknown = np.full((len(boxes), 5), np.nan)
        evidence = Evidence(boxes, sizes.astype(float), unknown[:, 0], unknown[:, 1:])
        truths.form = settle(evidence, data.path, data.box_format)
        holding = [_holds(truth, truths.form) for truth in every]
        truths.empty += [row for row, holds in zip(filled, holding, strict=True) if not holds]
        filled = [row for row, holds in zip(filled, holding, strict=True) if holds]
    truths.rows, truths.digest = filled, digest.hexdigest()[:16]
    return truths


def _holds(truth: Truth, form: Convention) -> bool:
    """Whether a box of the image encloses something."""
    found = corners(truth.boxes, form, np.array([truth.size[::-1]]))
    return bool((found[:, 2:] > found[:, :2]).all(1).any())


def _opened(data: Objects) -> tuple[Source, str, bool]:
    """The source, the column of the truth, and whether it is one of masks."""
    files = Path(data.boxes) if data.boxes else Path(data.mask)
    if data.boxes and files.is_dir():
        return Source(Path(data.path).name, voc_rows(_folder(data), files), "image", None, 0), "boxes", False
    if data.boxes and files.suffix == ".json":
        if not files.is_file():
            raise UserError(f"data.boxes={files} does not exist.")
        return Source(Path(data.path).name, coco_rows(_folder(data), files), "image", None, 0), "boxes", False
    if not data.boxes and len(files.parts) > 1 and files.is_dir():  # a bare word is a column
        return Source(Path(data.path).name, _paired(_folder(data), files), "image", None, 0), "mask", True
    split = data.split or test_split(data.path, data.config) or "train"
    columns = Data(path=data.path, config=data.config, image=data.image)
    source = open_source(columns, split, others=[data.mask, *([data.boxes] if data.boxes else BOXES)])
    features = getattr(source.rows, "features", {})
    column = data.boxes or (data.mask if data.mask in features else next((x for x in BOXES if x in features), None))
    if column not in features:
        raise UserError(
            f"{data.path} has no column {column or data.mask!r}: name that of the masks as data.mask, or that of the "
            "boxes as data.boxes."
        )
    if column == source.image:
        raise UserError(f"{data.path}: column {column!r} holds the masks: name that of the images as data.image.")
    if column == data.mask:
        with opening(f"{data.path}, column {column},", "data.mask names one of images."):
            rows = source.rows.cast_column(column, datasets.Image(decode=False))
        return replace(source, rows=rows, name=split), column, True
    return replace(source, name=split), column, False


def _folder(data: Objects) -> Path:
    if not Path(data.path).is_dir():
        raise UserError(f"data.path={data.path} is no folder: with files of masks or boxes, it is that of the images.")
    return Path(data.path)


def _paired(images: Path, masks: Path) -> list[dict[str, Any]]:
    """Rows {"image", "mask"} of the files in two folders that have the same names up to the ending."""

    def files(folder: Path) -> dict[str, Path]:
        return {file.stem: file for file in sorted(folder.iterdir()) if file.suffix.lower() in SUFFIXES}

    photos, truths = files(images), files(masks)
    for name in sorted(photos.keys() ^ truths.keys())[:1]:
        raise UserError(f"{name} is in one of {images} and {masks} alone: each image needs a mask of its name.")
    pairs = [(photos[name], truths[name]) for name in photos]
    return [
        {key: {"bytes": None, "path": str(path)} for key, path in (("image", photo), ("mask", mask))}
        for photo, mask in pairs
    ]


def _listed(value: Any) -> list:
    """The boxes of a row: a list of four numbers each, or such a list in a mapping, as `objects` often is."""
    if isinstance(value, dict):
        value = next(value[name] for name in BOXES if name in value)
    return [list(each["bbox"] if isinstance(each, dict) else each) for each in value]
