"""Opens the training and the test split of annotated images, whatever they are stored in."""

from pathlib import Path

import numpy as np
from PIL import Image

from timm_dseq import UserError

from ...data.opening import TEST_SPLITS, test_split
from ...data.scenes import FORMS, LENGTHS, Scenes
from ...data.source import Source
from .. import masks
from ..annotated import Annotated, Classes, Objects
from ..settings import Annotations
from .coco import layout, open_coco
from .rows import open_objects

SCENES = 1024  # of each split of `scenes`, unless data.limit names another number


def open_annotated(data: Annotations) -> tuple[Annotated, Annotated]:
    """Both splits, checked, with one numbering of classes."""
    train = _open(data, data.train or "train", data.images, None)
    test = _open(data, data.test or _test_split(data), data.test_images, (train.ids, train.names))
    for one in (train, test):
        one.check()
    return train, test


def _test_split(data: Annotations) -> str:
    path = Path(data.path)
    if data.path == "scenes":
        return "test"
    if path.suffix == ".json":
        raise UserError(f"data.path={path} is one JSON file: name that of the test images with data.test.")
    found = next((split for split in TEST_SPLITS if path.is_dir() and layout(path, split)), None)
    found = found or (None if _is_coco(data) else test_split(data.path, data.config))
    if not found:
        raise UserError(f"{data.path} has no split {' or '.join(TEST_SPLITS)}: name one with data.test.")
    return found


def _is_coco(data: Annotations) -> bool:
    path = Path(data.path)
    return path.suffix == ".json" or (path.is_dir() and layout(path, data.train or "train") is not None)


def _open(data: Annotations, split: str, images: str | None, classes: Classes | None) -> Annotated:
    """classes: those of the training split; None for itself."""
    if data.path == "scenes":
        return _scenes(split, data.limit)
    if not _is_coco(data):
        return open_objects(data, split, classes)
    named = split if classes else data.path
    if not named.endswith(".json") and data.path.endswith(".json"):
        raise UserError(f"data.test={named} is no JSON file, and data.path is one: name that of the test images.")
    if not named.endswith(".json"):
        found = layout(Path(data.path), split)
        if found is None:
            raise UserError(f"{data.path} has no instances_{split}.json with a folder {split}: name another split.")
        return open_coco(*found, split, data, classes)
    if not Path(named).is_file():
        raise UserError(f"{named} does not exist: check data.path and data.test.")
    if not images or not Path(images).is_dir():
        setting = "data.test_images" if classes else "data.images"
        raise UserError(f"{setting}={images} is no folder: name that of the images of {named}.")
    return open_coco(Path(named), Path(images), Path(named).stem, data, classes)


def _scenes(split: str, limit: int | None) -> Annotated:
    """Scenes drawn by this project; a shape's form is its class."""
    if split not in LENGTHS:
        raise UserError(f"scenes has no split {split!r}: choose train or test.")
    scenes = Scenes(split, limit or SCENES)
    objects = [_shapes(scenes.drawn(index)[1]) for index in range(len(scenes))]
    source = Source("scenes", scenes, "image", None, 0)
    sizes = [scenes[0]["image"].size] * len(scenes)  # squares
    return Annotated(source, objects, FORMS, tuple(range(len(FORMS))), split, sizes, range(len(scenes)))


def _shapes(shapes: list[tuple[str, Image.Image]]) -> Objects:
    bitmaps = [np.array(mask) > 0 for _, mask in shapes]
    codes = [masks.code(bitmap) for bitmap in bitmaps]
    boxes = np.stack([masks.box_around(one, tuple(one["size"])) for one in codes])
    labels = np.array([FORMS.index(form) for form, _ in shapes])
    areas = np.array([bitmap.sum() for bitmap in bitmaps], float)
    return Objects(boxes, labels, np.zeros(len(labels), bool), areas, codes)
