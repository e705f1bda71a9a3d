"""A labelled data set: a training and a test split with one numbering of classes, checked before any long work."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from timm_dseq import UserError

from ..data.source import Source, renumbered
from .aliases import ALIASES, Alias
from .settings import Labels
from .splits import open_train_and_test
from .subsets import choose_rows, select_rows


@dataclass(frozen=True)
class Labelled:
    """Both splits, their labels in memory, and the names of the classes."""

    train: Source
    test: Source
    names: list[str]
    train_split: str  # as reported, with the subset
    test_split: str


def open_labelled(data: Labels, seed: int = 0) -> Labelled:
    """Both splits, the training split reduced to the subset, or one line on what is wrong. seed: of the subset."""
    labelled = open_full(data)
    rows = subset_rows(labelled, data, seed)
    if rows is None:
        return labelled
    train_split = f"{labelled.train_split} ({data.subset})"
    return replace(labelled, train=select_rows(labelled.train, rows), train_split=train_split)


def open_full(data: Labels) -> Labelled:
    """The same without the subset."""
    word, _, folder = data.path.partition(":")
    alias = ALIASES.get(word) if not Path(data.path).exists() else None
    if alias is None:
        return _checked(data, Alias(None, 0, image=None, label=None, test=""), data.path)
    if not folder and alias.path is None:
        raise UserError(f"{word}: {alias.get}.")
    if folder and not Path(folder).is_dir():
        raise UserError(f"data.path={data.path}: {folder} is no folder.")
    if folder and alias.path:  # a copy may have other columns: they are found
        alias = replace(alias, config=None, image=None, label=None)
    try:
        return _checked(replace(data, classes=data.classes or alias.classes), alias, folder or alias.path)
    except UserError as error:
        if alias.get and not folder and "cannot be opened" in str(error):
            raise UserError(f"{word} ({alias.path}): {alias.get}.") from error
        raise


def subset_rows(labelled: Labelled, data: Labels, seed: int) -> torch.Tensor | None:
    """The rows of the full training split that are the settings' subset, (k,) int64; None for all."""
    if not data.subset:
        return None
    rows = choose_rows(labelled.train, data.subset, seed, labelled.names)
    _check_all_learnt(data, labelled.train.truth[rows], labelled.test, labelled.names)
    return rows


def _checked(data: Labels, alias: Alias, path: str) -> Labelled:
    """Both splits; what no result could come from is refused."""
    train, test = map(_named, open_train_and_test(data, alias, path))
    names = list(train.names)
    test = _numbered_alike(test, names)
    if data.classes and data.classes != len(names):
        raise UserError(
            f"{data.path} has {len(names)} classes and data.classes={data.classes}: check data.label, or change it."
        )
    if len(train.truth.unique()) < 2:
        raise UserError(f"{data.path}, split {train.name}, holds one class only: there is nothing to tell apart.")
    _check_all_learnt(data, train.truth, test, names)
    train, test = replace(train, classes=len(names)), replace(test, classes=len(names))
    return Labelled(train, test, names, train.name, test.name)


def _named(source: Source) -> Source:
    """A split whose classes have names: their numbers, as far as they occur, where the data set has no names."""
    if source.names:
        return source
    labels, truth = source.truth.unique(return_inverse=True)
    return replace(source, truth=truth, names=tuple(map(str, labels.tolist())))


def _numbered_alike(test: Source, names: list[str]) -> Source:
    """The test split with labels in the numbering of the training split's classes, which have these names."""
    truth = renumbered(test.truth, test.names, names)
    if unknown := sorted({test.names[label] for label in test.truth[truth < 0].tolist()}):
        raise UserError(
            f"class {unknown[0]!r} is in {test.name} but not in train ({len(unknown)} such classes): "
            "check data.train and data.test."
        )
    return replace(test, truth=truth)


def _check_all_learnt(data: Labels, learnt: torch.Tensor, test: Source, names: list[str]) -> None:
    """Each class of the test split has to be among the labels that are learnt, (n,) int64."""
    if unknown := sorted(set(test.truth.unique().tolist()) - set(learnt.unique().tolist())):
        raise UserError(
            f"{data.path}: class {names[unknown[0]]!r} is in {test.name} but not in what is learnt from "
            f"({len(unknown)} such classes): check data.train, data.test and data.subset."
        )
