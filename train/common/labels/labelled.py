"""A labelled data set: what is learnt from and what is tested on, checked before anything long begins."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute
import torch
from jsonargparse.typing import PositiveInt

from timm_dseq import UserError

from ..data.opening import test_split
from ..data.order import Draw, sample_seed
from ..data.settings import Data
from ..data.source import Source, open_source
from . import clevr
from .aliases import ALIASES, Alias


@dataclass
class Labels:
    """Labelled images.

    Args:
        path: an alias (labels/aliases.py), ALIAS:FOLDER, a data set of the Hub, a folder, a Parquet file, or `scenes`
        config: the data set's configuration, where it has several
        image: column of the images (found if not given)
        label: column of the classes (found if not given); with scenes, count or distance
        train: the split that is learnt from (default: train)
        test: the split, or a Parquet file, that is tested on (default: validation, else test)
        classes: how many there have to be
        subset: what of the training split is used: 1%, 10%, 5-per-class, or a file of row or image names, one a line
        scenes: column that holds CLEVR's scenes as JSON, from which labels are computed
    """

    path: str
    config: str | None = None
    image: str | None = None
    label: str | None = None
    train: str | None = None
    test: str | None = None
    classes: PositiveInt | None = None
    subset: str | None = None
    scenes: str | None = None


def shortened(arguments: Sequence[str]) -> list[str]:
    """`--data NAME` on a command line is short for `--data.path NAME`."""
    return [re.sub(r"^--data(?=$|=)", "--data.path", word) for word in arguments]


@dataclass(frozen=True)
class Labelled:
    """Both splits with their labels in memory, and the names of the classes."""

    train: Source
    test: Source
    names: list[str]
    train_split: str  # as reported, with the subset
    test_split: str


def open_labelled(data: Labels, seed: int = 0) -> Labelled:
    """Both splits, or one line that says what is wrong with them. seed: of the subset's draw."""
    whole = open_whole(data)
    rows = rows_of(whole, data, seed)
    if rows is None:
        return whole
    return replace(whole, train=taken(whole.train, rows), train_split=f"{whole.train_split} ({data.subset})")


def open_whole(data: Labels) -> Labelled:
    """The same without the subset."""
    word, _, folder = data.path.partition(":")
    alias = ALIASES.get(word) if not Path(data.path).exists() else None
    if alias is None:
        return _checked(data, _opened(data, Alias(None, 0, image=None, label=None, test=""), data.path))
    if not folder and alias.path is None:
        raise UserError(f"{word}: {alias.get}.")
    if folder and not Path(folder).is_dir():
        raise UserError(f"data.path={data.path}: {folder} is no folder.")
    if folder:  # a copy may have other columns and splits: they are found
        alias = replace(alias, config=None, image=None, label=None) if alias.path else alias
    data = replace(data, classes=data.classes or alias.classes)
    try:
        return _checked(data, _opened(data, alias, folder or alias.path))
    except UserError as error:
        if alias.get and not folder and "cannot be opened" in str(error):
            raise UserError(f"{word} ({alias.path}): {alias.get}.") from error
        raise


def _opened(data: Labels, alias: Alias, path: str) -> tuple[Source, Source, list[str]]:
    """Both splits, whole, with one numbering of classes."""
    folder = Path(path)
    train, test = data.train or alias.train, data.test or alias.test
    if folder.is_dir() and not (data.test and _has(folder, data.test)) and not _has(folder, test):
        test = data.test or _test_in(folder)
    elif not test:
        test = ("test" if path == "scenes" else _test_of(path, data.config)) or ""
    if not test:
        raise UserError(f"{data.path} has no split to test on: name one, or a Parquet file, as data.test.")
    shared = {"config": data.config or alias.config, "image": data.image or alias.image}
    label = data.label or alias.label
    task = alias.task if folder.is_dir() else None
    task = task or (data.label if data.scenes else None)
    if data.scenes and task not in clevr.TASKS:
        raise UserError(f"data.scenes: data.label has to name what is computed, {' or '.join(clevr.TASKS)}.")
    sides = []
    for split in (train, test):
        if task and clevr.scene_file(folder, split).is_file():
            rows, labels = clevr.official(folder, split, task)
            source = Source(folder.name, rows, "image", task, clevr.TASKS[task], torch.tensor(labels))
            sides.append((source, [str(i) for i in range(clevr.TASKS[task])]))
        else:
            sides.append(_side(data, path, split, shared, label, task))
    (train_source, names), (test_source, test_names) = sides
    train_source, test_source = replace(train_source, name=train), replace(test_source, name=test)
    if names != test_names:
        test_source, names = _renumbered(test_source, test_names, names)
    return train_source, test_source, names


