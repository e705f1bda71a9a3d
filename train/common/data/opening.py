"""Opens a split of a data set, numbered or as a stream, and finds its columns; every mistake is one line."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.compute

from timm_dseq import UserError
from timm_dseq.hub.download import patiently

from .settings import Data

IMAGES = ("image", "img", "jpg", "png", "webp", "jpeg")
LABELS = ("label", "labels", "cls", "class", "fine_label", "target")
SUFFIXES = tuple(f".{suffix}" for suffix in ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm"))
TEST_SPLITS = ("validation", "val", "valid", "test")


@contextmanager
def opening(name: str, mend: str = "check data.path.") -> Iterator[None]:
    """Turn what `datasets`, its file readers and its network clients raise, which is almost anything, into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if "corresponds to no data" in str(error):
            raise UserError(f"{name} is empty: check data.path and data.split.") from error
        raise UserError(f"{name} cannot be opened ({one_line(error)}): {mend}") from error


def one_line(error: Exception) -> str:
    """An error of another library, short enough to be part of a line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def open_rows(
    data: Data, split: str, others: Sequence[str] = (), streaming: bool = False, labels: bool = True
) -> tuple[Any, str, str | None]:
    """A split with its images still encoded, the column of the images, and that of the labels, if there is one.

    others: columns to keep as well, where they exist. labels: whether to keep that of the labels.
    """
    with opening(f"{data.path}, split {split},"):
        load = partial(datasets.load_dataset, **_location(data, split), split=split, streaming=streaming)
        rows = _asked(data.path, load)
        if rows.features is None:  # a stream that does not tell: its first row does
            rows = rows._resolve_features()
        if not streaming and not len(rows):
            raise UserError(f"{data.path}, split {split}, is empty: check data.path and data.split.")
        image, label = _image_column(rows.features, data), _label_column(rows.features, data)
        wanted = (image, label if labels else None, *others)
        kept = [column for column in rows.features if column in wanted]
        rows = rows.cast_column(image, datasets.Image(decode=False)).select_columns(kept)
        if not streaming and of_the_hub(data.path):
            _check_no_foreign_paths(data.path, rows.data.column(image))
        if not streaming and (lost := left_out(Path(data.path), split, rows, image)):
            print(f"left out: {len(lost)} files of {data.path}, such as {str(lost[0])!r}: look what they are")
        return rows, image, label


def of_the_hub(path: str) -> bool:
    """Whether data.path names a data set of others, and nothing on this machine."""
    return not Path(path).exists()


def _asked(path: str, work: Callable[[], Any]) -> Any:
    """What `work` returns. Of the Hub: or one line, if no more arrives. Other processes wait for the first one's."""
    if not of_the_hub(path) or os.environ.get("LOCAL_RANK", "0") != "0":
        return work()
    return patiently(work, path, computing=True)


def _check_no_foreign_paths(path: str, images: pyarrow.ChunkedArray) -> None:
    """Of {"bytes", "path"}: a data set of others brings its images, or keeps them among what was downloaded. Its
    pictures may be published, so it names no other file of this machine."""
    empty = pyarrow.compute.is_null(pyarrow.compute.struct_field(images, "bytes"))
    names = pyarrow.compute.struct_field(images, "path").filter(empty).to_pylist()
    config = datasets.config
    caches = (config.HF_CACHE_HOME, config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH)
    downloaded = {whole(place) for place in caches for whole in (os.path.abspath, os.path.realpath)}
    for name in filter(None, names):
        if not any(Path(os.path.abspath(name)).is_relative_to(place) for place in downloaded):
            raise UserError(
                f"{path} names {name}, a file of this machine, as one of its images: take another data set."
            )


