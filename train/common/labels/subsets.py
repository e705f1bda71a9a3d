"""Some rows of a split: a share or k images of each class, drawn by a seed, or those that a file names."""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import torch

from timm_dseq import UserError

from ..data.order import Draw, sample_seed
from ..data.source import Source


def choose_rows(source: Source, subset: str, seed: int, names: Sequence[str]) -> torch.Tensor:
    """The rows of a subset, as data.subset describes it, ascending: (k,) int64."""
    if share := re.fullmatch(r"(\d+(?:\.\d+)?)%", subset):
        if not 0 < float(share[1]) <= 100:
            raise UserError(f"data.subset={subset} is no share of the images: give more than 0%, at most 100%.")
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


def holdout_mask(labels: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    """Which images with these labels (n,) are held out for choosing: a share of each class, at least one: (n,) bool.

    The only image of a class is not held out.
    """
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[_draw(labels, seed, lambda count: max(1, round(count * share)) if count > 1 else 0)] = True
    return mask


def select_rows(source: Source, rows: torch.Tensor) -> Source:
    """These rows (k,) of a source."""
    indices = rows.tolist()
    if isinstance(source.rows, datasets.Dataset):
        selected = source.rows.select(indices)
    elif isinstance(source.rows, list):
        selected = [source.rows[index] for index in indices]
    else:
        selected = _Selected(source.rows, indices)
    return replace(source, rows=selected, truth=source.truth[rows])


class _Selected(Sequence):
    """Some of the rows that a sequence makes when it is asked for them."""

    def __init__(self, rows: Sequence, indices: list[int]) -> None:
        self.rows, self.indices = rows, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.rows[self.indices[index]]


def _draw(labels: torch.Tensor, seed: int, count_of: Callable[[int], int]) -> torch.Tensor:
    """Rows drawn of each class, as many as `count_of` its number of images says, ascending: (k,) int64."""
    drawn = []
    for label in labels.unique().tolist():
        rows = torch.nonzero(labels == label).flatten()
        generator = torch.Generator().manual_seed(sample_seed(seed, label, Draw.SUBSET))
        drawn.append(rows[torch.randperm(len(rows), generator=generator)[: count_of(len(rows))]])
    return torch.cat(drawn).sort().values


def _listed(source: Source, path: Path) -> torch.Tensor:
    """Rows that a file names by their number, or by the file names of the images: (k,) int64."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.subset={path} cannot be read ({type(error).__name__}): give a text file.") from error
    if not lines:
        raise UserError(f"data.subset={path} is empty.")
    if all(line.isdecimal() for line in lines):
        rows = sorted({int(line) for line in lines})
        if rows[-1] >= len(source):
            raise UserError(f"data.subset={path}: there is no row {rows[-1]}, the split has {len(source)}.")
        return torch.tensor(rows)
    names = source.file_names()
    known = defaultdict(list)
    for row, name in enumerate(names):
        if name:
            known[Path(name).stem].append(row)
    found = {line: _named(line, known[Path(line).stem], names) for line in lines}
    if absent := [line for line, rows in found.items() if not rows]:
        raise UserError(f"data.subset={path}: {len(absent)} images are not in the split, the first is {absent[0]}.")
    for line, rows in found.items():
        if len(rows) > 1:
            raise UserError(
                f"data.subset={path}: {line} may be {names[rows[0]]} or {names[rows[1]]}: write more of its path."
            )
    return torch.tensor(sorted({row for rows in found.values() for row in rows}))


def _named(line: str, rows: list[int], names: list[str | None]) -> list[int]:
    """Those of the rows, whose files have the line's name up to the ending, that the line means.

    As much of the path is compared as both have; where several are left, those with the same ending.
    """

    def agrees(name: str) -> bool:
        pairs = zip(Path(line).parts[-2::-1], Path(name).parts[-2::-1], strict=False)
        return all(own == other for own, other in pairs)

    rows = [row for row in rows if agrees(names[row])]
    exact = [row for row in rows if Path(names[row]).suffix == Path(line).suffix]
    return exact if len(rows) > 1 and exact else rows
