"""A data set of the Hub or of Parquet files with a column of objects → Annotated.

The column holds, for each image, lists of boxes and classes: {"bbox": [[…], …], "category": […], "area": […]} or a
list of such entries.
"""

from typing import Any

import datasets
import numpy as np

from timm_dseq import UserError
from timm_dseq.images import UnreadableImage, measure

from ...boxes import Convention, Evidence, corners, settle
from ...data.opening import open_rows
from ...data.settings import Data
from ...data.source import MOST_CLASSES, Source
from ..annotated import Annotated, Classes, Objects, Pair
from ..settings import Annotations
from .numbers import is_area, is_box

OBJECTS = ("objects", "annotations", "annotation", "instances")
BOXES, LABELS = ("bbox", "bboxes", "boxes", "box"), ("category", "categories", "category_id", "label", "labels")
Array = np.ndarray
LOOKED_AT = 500  # images whose sizes are read to settle the convention of the boxes


def open_objects(data: Annotations, split: str, classes: Classes | None) -> Annotated:
    """classes: those of the training split, which other splits have to share."""
    columns, path = (data.objects,) if data.objects else OBJECTS, data.path
    images = Data(path=path, config=data.config, image=data.image)
    rows, image, _ = open_rows(images, split, columns, labels=False)
    name = next((one for one in columns if one in rows.features), None)
    if name is None:
        raise UserError(f"{path} has no column {data.objects or 'of objects'}: name it with data.objects.")
    fields = _fields(rows.features[name])
    box, label = (next((one for one in names if one in fields), None) for names in (BOXES, LABELS))
    if not box or not label:
        raise UserError(
            f"{path}: column {name!r} holds no {BOXES[0]} and {LABELS[0]} of objects: data.objects names another."
        )
    if not isinstance(fields[label], datasets.ClassLabel) and "int" not in getattr(fields[label], "dtype", ""):
        raise UserError(
            f"{path}: {label!r} in column {name!r} holds no numbered classes: name another by data.objects."
        )
    rows = rows.select(range(min(data.limit or len(rows), len(rows))))
    where = f"{path}, {split}"
    values = rows.select_columns([name])[name]
    entries = [_entry(value, box, label, f"{where}, row {index}") for index, value in enumerate(values)]
    _check(where, entries, MOST_CLASSES)  # before each gets a name
    names = _names(fields[label], entries)
    if classes and classes[1] != names and isinstance(fields[label], datasets.ClassLabel):
        raise UserError(f"{path}: {split} has other classes than the training split: give splits of one kind.")
    names = classes[1] if classes else names
    _check(where, entries, len(names))
    source = Source(path, rows, image, None, 0)
    convention = _convention(source, entries, where, data.box_format)
    shares = convention.endswith("-shares")
    sizes = [_size(source, index, where) if shares else None for index in range(len(entries))]
    objects = [_objects(*entry, convention, size) for entry, size in zip(entries, sizes, strict=True)]
    return Annotated(source, objects, names, tuple(range(len(names))), split, sizes, range(len(entries)))


def _objects(boxes: Array, labels: Array, areas: Array, convention: Convention, size: Pair | None) -> Objects:
    found = corners(boxes, convention, np.array([size or (1, 1)] * len(boxes), float).reshape(-1, 2))
    own = (found[:, 2:] - found[:, :2]).prod(1)
    crowd = np.zeros(len(labels), bool)
    return Objects(found, labels, crowd, np.where(np.isnan(areas), own, areas), [None] * len(labels))


def _size(source: Source, index: int, where: str) -> Pair:
    """(height, width) of an image; it is not decoded."""
    try:
        return source.read(index, measure)[1]
    except UnreadableImage as error:
        raise UserError(f"{where}, {error}: mend or remove this image.") from error


def _inner(kind: Any) -> Any:
    """The type of what a column's list, if it is one, holds."""
    kind = getattr(kind, "feature", kind)
    return kind[0] if isinstance(kind, list) else kind


def _fields(kind: Any) -> dict[str, Any]:
    """The fields of a column that holds a list of entries, or an entry of lists."""
    kind = _inner(kind)
    return {name: _inner(field) for name, field in kind.items()} if isinstance(kind, dict) else {}


def _entry(value: Any, box: str, label: str, where: str) -> tuple[Array, Array, Array]:
    """Boxes (n, 4) as they are stored, labels (n,) and areas (n,), NaN where there are none, of one image."""
    if isinstance(value, list):  # of entries
        value = {name: [one and one.get(name) for one in value] for name in (box, label, "area")}
    boxes, labels, areas = ((value or {}).get(name) or [] for name in (box, label, "area"))
    areas = areas or [None] * len(boxes)
    if not len(boxes) == len(labels) == len(areas) or not all(map(is_box, boxes)):
        raise UserError(f"{where}: boxes, classes and areas differ in number, or a box has not four numbers: mend it.")
    if not all(isinstance(one, int) for one in labels) or not all(map(is_area, areas)):
        raise UserError(f"{where}: an object has no class, or an area that is none: mend it.")
    return np.array(boxes, float).reshape(-1, 4), np.array(labels, int), np.array(areas, float)


def _names(kind: Any, entries: list) -> tuple[str, ...]:
    """Of the classes: the column's, or their numbers. kind: of the column's classes."""
    most = max((int(labels.max()) for _, labels, _ in entries if len(labels)), default=-1)
    named = isinstance(kind, datasets.ClassLabel)
    return tuple(kind.names) if named else tuple(f"class {number}" for number in range(most + 1))


def _check(where: str, entries: list, most: int) -> None:
    """most: classes that there can be."""
    for index, (_, labels, _) in enumerate(entries):
        if len(labels) and not 0 <= labels.min() <= labels.max() < most:
            raise UserError(f"{where}, row {index}: a class is not one of the {most:,} that there can be: mend it.")


def _convention(source: Source, entries: list, where: str, asked: Convention | None) -> Convention:
    """By the boxes of some images, spread over the split."""
    some = [index for index in range(0, len(entries), max(1, len(entries) // LOOKED_AT)) if len(entries[index][0])]
    if not some:
        raise UserError(f"{where}, has no annotations: check data.path and the split.")
    boxes, areas = (np.concatenate([entries[index][part] for index in some]) for part in (0, 2))
    sizes = np.array([_size(source, index, where) for index in some for _ in entries[index][0]], float)
    return settle(Evidence(boxes, sizes, areas, np.full_like(boxes, np.nan)), where, asked)
