"""A data set of the Hub or of Parquet files with a column of objects → Annotated.

The column holds, for each image, lists of boxes and classes: {"bbox": [[…], …], "category": […], "area": […]} or a
list of such entries.
"""

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np

from timm_dseq import UserError
from timm_dseq.images import measure

from ..data.opening import open_rows
from ..data.settings import Data
from ..data.source import Source
from .annotated import Annotated, Objects
from .boxes import Convention, Evidence, corners, settle

OBJECTS = ("objects", "annotations", "annotation", "instances")
BOXES, LABELS = ("bbox", "bboxes", "boxes", "box"), ("category", "categories", "category_id", "label", "labels")
LOOKED_AT = 500  # images whose sizes are read to settle the convention of the boxes


def open_objects(
    path: str,
    config: str | None,
    split: str,
    image: str | None,
    column: str | None,
    asked: Convention | None,
    classes: tuple[tuple[int, ...], tuple[str, ...]] | None,
    limit: int | None,
) -> Annotated:
    """column: data.objects. asked: data.boxes. classes: those of the training split. limit: of images."""
    columns = (column,) if column else OBJECTS
    rows, found, _ = open_rows(Data(path=path, config=config, image=image), split, columns, labels=False)
    name = next((one for one in columns if one in rows.features), None)
    if name is None:
        raise UserError(f"{path} has no column {column or 'of objects'}: name it with data.objects.")
    box, label = (_field(rows.features[name], names) for names in (BOXES, LABELS))
    if not box or not label:
        raise UserError(
            f"{path}: column {name!r} holds no {BOXES[0]} and {LABELS[0]} of objects: data.objects names another."
        )
    if limit:
        rows = rows.select(range(min(limit, len(rows))))
    source = Source(path, rows, found, None, 0)
    entries = [_entry(value, box, label) for value in rows.select_columns([name])[name]]
    names = _names(rows.features[name], label, entries)
    if classes and classes[1] != names and _label_names(rows.features[name], label):
        raise UserError(f"{path}: {split} has other classes than the training split: give splits of one kind.")
    _check(path, split, entries, classes[1] if classes else names)
    sizes: list[tuple[int, int] | None] = [None] * len(entries)
    objects, convention = [], _convention(source, entries, f"{path}, {split}", asked)
    for index, (boxes, labels, areas) in enumerate(entries):
        if convention.endswith("-shares"):
            sizes[index] = source.read(index, measure)[1]
        found_boxes = corners(boxes, convention, np.array([sizes[index] or (1, 1)] * len(boxes), float).reshape(-1, 2))
        own = (found_boxes[:, 2:] - found_boxes[:, :2]).prod(1)
        crowd = np.zeros(len(labels), bool)
        objects.append(Objects(found_boxes, labels, crowd, np.where(np.isnan(areas), own, areas), [None] * len(labels)))
    names = classes[1] if classes else names
    return Annotated(source, objects, names, tuple(range(len(names))), split, sizes)


def _kinds(kind: Any) -> dict[str, Any]:
    """The fields of a column that holds a list of entries, or an entry of lists."""
    for _ in range(2):
        kind = getattr(kind, "feature", kind)
        kind = kind[0] if isinstance(kind, list) else kind
    return kind if isinstance(kind, dict) else {}


def _field(kind: Any, names: Sequence[str]) -> str | None:
    return next((name for name in names if name in _kinds(kind)), None)


def _label_names(kind: Any, label: str) -> tuple[str, ...]:
    """Names of the classes, where the column tells."""
    kind = _kinds(kind)[label]
    for _ in range(2):
        kind = getattr(kind, "feature", kind)
        kind = kind[0] if isinstance(kind, list) else kind
    return tuple(kind.names) if isinstance(kind, datasets.ClassLabel) else ()


def _entry(value: Any, box: str, label: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes (n, 4) as they are stored, labels (n,) and areas (n,), NaN where there are none, of one image."""
    if isinstance(value, list):  # of entries
        value = {name: [one[name] for one in value] for name in (value[0] if value else ())}
    value = value or {}
    boxes = np.array(value.get(box) or [], float).reshape(-1, 4)
    areas = np.array(value.get("area") or [np.nan] * len(boxes), float)
    return boxes, np.array(value.get(label) or [], int), areas


def _names(kind: Any, label: str, entries: list) -> tuple[str, ...]:
    most = max((int(labels.max()) for _, labels, _ in entries if len(labels)), default=-1)
    return _label_names(kind, label) or tuple(f"class {number}" for number in range(most + 1))


def _check(path: str, split: str, entries: list, names: Sequence[str]) -> None:
    for index, (boxes, labels, areas) in enumerate(entries):
        if not len(boxes) == len(labels) == len(areas) or not np.isfinite(boxes).all():
            raise UserError(f"{path}, {split}, row {index}: boxes and classes differ in number, or are no numbers.")
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(names):
            raise UserError(f"{path}, {split}, row {index}: a class is not one of the {len(names)} that there are.")


def _convention(source: Source, entries: list, where: str, asked: Convention | None) -> Convention:
    """By the boxes of some images, spread over the split."""
    some = [index for index in range(0, len(entries), max(1, len(entries) // LOOKED_AT)) if len(entries[index][0])]
    if not some:
        raise UserError(f"{where}, has no annotations: check data.path and the split.")
    sizes = [[source.read(index, measure)[1]] * len(entries[index][0]) for index in some]
    boxes = np.concatenate([entries[index][0] for index in some])
    areas = np.concatenate([entries[index][2] for index in some])
    evidence = Evidence(boxes, np.concatenate(sizes).astype(float), areas, np.full_like(boxes, np.nan))
    return settle(evidence, where, asked)
