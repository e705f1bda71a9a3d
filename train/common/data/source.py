"""One split of a data set: images by number, and their labels where there are any."""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import datasets
import pyarrow
import pyarrow.compute
import torch
from PIL import Image

from timm_dseq import UserError
from timm_dseq.images import UnreadableImage, content, decode

from .opening import is_text, open_rows, opening
from .scenes import LABELS as SCENE_LABELS
from .scenes import LENGTHS, Scenes
from .settings import Data
from .unreadable import first_readable, none_readable

MOST_CLASSES = 100_000  # scores of so many still fit into memory
Read = TypeVar("Read")


@dataclass(frozen=True)
class Source:
    """One split of a data set, by number."""

    name: str
    rows: Sequence[dict[str, Any]]  # images as {"bytes", "path"}, or open in Pillow
    image: str  # the column of the images
    label: str | None  # the column of the labels
    classes: int
    truth: torch.Tensor | None = None  # labels (n,), where they are not in the rows, or were read before
    names: tuple[str, ...] = ()  # of the classes, where the data set has names

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int, reader: Callable[[Any], Read]) -> Read:
        """An image as the reader, of functions in timm_dseq/images.py, gives it; UnreadableImage names it."""
        try:
            return reader(self.rows[index][self.image])
        except UnreadableImage as error:
            raise UnreadableImage(f"{self.where(index)}: {error}") from error

    def picture(self, index: int) -> Image.Image:
        """Upright 8-bit RGB, or UnreadableImage."""
        return self.read(index, decode)

    def where(self, index: int) -> str:
        """Where a user finds the image."""
        value = self.rows[index][self.image]
        path = value.get("path") if isinstance(value, dict) else None
        return f"{path} (row {index})" if path else f"row {index}"

    def labels(self, indices: Sequence[int]) -> torch.Tensor:
        """Labels of these images (k,) int64; -1 for one that has none."""
        if self.truth is not None:
            return self.truth[list(indices)]
        labels = [self.rows[index][self.label] for index in indices]
        return torch.tensor([-1 if label is None else int(label) for label in labels])

    def all_labels(self) -> torch.Tensor:
        """Labels of all images (n,) int64, -1 for one that has none; no image is read, unless it is drawn."""
        if self.truth is not None:
            return self.truth
        if not isinstance(self.rows, datasets.Dataset):
            return self.labels(range(len(self)))
        column = self.rows.select_columns([self.label]).with_format("arrow")[:].column(self.label)
        numbers = pyarrow.compute.fill_null(column.cast(pyarrow.int64(), safe=False), -1)
        return torch.from_numpy(numbers.to_numpy().copy())

    def label_fault(self) -> str | None:
        """Why nothing can be learnt from the labels, if so."""
        if isinstance(self.rows, Scenes):
            return None  # each of them would have to be drawn
        labels, limit = self.all_labels(), min(self.classes, MOST_CLASSES)
        if not len(labels):
            return "it has no images"
        if missing := int((labels < 0).sum()):
            return f"{missing} images have no label (null or -1)"
        if (largest := int(labels.max())) >= limit:
            return f"a label is {largest}, and classes are numbered from 0 to {limit - 1} at most"
        return None

    @cached_property
    def revision(self) -> str:
        """What `datasets` tells this version of the data set by, if it knows one, and the sizes of files that are not
        copied into its own: it looks at their times, which tar, rsync and cp -p put back."""
        return getattr(self.rows, "_fingerprint", "") + _sizes(self.file_names())

    def file_names(self) -> list[str | None]:
        """The images' file names; no image is read."""
        if isinstance(self.rows, datasets.Dataset):
            return pyarrow.compute.struct_field(self.rows.data.column(self.image), "path").to_pylist()
        if isinstance(self.rows, Scenes):
            return []
        images = (self.rows[row][self.image] for row in range(len(self)))
        return [image.get("path") if isinstance(image, dict) else None for image in images]

    def fingerprint(self) -> str:
        """A digest of the number of images and of some of them: a resumed run refuses another data set by it."""
        digest = hashlib.blake2b(str(len(self)).encode(), digest_size=8)
        for start in range(0, len(self), max(1, len(self) // 16)):
            indices = chain(range(start, len(self)), range(start))
            read, _, broken = first_readable(indices, lambda index: self.read(index, content))
            if read is None:
                raise none_readable(len(broken), broken[0])
            digest.update(read)
        return digest.hexdigest()


def _sizes(names: Sequence[str | None]) -> str:
    """A digest of the sizes of the files that are there; "" without any."""
    sizes = [os.stat(name).st_size for name in names if name and os.path.isabs(name) and os.path.isfile(name)]
    return hashlib.blake2b(repr(sizes).encode(), digest_size=8).hexdigest() if sizes else ""


def open_source(data: Data, split: str | None = None, others: Sequence[str] = ()) -> Source:
    """A split of the data set that the settings name (default: the one to train on), or one line on what is wrong.

    others: columns to keep as well, where they exist.
    """
    split = split or data.split
    if data.path == "scenes":
        if split not in LENGTHS:
            raise UserError(f"scenes has no split {split!r}: choose train or test.")
        label = data.label or "label"
        if label not in SCENE_LABELS:
            raise UserError(f"scenes has no label {label!r}: choose one of {', '.join(SCENE_LABELS)}.")
        return Source("scenes", Scenes(split), "image", label, SCENE_LABELS[label])
    rows, image, label = open_rows(data, split, others)
    return _source(data, rows, rows.features, image, label)


def first_of_stream(data: Data, count: int) -> Source:
    """The first images of a stream, by number."""
    rows, image, label = open_rows(data, data.split, streaming=True)
    with opening(f"{data.path}, split {data.split},"):
        first = list(rows.take(count))
    if not first:
        raise UserError(f"{data.path}, split {data.split}, is empty: check data.path and data.split.")
    return _source(data, first, rows.features, image, label)


def renumbered(labels: torch.Tensor, names: Sequence[str], others: Sequence[str]) -> torch.Tensor:
    """Labels (n,) of classes with these names, in the numbering of the others; -1 for a class that they lack."""
    numbers = {name: number for number, name in enumerate(others)}
    return torch.tensor([numbers.get(name, -1) for name in names])[labels]


def _source(data: Data, rows: Sequence, features: datasets.Features, image: str, label: str | None) -> Source:
    source, kind = Source(Path(data.path).name, rows, image, label, 0), features[label] if label else None
    if is_text(kind):
        named = _numbered(source)
        shared = 2 * named.classes <= len(rows)  # or they are captions
        return named if shared or data.label else replace(source, label=None)
    if isinstance(kind, datasets.ClassLabel):
        return replace(source, classes=kind.num_classes, names=tuple(kind.names))
    return replace(source, classes=1 + int(source.all_labels().max())) if label else source


def _numbered(source: Source) -> Source:
    """A source whose labels are words: its classes, in the order of the alphabet."""
    rows = source.rows
    words = rows[source.label][:] if isinstance(rows, datasets.Dataset) else [row[source.label] for row in rows]
    names = tuple(sorted({word for word in words if word is not None}))
    numbers = {name: number for number, name in enumerate(names)}
    truth = torch.tensor([-1 if word is None else numbers[word] for word in words])
    return replace(source, truth=truth, classes=len(names), names=names)