def _side(
    data: Labels, path: str, split: str, shared: dict[str, Any], label: str | None, task: str | None
) -> tuple[Source, list[str]]:
    """One split and the names of its classes."""
    place, name = path, split
    if Path(split).suffix == ".parquet" and Path(split).is_file():
        place, name = split, "train"
    column = data.scenes or ("scene" if task else None)
    where = Data(path=place, split=name, label=None if data.scenes else label, **shared)
    if column:
        scenes = open_source(replace(where, label=None), others=[column])
        features = scenes.rows.features
        if column in features:
            labels = clevr.labels_of(scenes.rows[column][:], task)
            truth = torch.tensor(labels)
            return replace(scenes, label=task, truth=truth), [str(i) for i in range(clevr.TASKS[task])]
        if data.scenes:
            raise UserError(f"{place} has no column {column!r}: data.scenes is one of {', '.join(features)}.")
    source = open_source(where)
    if source.label is None:
        hint = (
            " In a folder of images, each class is a folder, and there have to be two." if Path(place).is_dir() else ""
        )
        raise UserError(f"{data.path}, split {split}, has no column of classes: name it as data.label.{hint}")
    truth = _labels(source)
    kind = getattr(source.rows, "features", {}).get(source.label)
    if isinstance(kind, datasets.ClassLabel):
        return replace(source, truth=truth), list(kind.names)
    return replace(source, truth=truth), [str(i) for i in range(source.classes)]


def _labels(source: Source) -> torch.Tensor:
    """The whole column, without reading an image."""
    if isinstance(source.rows, datasets.Dataset):
        return torch.tensor(source.rows.select_columns([source.label])[source.label][:])
    return source.labels(range(len(source)))


def _checked(data: Labels, opened: tuple[Source, Source, list[str]]) -> Labelled:
    """Refuse what no result could come from."""
    train, test, names = opened
    for source in (train, test):
        if missing := int((source.truth < 0).sum()):
            raise UserError(
                f"{data.path}, split {source.name}: {missing} images have no label (-1): take another split."
            )
    if data.classes and data.classes != len(names):
        raise UserError(
            f"{data.path} has {len(names)} classes and data.classes={data.classes}: check data.label, or change it."
        )
    if len(train.truth.unique()) < 2:
        raise UserError(f"{data.path}, split {train.name}, holds one class only: there is nothing to tell apart.")
    _all_known(data, train.truth, test, names)
    train, test = replace(train, classes=len(names)), replace(test, classes=len(names))
    return Labelled(train, test, names, train.name, test.name)


def _all_known(data: Labels, learnt: torch.Tensor, test: Source, names: list[str]) -> None:
    """Every class that is tested has to be learnt."""
    if unknown := sorted(set(test.truth.unique().tolist()) - set(learnt.unique().tolist())):
        raise UserError(
            f"{data.path}: class {names[unknown[0]]!r} is in {test.name} but not in what is learnt from "
            f"({len(unknown)} such classes): check data.train, data.test and data.subset."
        )


def rows_of(whole: Labelled, data: Labels, seed: int) -> torch.Tensor | None:
    """The rows of the training split that the settings' subset takes; None for all."""
    if not data.subset:
        return None
    rows = choose(whole.train, data.subset, seed, whole.names)
    _all_known(data, whole.train.truth[rows], whole.test, whole.names)
    return rows


def choose(source: Source, subset: str, seed: int, names: Sequence[str]) -> torch.Tensor:
    """Rows of a subset, ascending: a share or k of each class, drawn by the seed, or those that a file names."""
    if share := re.fullmatch(r"(\d+(?:\.\d+)?)%", subset):
        return _draw(source.truth, seed, lambda count: max(1, round(count * float(share[1]) / 100)))
    if number := re.fullmatch(r"(\d+)-per-class", subset):
        k = int(number[1])
        counts = torch.bincount(source.truth, minlength=len(names))
        for label in torch.nonzero((counts < k) & (counts > 0)).flatten().tolist()[:1]:
            raise UserError(
                f"data.subset={subset}: class {names[label]!r} has {counts[label]} images only: take fewer a class."
            )
        return _draw(source.truth, seed, lambda count: k)
    path = Path(subset)
    if not path.is_file():
        raise UserError(f"data.subset={subset} is neither a share (1%), nor k-per-class, nor a file.")
    return _listed(source, path)


