"""Finds and opens the two splits of a labelled data set."""

import difflib
from dataclasses import replace
from pathlib import Path

import torch

from timm_dseq import UserError

from ..data.opening import TEST_SPLITS, test_split
from ..data.settings import Data
from ..data.source import Source, open_source
from . import clevr
from .aliases import ALIASES, Alias
from .settings import Labels


def open_train_and_test(data: Labels, alias: Alias, path: str) -> tuple[Source, Source]:
    """Both splits with their labels read, each in its own numbering of classes. path: of the data set itself."""
    folder = Path(path)
    test = _test_split(data, alias, path)
    label = data.label or alias.label
    task = alias.task if folder.is_dir() else None
    task = task or (data.label if data.scenes else None)
    if data.scenes and task not in clevr.TASKS:
        raise UserError(f"data.scenes: data.label has to name what is computed, {' or '.join(clevr.TASKS)}.")
    columns = Data(path=path, config=data.config or alias.config, image=data.image or alias.image, label=label)
    train, test = (_open_split(data, columns, split, task) for split in (data.train or alias.train, test))
    return train, test


def _test_split(data: Labels, alias: Alias, path: str) -> str:
    """The name of the test split, or its Parquet file: the one that is asked for, the alias's, or one that exists."""
    folder, test = Path(path), data.test or alias.test
    if folder.is_dir():
        if data.test or _has_split(folder, test):
            return test
        found = next((name for name in TEST_SPLITS if _has_split(folder, name)), None) or test_split(path, None)
    else:
        near = difflib.get_close_matches(path, ALIASES, 1)
        mend = f"check data.path, or did you mean {near[0]}?" if near else "check data.path."
        found = test or ("test" if path == "scenes" else test_split(path, data.config, mend))
    if not found:
        raise UserError(f"{data.path} has no split to test on: name one, or a Parquet file, as data.test.")
    return found


def _has_split(folder: Path, split: str) -> bool:
    return bool(split) and ((folder / split).is_dir() or (folder / f"{split}.parquet").is_file())


def _open_split(data: Labels, columns: Data, split: str, task: str | None) -> Source:
    """One split with its labels: those of a column, or computed for a task of CLEVR."""
    source = _open_clevr(data, columns, split, task) if task else None
    if source is None:
        source = open_source(_located(columns, split))
    if source.label is None:
        hint = ""
        if Path(columns.path).is_dir():
            hint = " In a folder of images, each class is a folder, and there have to be two."
        raise UserError(f"{data.path}, split {split}, has no column of classes: name it as data.label.{hint}")
    source = replace(source, name=split, truth=source.all_labels())
    if fault := source.label_fault():
        raise UserError(f"{data.path}, split {split}: {fault}: take another split.")
    return source


def _open_clevr(data: Labels, columns: Data, split: str, task: str) -> Source | None:
    """A split of the official archive, or one that has a column of scenes; None for one that has labels instead."""
    folder = Path(columns.path)
    if clevr.scene_file(folder, split).is_file():
        rows, labels = clevr.official(folder, split, task)
        source = Source(folder.name, rows, "image", None, 0)
    else:
        column = data.scenes or "scene"
        located = replace(_located(columns, split), label=None)
        source = open_source(located, others=[column])
        features = getattr(source.rows, "features", {})
        if column not in features and data.scenes:
            raise UserError(f"{located.path} has no column {column!r}: data.scenes is one of {', '.join(features)}.")
        if column not in features:
            return None
        labels = clevr.labels_of(source.rows[column][:], task)
    names = tuple(map(str, range(clevr.TASKS[task])))
    return replace(source, label=task, classes=len(names), truth=torch.tensor(labels), names=names)


def _located(columns: Data, split: str) -> Data:
    """Where a split is: a Parquet file of its own, or in the data set."""
    if Path(split).suffix == ".parquet" and Path(split).is_file():
        return replace(columns, path=split, split="train")
    return replace(columns, split=split)