def left_out(folder: Path, split: str, rows: datasets.Dataset, image: str) -> list[Path]:
    """What is named like an image in a folder of images, and is not in the rows: links to nothing, FIFOs, names with
    odd letters. `datasets` passes them over in silence. In a process that is not the first: nothing."""
    if os.environ.get("RANK", "0") != "0" or not folder.is_dir():
        return []
    found = pyarrow.compute.struct_field(rows.data.column(image), "path").to_pylist()
    known = {name for name in found if name and os.path.isabs(name)}
    if not known:  # the images are in other files
        return []
    folder = folder / split if (folder / split).is_dir() else folder
    lost = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        images = [Path(place, name) for name in names if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
        lost += [path for path in images if os.path.abspath(path) not in known]
    if lost:  # the folder may be a link, and its files known by another name
        known = set(map(os.path.realpath, known))
    return [path for path in lost if os.path.realpath(path) not in known]


def test_split(path: str, config: str | None, mend: str = "check data.path.") -> str | None:
    """The split that a data set is tested on, by its name, if there is one. mend: what to do if it cannot be opened."""
    if Path(path).is_file():
        return None
    with opening(path, mend):
        splits = _asked(path, partial(datasets.get_dataset_split_names, path, config))
    return next((split for split in TEST_SPLITS if split in splits), None)


def _location(data: Data, split: str) -> dict[str, Any]:
    """Where a split is, as arguments of `load_dataset`."""
    if not data.path:
        raise UserError("data.path is empty: name a data set.")
    path = Path(data.path)
    if path.is_file() and path.suffix == ".parquet":
        return {"path": "parquet", "data_files": {split: str(path)}}
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is no data set: give a folder, a .parquet file, or a name on the Hub.")
    if (path / f"{split}.parquet").is_file():
        return {"path": "parquet", "data_files": {split: str(path / f"{split}.parquet")}}
    if (path / split).is_dir():  # `datasets` would guess from the names of other folders
        return {"path": data.path, "name": data.config, "data_files": {split: f"{split}/**"}}
    if path.is_dir() or not (path.is_absolute() or data.path.startswith(".") or path.suffix):
        return {"path": data.path, "name": data.config}
    raise UserError(f"{path} does not exist: check data.path.")


def _image_column(features: datasets.Features, data: Data) -> str:
    if data.image and data.image not in features:
        raise UserError(f"{data.path} has no column {data.image!r}: data.image is one of {', '.join(features)}.")
    if data.image:
        if not _may_hold_images(features[data.image]):
            held = _in_words(features[data.image])
            raise UserError(f"{data.path}: column {data.image!r} holds {held}, no images: data.image names another.")
        return data.image
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    images = images or [name for name in IMAGES if name in features and _may_hold_images(features[name])]
    if not images:
        raise UserError(f"{data.path} has no image column: name one with data.image, of {', '.join(features)}.")
    return next((name for name in IMAGES if name in images), images[0])


def _may_hold_images(kind: Any) -> bool:
    """Whether `datasets` can take a column of this type for encoded images, or for their paths."""
    if not isinstance(kind, (datasets.Image, datasets.Value, dict)):  # of lists it makes images, of numbers in order
        return False
    storage = datasets.Features({"column": kind}).arrow_schema.field("column").type
    try:
        datasets.Image(decode=False).cast_storage(pyarrow.array([], storage))
    except (pyarrow.ArrowException, TypeError, ValueError):
        return False
    return True


def _label_column(features: datasets.Features, data: Data) -> str | None:
    if data.label and data.label not in features:
        raise UserError(f"{data.path} has no column {data.label!r}: data.label is one of {', '.join(features)}.")
    name = data.label or next((name for name in LABELS if name in features), None)
    kind = features[name] if name else None
    if (
        isinstance(kind, datasets.ClassLabel)
        or is_text(kind)
        or (isinstance(kind, datasets.Value) and "int" in kind.dtype)
    ):
        return name
    if data.label:
        held = _in_words(kind)
        raise UserError(
            f"{data.path}: column {name!r} holds {held}, no classes: data.label has to name whole numbers or names."
        )
    return None


def is_text(kind: Any) -> bool:
    """Whether a column of this type holds words, such as names of classes."""
    return isinstance(kind, datasets.Value) and kind.dtype in ("string", "large_string", "string_view")


def _in_words(kind: Any) -> str:
    """A column's type, for a user."""
    return kind.dtype if isinstance(kind, datasets.Value) else f"a {type(kind).__name__} in each row"