def held_out(truth: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    """Which of these labels' images (n,) bool are kept aside for a choice: a share of each class, one at least."""
    aside = torch.zeros(len(truth), dtype=torch.bool)
    aside[_draw(truth, seed, lambda count: max(1, round(count * share)) if count > 1 else 0)] = True
    return aside


def taken(source: Source, rows: torch.Tensor) -> Source:
    """These rows of a source."""
    chosen = rows.tolist()
    if isinstance(source.rows, datasets.Dataset):
        part = source.rows.select(chosen)
    elif isinstance(source.rows, list):
        part = [source.rows[row] for row in chosen]
    else:
        part = _Chosen(source.rows, chosen)
    return replace(source, rows=part, truth=source.truth[rows])


class _Chosen(Sequence):
    """Some rows of others that are computed when asked for."""

    def __init__(self, rows: Sequence, chosen: list[int]) -> None:
        self.rows, self.chosen = rows, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Any:
        return self.rows[self.chosen[index]]


def _draw(truth: torch.Tensor, seed: int, how_many: Any) -> torch.Tensor:
    rows = []
    for label in truth.unique().tolist():
        own = torch.nonzero(truth == label).flatten()
        generator = torch.Generator().manual_seed(sample_seed(seed, label, Draw.SUBSET))
        rows.append(own[torch.randperm(len(own), generator=generator)[: how_many(len(own))]])
    return torch.cat(rows).sort().values


def _listed(source: Source, path: Path) -> torch.Tensor:
    """Rows that a file names, by number or by the images' file names."""
    lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not lines:
        raise UserError(f"data.subset={path} is empty.")
    if all(line.isdigit() for line in lines):
        rows = sorted({int(line) for line in lines})
        if rows[-1] >= len(source):
            raise UserError(f"data.subset={path}: there is no row {rows[-1]}, the split has {len(source)}.")
        return torch.tensor(rows)
    places = {Path(name).stem: row for row, name in enumerate(_names(source)) if name}
    absent = [line for line in lines if Path(line).stem not in places]
    if absent:
        raise UserError(f"data.subset={path}: {len(absent)} images are not in the split, the first is {absent[0]}.")
    return torch.tensor(sorted({places[Path(line).stem] for line in lines}))


def _names(source: Source) -> list[str | None]:
    """The images' file names, read without the images."""
    if isinstance(source.rows, datasets.Dataset):
        return pyarrow.compute.struct_field(source.rows.data.column(source.image), "path").to_pylist()
    return [source.rows[i][source.image].get("path") for i in range(len(source))]


def _renumbered(test: Source, test_names: list[str], names: list[str]) -> tuple[Source, list[str]]:
    """The test labels in the numbering of the training split."""
    numbers = all(name == str(i) for i, name in enumerate(names)) and all(
        name == str(i) for i, name in enumerate(test_names)
    )
    if numbers:  # plain numbers, of which one split does not have the highest
        return test, max(names, test_names, key=len)
    used = {test_names[label] for label in test.truth.unique().tolist()}
    if unknown := sorted(used - set(names)):
        raise UserError(
            f"class {unknown[0]!r} is in {test.name} but not in train ({len(unknown)} such classes): "
            "check data.train and data.test."
        )
    places = torch.tensor([names.index(name) if name in used else -1 for name in test_names])
    return replace(test, truth=places[test.truth]), names


def _has(folder: Path, split: str) -> bool:
    return bool(split) and ((folder / split).is_dir() or (folder / f"{split}.parquet").is_file())


def _test_in(folder: Path) -> str | None:
    return next((name for name in ("validation", "val", "valid", "test") if _has(folder, name)), None) or _test_of(
        str(folder), None
    )


def _test_of(path: str, name: str | None) -> str | None:
    try:
        return test_split(path, name)
    except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:200]
        near = difflib.get_close_matches(path, ALIASES, 1)
        meant = f", or did you mean {near[0]}?" if near else "."
        raise UserError(f"{path} cannot be opened ({reason}): check data.path{meant}") from error
