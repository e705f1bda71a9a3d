"""Opens the training and the test split of images with masks: of the Hub, Parquet files, two folders, or scenes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
from PIL import Image

from timm_dseq import UserError

from ..data.opening import TEST_SPLITS, open_rows, test_split
from ..data.scenes import FORMS, LENGTHS, Scenes
from ..data.settings import Data
from ..data.source import Source
from .settings import Masks

# A word for a known data set; what the user gives wins.
ALIASES = {
    "ade20k": Masks(
        "danjacobellis/scene_parse_150",
        image="image",
        mask="annotation",
        train="train",
        test="validation",
        ignore=[0, 255],  # 0: other
        names=str(Path(__file__).with_name("ade20k.json")),
    )
}
# Where folders keep the images and the masks of a split, in the order in which they are looked for.
LAYOUTS = (
    ("images/{}", "masks/{}"),
    ("images/{}", "annotations/{}"),
    ("{}/images", "{}/masks"),
    ("{}", "semantic_{}"),
)
COLUMNS = ("mask", "annotation", "segmentation", "semantic", "semantic_mask", "label", "labels", "label_map")
NAMES = ("names.json", "semantic_names.json")
SCENE_NAMES = ("ground", *FORMS)


@dataclass(frozen=True)
class Masked:
    """One split: images and their masks, by number."""

    images: Source
    masks: Source
    split: str

    def __len__(self) -> int:
        return len(self.images)

    def fingerprint(self) -> str:
        """Of the images and the masks."""
        return f"{self.images.fingerprint()} {self.masks.fingerprint()}"


def resolved(data: Masks) -> Masks:
    """The settings with what the data set's word stands for, and names and ignored ids found where none are given."""
    word, _, folder = data.path.partition(":")
    known = None if Path(data.path).exists() else ALIASES.get(word)
    if known:
        if folder and not Path(folder).is_dir():
            raise UserError(f"data.path={data.path}: {folder} is no folder.")
        if folder:  # a copy may have other columns and splits: they are found
            known = replace(known, path=folder, image=None, mask=None, train=None, test=None)
        given = {name: value for name, value in vars(data).items() if value is not None and name != "path"}
        data = replace(known, **given)
    names = next((str(path) for name in NAMES if (path := Path(data.path) / name).is_file()), None)
    return replace(data, ignore=[255] if data.ignore is None else data.ignore, names=data.names or names)


def open_masked(data: Masks) -> tuple[Masked, Masked]:
    """Both splits of resolved settings, or one line on what is wrong."""
    train = data.train or next((name for name in ("train", "training") if _layout(data, name)), "train")
    return _open(data, train), _open(data, data.test or _test_split(data))


def _test_split(data: Masks) -> str:
    folder = Path(data.path)
    if data.path == "scenes":
        return "test"
    here = [name for name in TEST_SPLITS if _layout(data, name) or (folder / f"{name}.parquet").is_file()]
    layouts = any(_layout(data, name) for name in ("train", "training"))
    found = here[0] if here else None if layouts else test_split(data.path, data.config)
    if not found:
        raise UserError(f"{data.path} has no split to test on: name one, or a Parquet file, as data.test.")
    return found


def _open(data: Masks, split: str) -> Masked:
    image, mask = "image", "mask"
    if data.path == "scenes":
        if split not in LENGTHS:
            raise UserError(f"scenes has no split {split!r}: choose train or test.")
        rows = SceneMasks(split, min(data.limit or LENGTHS[split], LENGTHS[split]))
    elif folders := _layout(data, split):
        rows = _paired(*folders)[: data.limit]
    else:
        rows, image, mask = _columns(data, split)
        rows = rows.select(range(min(data.limit or len(rows), len(rows))))
    images = Source(split, rows, image, None, 0)
    return Masked(images, replace(images, image=mask), split)


def _columns(data: Masks, split: str) -> tuple[datasets.Dataset, str, str]:
    """The rows of a split with images and masks still encoded, and the names of their columns."""
    place = Data(path=data.path, config=data.config, image=data.image)
    if Path(split).suffix == ".parquet" and Path(split).is_file():
        place, split = replace(place, path=split), "train"
    rows, image, _ = open_rows(place, split, [data.mask] if data.mask else COLUMNS, labels=False)
    kinds = {name: kind for name, kind in rows.features.items() if name != image}
    mask = data.mask if data.mask in kinds else None
    mask = mask or next((name for name in COLUMNS if isinstance(kinds.get(name), datasets.Image)), None)
    if not mask:
        raise UserError(
            f"{place.path}, split {split}, has no column of masks: name it as data.mask, or the folders of images and "
            "masks as data.image and data.mask, {} for the split."
        )
    try:
        return rows.cast_column(mask, datasets.Image(decode=False)).select_columns([image, mask]), image, mask
    except (pyarrow.ArrowException, TypeError, ValueError) as error:
        raise UserError(f"{place.path}: column {mask!r} holds no masks: data.mask names another.") from error


def _layout(data: Masks, split: str) -> tuple[Path, Path] | None:
    """The folders of images and of masks of a split, if the data set is a folder that has them."""
    root, asked = Path(data.path), (data.image or "", data.mask or "")
    layouts = [asked] if all("{}" in part for part in asked) else LAYOUTS
    folders = [tuple(root / part.replace("{}", split) for part in layout) for layout in layouts]
    return next((pair for pair in folders if all(folder.is_dir() for folder in pair)), None)


def _paired(images: Path, masks: Path) -> list[dict[str, Any]]:
    """Rows of the images and masks in two folders whose paths are equal but for the suffix."""
    pictures, ids = _by_stem(images), _by_stem(masks)
    for own, other, where, lacking in ((pictures, ids, images, masks), (ids, pictures, masks, images)):
        if alone := sorted(own.keys() - other.keys()):
            raise UserError(
                f"{own[alone[0]]} has no file of its name in {lacking} ({len(alone)} such files in {where}): add them, "
                "or move these away."
            )
    if not pictures:
        raise UserError(f"{images} is empty: check data.path.")
    both = (("image", pictures), ("mask", ids))
    return [{kind: {"bytes": None, "path": str(files[stem])} for kind, files in both} for stem in pictures]


def _by_stem(folder: Path) -> dict[Path, Path]:
    """The files below a folder, by their path in it without the suffix."""
    files: dict[Path, Path] = {}
    for path in sorted(folder.rglob("[!.]*")):
        if path.is_file() and (other := files.setdefault(path.relative_to(folder).with_suffix(""), path)) != path:
            raise UserError(f"{other} and {path} differ in their suffix alone: move one away.")
    return files


class SceneMasks(Sequence):
    """The first scenes of a split; a mask says of each pixel whether it is ground, or the form of its shape."""

    def __init__(self, split: str, count: int) -> None:
        self.scenes, self.count = Scenes(split), count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Image.Image]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        scene, shapes = self.scenes.drawn(index)
        ids = np.zeros(scene["image"].size[::-1], np.uint8)
        for form, shape in shapes:
            ids[np.asarray(shape) > 0] = SCENE_NAMES.index(form)
        return {"image": scene["image"], "mask": Image.fromarray(ids)}
