"""A JSON file in COCO's format and a folder of images → Annotated; every mistake is one line before long work."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from timm_dseq import UserError
from timm_dseq.images import MOST_PIXELS

from ...boxes import Convention, Evidence, corners, settle
from ...data.source import Source
from .. import masks
from ..annotated import Annotated, Classes, Objects, Pair
from ..settings import Annotations
from .numbers import is_area, is_box

LOOKED_AT = 2000  # masks whose boxes are compared with the annotated ones

_JSON = ("instances_{}.json", "annotations/instances_{}.json", "{}/_annotations.coco.json", "annotations/{}.json")
_IMAGES = ("{}", "images/{}")


def layout(folder: Path, split: str) -> tuple[Path, Path] | None:
    """The JSON file and the folder of images of a split, in one of the usual layouts; None where there is none."""
    for name in (split, f"{split}2017"):
        for json_file, images in ((folder / a.format(name), folder / b.format(name)) for a in _JSON for b in _IMAGES):
            if json_file.is_file() and images.is_dir():
                return json_file, images
    return None


def open_coco(path: Path, folder: Path, split: str, data: Annotations, classes: Classes | None) -> Annotated:
    """classes: those of the training split, which other splits have to share."""
    content = _content(path)
    ids, names = classes or _classes(path, content["categories"])
    if classes:
        _check_same(path, _classes(path, content["categories"]), classes)
    images = content["images"][: data.limit]
    number = {_known(image, "id", path): place for place, image in enumerate(images)}
    if len(number) < len(images):
        raise UserError(f"{path}: two images have the same id: mend it.")
    _check_files(path, folder, [_known(image, "file_name", path) for image in images])
    every = {_known(image, "id", path) for image in content["images"]}
    of_image: list[list[dict[str, Any]]] = [[] for _ in images]
    for annotation in content["annotations"]:
        where = _checked(annotation, path, every, set(ids))
        if where in number:
            of_image[number[where]].append(annotation)
    sizes = [_size(image, path) for image in images]
    convention = settle(_evidence(of_image, sizes, path), str(path), data.box_format, usual="xywh")
    label = {id_: place for place, id_ in enumerate(ids)}
    objects = [_objects(some, label, size, convention) for some, size in zip(of_image, sizes, strict=True)]
    rows = [{"image": {"bytes": None, "path": str(folder / image["file_name"])}} for image in images]
    repeated = len(images) - len({image["file_name"] for image in images})
    return Annotated(Source(path.name, rows, "image", None, 0), objects, names, ids, split, sizes, [*number], repeated)


def _content(path: Path) -> dict[str, list[dict[str, Any]]]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({type(error).__name__}): check data.path.") from error
    for part in ("images", "annotations", "categories"):
        entries = content.get(part) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f"{path} has no list of {part}, so it is no detection data set in COCO's format.")
        if not entries:
            raise UserError(f"{path} has an empty list of {part}: there is nothing to learn or to test.")
    return content


def _known(entry: dict[str, Any], name: str, path: Path) -> Any:
    """A field that an entry has to have: a whole number, or text for names."""
    value = entry.get(name)
    if not isinstance(value, str if "name" in name else int) or isinstance(value, bool):
        raise UserError(f"{path}: an entry has no {name}, or a wrong one ({str(value)[:40]}): {str(entry)[:80]}")
    return value


def _classes(path: Path, categories: list[dict[str, Any]]) -> Classes:
    ids, names = (tuple(_known(one, name, path) for one in categories) for name in ("id", "name"))
    if len(set(ids)) < len(ids):
        raise UserError(f"{path}: two categories have the same id: mend it.")
    return ids, names


def _check_same(path: Path, own: Classes, classes: Classes) -> None:
    known = dict(zip(*classes, strict=True))
    for id_, name in zip(*own, strict=True):
        if known.get(id_) != name:
            other = f"calls it {known[id_]}" if id_ in known else "lacks it"
            raise UserError(f"{path} has category {id_}, {name}; the training split {other}: give splits of one kind.")


def _check_files(path: Path, folder: Path, names: Sequence[str]) -> None:
    """All files have to be there: of another data set none would be."""
    for name in names:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise UserError(f"{path}: {name} leaves the folder of images: mend it.")
    present = {str(file.relative_to(folder).as_posix()) for file in _files(folder, any("/" in name for name in names))}
    missing = [name for name in names if name not in present]
    if missing:
        count = "none" if len(missing) == len(names) else f"only {len(names) - len(missing):,}"
        raise UserError(
            f"{count} of the {len(names):,} images of {path} are in {folder} (the first one missing: {missing[0]}): "
            "is it the JSON of another data set?"
        )


def _files(folder: Path, deep: bool) -> Iterator[Path]:
    return folder.rglob("*") if deep else folder.iterdir()


def _size(image: dict[str, Any], path: Path) -> Pair:
    size = (_known(image, "height", path), _known(image, "width", path))
    if min(size) < 1 or size[0] * size[1] > MOST_PIXELS:
        shown = " × ".join(str(side)[:20] for side in size[::-1])
        raise UserError(f"{path}: image {image['id']} has {shown} pixels, none or too many: mend it.")
    return size


def _checked(annotation: dict[str, Any], path: Path, images: set[int], categories: set[int]) -> int:
    """The image of an annotation that has all it needs."""
    image, category = (_known(annotation, name, path) for name in ("image_id", "category_id"))
    box, area, crowd = (annotation.get(name) for name in ("bbox", "area", "iscrowd"))
    fault = None
    if image not in images:
        fault = f"is of image {str(image)[:40]}, which is not in its images"
    elif category not in categories:
        fault = f"is of category {str(category)[:40]}, which is not in its categories"
    elif not is_box(box):
        fault = "has no bbox of four numbers: mend it"
    elif not is_area(area):
        fault = f"has the area {str(area)[:40]}, which is none: mend it, or leave it out for its box's"
    elif crowd not in (None, 0, 1):
        fault = f"has iscrowd {repr(crowd)[:40]}, which is neither 0 nor 1: mend it"
    if fault:
        raise UserError(f"{path}: annotation {str(annotation.get('id'))[:40]} {fault}.")
    return image


def _evidence(of_image: list[list[dict[str, Any]]], sizes: list[Pair], path: Path) -> Evidence:
    """All boxes, their areas, and of some the box around the mask; a mask that is none is named."""
    every = [(one, size) for some, size in zip(of_image, sizes, strict=True) for one in some]
    if not every:
        raise UserError(f"{path} has no annotations of these images: there is nothing to learn or to test.")
    around = np.full((len(every), 4), np.nan)
    spread = max(1, len(every) // LOOKED_AT)
    for place, (one, size) in enumerate(every):
        if one.get("segmentation") in (None, []):  # exported without a mask
            continue
        if fault := masks.fault(one["segmentation"], size):
            raise UserError(f"{path}: the segmentation of annotation {one.get('id')} {fault}: mend it.")
        if place % spread == 0:
            around[place] = masks.box_around(one["segmentation"], size)
    boxes = np.array([one["bbox"] for one, _ in every], float)
    empty = ~(around[:, 2:] > around[:, :2]).all(1)
    around[empty] = np.nan
    areas = np.array([_area(one) for one, _ in every])
    return Evidence(boxes, np.array([size for _, size in every], float), areas, around)


def _area(annotation: dict[str, Any]) -> float:
    area = annotation.get("area")
    return np.nan if area is None else float(area)


def _objects(annotations: list[dict[str, Any]], label: dict[int, int], size: Pair, convention: Convention) -> Objects:
    boxes = np.array([one["bbox"] for one in annotations], float).reshape(-1, 4)
    boxes = corners(boxes, convention, np.array([size] * len(boxes), float).reshape(-1, 2))
    areas = np.array([_area(one) for one in annotations], float)
    return Objects(
        boxes,
        np.array([label[one["category_id"]] for one in annotations], int),
        np.array([bool(one.get("iscrowd", 0)) for one in annotations], bool),
        np.where(np.isnan(areas), (boxes[:, 2:] - boxes[:, :2]).prod(1), areas),
        [one.get("segmentation") or None for one in annotations],
    )
