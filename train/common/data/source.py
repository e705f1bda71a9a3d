"""Images by number: a data set of the Hub, Parquet, a folder, or scenes → random crops, uint8 (3, S, S).

Whatever format an image has, it becomes 8-bit RGB, upright, its first frame. One that cannot be read is replaced by
the next and reported.
"""

import hashlib
import io
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN as IMAGENET_MEAN
from timm.data import IMAGENET_DEFAULT_STD as IMAGENET_STD
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from timm_dseq import UserError
from timm_dseq.host import to_device

from .crops import box_draws, crop_boxes
from .order import sample_seeds
from .scenes import LABELS as SCENE_LABELS
from .scenes import LENGTHS, Scenes
from .settings import Data

LABELS = ("label", "labels", "cls", "class", "fine_label", "target")
IMAGES = ("image", "img", "jpg", "png", "webp", "jpeg")
TRIES = 100  # unreadable images in a row that end a run

Item = tuple[torch.Tensor, tuple[int, int], list[str]]  # a crop (3, S, S) uint8, (epoch, index), what is broken

warnings.filterwarnings("ignore", message="Palette images with Transparency", module="PIL")


@dataclass(frozen=True)
class Source:
    """One split of a data set, by number."""

    name: str
    rows: Sequence[dict[str, Any]]  # images as {"bytes", "path"} or PIL images
    image: str
    label: str | None
    classes: int
    truth: torch.Tensor | None = None  # the labels, where they do not stand in the rows, or were read before

    def __len__(self) -> int:
        return len(self.rows)

    def picture(self, index: int) -> Image.Image:
        """Upright 8-bit RGB; raises what PIL raises where it cannot be read."""
        return decode(self.rows[index][self.image])

    def labels(self, indices: Sequence[int]) -> torch.Tensor:
        if self.truth is not None:
            return self.truth[list(indices)]
        return torch.tensor([int(self.rows[i][self.label]) for i in indices])

    def where(self, index: int) -> str:
        """Where a user finds the image."""
        value = self.rows[index][self.image]
        path = value.get("path") if isinstance(value, dict) else None
        return f"{path} (row {index})" if path else f"row {index}"

    def fingerprint(self) -> str:
        """The data set in a few digits: its length and some of its images. It tells when a resume reads others."""
        digest = hashlib.blake2b(str(len(self)).encode(), digest_size=8)
        for index in range(0, len(self), max(1, len(self) // 16)):
            value = self.rows[index][self.image]
            if isinstance(value, dict):
                digest.update(value["bytes"] or Path(value["path"]).read_bytes())
            else:
                digest.update(value.tobytes())
        return digest.hexdigest()


def open_source(data: Data, split: str | None = None, columns: Sequence[str] = ()) -> Source:
    """A split of the data set that the settings name (default: that to train on), or one line that says what fails.

    columns: others to keep, where they are there.
    """
    split = split or data.split
    if data.path == "scenes":
        if split not in LENGTHS:
            raise UserError(f"scenes has no split {split!r}: choose train or test.")
        label = data.label or "label"
        if label not in SCENE_LABELS:
            raise UserError(f"scenes has no label {label!r}: choose one of {', '.join(SCENE_LABELS)}.")
        return Source("scenes", Scenes(split), "image", label, SCENE_LABELS[label])
    rows = load(data, split)
    if not len(rows):
        raise UserError(f"{data.path}, split {split}, is empty: check data.path and data.split.")
    source = source_of(data, rows, rows)
    kept = [column for column in rows.features if column in (source.image, source.label, *columns)]
    return replace(source, rows=rows.cast_column(source.image, datasets.Image(decode=False)).select_columns(kept))


def source_of(data: Data, described: Any, rows: Sequence[dict[str, Any]]) -> Source:
    """Rows with the columns that their data set's description, or the settings, name."""
    image = image_column(described, data)
    label, classes = _label_column(described, data, rows)
    return Source(Path(data.path).name, rows, image, label, classes)


def load(data: Data, split: str, streaming: bool = False) -> Any:
    """The data set as `datasets` gives it."""
    path = Path(data.path)
    if path.is_file() and path.suffix == ".parquet":
        source = {"path": "parquet", "data_files": {split: str(path)}}
    elif path.exists() and not path.is_dir():
        raise UserError(f"{path} is no data set: give a folder, a .parquet file, or a name on the Hub.")
    elif (path / f"{split}.parquet").is_file():
        source = {"path": "parquet", "data_files": {split: str(path / f"{split}.parquet")}}
    elif (path / split).is_dir():  # as it is named, where `datasets` would guess
        source = {"path": data.path, "name": data.config, "data_files": {split: f"{split}/**"}}
    elif path.is_dir() or not (path.is_absolute() or data.path.startswith(".") or path.suffix):
        source = {"path": data.path, "name": data.config}
    else:
        raise UserError(f"{path} does not exist: check data.path.")
    try:
        return datasets.load_dataset(**source, split=split, streaming=streaming)
    except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:200]
        if "corresponds to no data" in reason:
            raise UserError(f"{data.path}, split {split}, is empty: check data.path and data.split.") from error
        raise UserError(f"{data.path}, split {split}, cannot be opened ({reason}): check data.path.") from error


def test_split(path: str, name: str | None) -> str | None:
    """The split of a data set that others than the training are tested on, if it has one."""
    if Path(path).is_file():
        return None
    splits = datasets.get_dataset_split_names(path, name)
    return next((split for split in ("validation", "val", "valid", "test") if split in splits), None)


def image_column(rows: Any, data: Data) -> str:
    features = rows.features or {}
    if data.image:
        if data.image not in features:
            raise UserError(f"{data.path} has no column {data.image!r}: data.image is one of {', '.join(features)}.")
        return data.image
    found = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    found = found or [name for name in IMAGES if name in features]
    preferred = [name for name in IMAGES if name in found] or found
    if not preferred:
        raise UserError(f"{data.path} has no image column: name one with data.image, of {', '.join(features)}.")
    return preferred[0]


def _label_column(described: Any, data: Data, rows: Sequence) -> tuple[str | None, int]:
    features = described.features or {}
    if data.label and data.label not in features:
        raise UserError(f"{data.path} has no column {data.label!r}: data.label is one of {', '.join(features)}.")
    name = data.label or next((name for name in LABELS if name in features), None)
    if name is None:
        return None, 0
    kind = features[name]
    if isinstance(kind, datasets.ClassLabel):
        return name, kind.num_classes
    if isinstance(kind, datasets.Value) and "int" in kind.dtype:
        return name, 1 + max(rows[name] if hasattr(rows, "features") else (row[name] for row in rows))
    if data.label:
        raise UserError(f"{data.path}: column {name!r} holds no classes: data.label has to name whole numbers.")
    return None, 0


def opened(value: Any) -> Image.Image:
    """An encoded image, {"bytes", "path"}, or a PIL image, as PIL opens it: it has a size, its pixels are not read."""
    if isinstance(value, dict):
        return Image.open(io.BytesIO(value["bytes"]) if value["bytes"] else value["path"])
    return value


def decode(value: Any, larger: float = 1.0) -> Image.Image:
    """An encoded image, {"bytes", "path"}, or a PIL image → 8-bit RGB, upright, its first frame.

    larger: how many times more pixels a side has than anybody wants. A JPEG is then decoded at 1/2, 1/4 or 1/8 of its
    size, as far as all that is wanted stays; it costs less.
    """
    image = opened(value)
    if shrink := next((n for n in (8, 4, 2) if n <= larger), None):
        image.draft(image.mode, (max(1, image.width // shrink), max(1, image.height // shrink)))  # others ignore it
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "I;16", "I;16B", "I;16L"):  # 16 bits, which convert() would clip
        image = image.convert("I").point(lambda x: x / 257).convert("L")
    return image.convert("RGB")


def measured(value: Any) -> tuple[Image.Image, tuple[int, int]]:
    """An image for `decode`, and its height and width upright. A JPEG that lies upright is not decoded yet."""
    image = opened(value)
    if image.format != "JPEG" or image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = decode(image)
    return image, (image.height, image.width)


class Crops(Dataset):
    """`crops[epoch, index]`: an image's crop in an epoch, (3, S, S) uint8, and what could not be read on the way."""

    def __init__(self, source: Source | None, size: int, scale: tuple[float, float], seed: int) -> None:
        self.source, self.size, self.scale, self.seed = source, size, scale, seed

    def __getitem__(self, sample: tuple[int, int]) -> Item:
        return self.__getitems__([sample])[0]

    def __getitems__(self, samples: list[tuple[int, int]]) -> list[Item]:
        return [self._item(sample, draws) for sample, draws in zip(samples, self.draws(samples), strict=True)]

    def draws(self, samples: list[tuple[int, int]]) -> np.ndarray:
        """What the samples' boxes are made of: (B, 10, 4)."""
        return box_draws(sample_seeds(self.seed, torch.tensor(samples)), self.scale)

    def _item(self, sample: tuple[int, int], draws: np.ndarray) -> Item:
        broken = []
        for step in range(TRIES):
            at = (sample[1] + step) % len(self.source)
            try:
                return self.cut(self.source.rows[at][self.source.image], draws), sample, broken
            except Exception as error:  # PIL's readers raise almost anything on damaged files
                broken.append(f"{self.source.where(at)}: {type(error).__name__}: {error}")
        return torch.zeros(0), sample, broken

    def cut(self, value: Any, draws: np.ndarray) -> torch.Tensor:
        """A sample's crop of an image, by its draws (10, 4): (3, S, S) uint8."""
        image, whole = measured(value)
        ((top, left, height, width),) = crop_boxes(draws[None], np.array([whole])).tolist()
        picture = decode(image, min(height, width) / self.size)
        size, bicubic = (self.size, self.size), Image.Resampling.BICUBIC
        shrunk = round(whole[1] / picture.width)
        if shrunk == 1:
            crop = picture.crop((left, top, left + width, top + height)).resize(size, bicubic)
        else:  # the box lies between pixels
            box = (left, top, left + width, top + height)
            crop = picture.resize(size, bicubic, box=tuple(edge / shrunk for edge in box))
        return pil_to_tensor(crop)


def collate(items: list) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Images (B, 3, S, S) uint8, (epoch, index) (B, 2), and what could not be read. No images where one is lost."""
    images, samples, broken = zip(*items, strict=True)
    if lost := next((lines for image, lines in zip(images, broken, strict=True) if not image.numel()), None):
        return torch.zeros(0), torch.zeros(0), lost
    return torch.stack(images), torch.tensor(samples), [where for some in broken for where in some]


def readable(loader: Iterable) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[str]]]:
    """What a loader gives, as long as no image is lost. What workers raise would reach a user as a traceback."""
    for images, samples, broken in loader:
        if not len(images):
            count = len(set(broken))
            raise UserError(f"{count} images in a row cannot be read, the first {broken[0]}: is this an image column?")
        yield images, samples, broken


def normalised(images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """uint8 (B, 3, H, W) → ImageNet's mean and standard deviation."""
    mean, std = _statistics(dtype, images.device)
    return images.to(dtype).sub_(mean).div_(std)


@lru_cache
def _statistics(dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Of levels from 0 to 255."""
    both = (255 * torch.tensor(x, dtype=dtype) for x in (IMAGENET_MEAN, IMAGENET_STD))
    mean, std = (to_device(x, device)[:, None, None] for x in both)
    return mean, std
