"""Which ids in masks are classes: ids, with gaps or of 16 bits, ↔ numbers 0 … K-1; all masks are looked at for it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import Dataset, Subset

from timm_dseq import UserError
from timm_dseq.images import UnreadableImage, measure

from ..data.unreadable import batches_of_all
from ..system.screen import Screen
from .masks import MOST_IDS, read_ids
from .opening import SCENE_NAMES, Masked
from .settings import Masks

IGNORED = -1  # the number of a pixel that neither is trained on nor counts
MOST_CLASSES = 4096  # a mask with more ids numbers objects, not classes


@dataclass(frozen=True)
class Classes:
    """The classes 0 … K-1: their ids in masks, ascending, and their names."""

    ids: tuple[int, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def numbers(self, ids: np.ndarray) -> np.ndarray:
        """Ids (H, W) → numbers of classes (H, W) int16, IGNORED where the id is none's."""
        return self._table[ids]

    @cached_property
    def _table(self) -> np.ndarray:
        table = np.full(MOST_IDS, IGNORED, np.int16)
        table[list(self.ids)] = range(len(self.ids))
        return table


@dataclass(frozen=True)
class Found:
    """What the masks of a split hold."""

    ids: dict[int, int]  # id → the first image that has it
    empty: int  # images whose every pixel is ignored


def look_at(masked: Masked, ignore: Sequence[int], workers: int, accelerator: Accelerator) -> Found:
    """Read all masks: one that is no mask, or of another size than its image, is named.

    All processes have to call it; each reads its share.
    """
    mine = range(accelerator.process_index, len(masked), accelerator.num_processes)
    screen = Screen(len(mine), 0, accelerator.is_main_process, unit="mask")
    first, empty, seen = {}, 0, 0
    looks = batches_of_all(Subset(_Ids(masked), mine), list, batch_size=16, num_workers=workers)
    for batch in looks:
        for index, ids in batch:
            empty += set(ids) <= set(ignore)
            first = {**dict.fromkeys(ids, index), **first}
        seen += len(batch)
        screen.show(seen, masked.split)
    screen.close()
    parts = gather_object([(first, empty)])
    ids = {number: min(part[number] for part, _ in parts if number in part) for part, _ in parts for number in part}
    return Found(dict(sorted(ids.items())), sum(empty for _, empty in parts))


class _Ids(Dataset):
    """`ids[index]`: the index and the ids in its mask."""

    def __init__(self, masked: Masked) -> None:
        self.masked = masked

    def __getitem__(self, index: int) -> tuple[int, list[int]]:
        ids = self.masked.masks.read(index, read_ids)
        _, size = self.masked.images.read(index, measure)
        if ids.shape != size:
            (h, w), (height, width) = ids.shape, size
            where = self.masked.masks.where(index)
            raise UnreadableImage(f"{where}: a mask of {w} × {h} pixels, and its image has {width} × {height}")
        return index, np.flatnonzero(np.bincount(ids.ravel())).tolist()


def classes_of(data: Masks, train: Masked, found: Found) -> Classes:
    """Those that data.names names, or whose ids are in the training masks. found: in these."""
    if data.path == "scenes":
        named = dict(enumerate(SCENE_NAMES))
    else:
        named = _named(Path(data.names)) if data.names else {number: str(number) for number in found.ids}
    ids = tuple(sorted(named.keys() - set(data.ignore)))
    classes = Classes(ids, tuple(named[number] for number in ids))
    if data.classes and data.classes != len(classes):
        raise UserError(
            f"{data.path} has {len(classes)} classes and data.classes={data.classes}: check data.mask and data.ignore, "
            "or change it."
        )
    if not 2 <= len(classes) <= MOST_CLASSES:
        raise UserError(
            f"{data.path}, split {train.split}: {len(classes)} classes, and 2 to {MOST_CLASSES} can be told apart: "
            "check data.mask and data.ignore."
        )
    return classes


def check_known(masked: Masked, found: Found, classes: Classes, ignore: Sequence[int]) -> None:
    """Every id in the masks has to be a class's or ignored, and not all pixels may be ignored."""
    known = {*classes.ids, *ignore}
    if unknown := [number for number in found.ids if number not in known]:
        listed = json.dumps(sorted({*ignore, *unknown[:10]})) + (", …" if len(unknown) > 10 else "")
        raise UserError(
            f"{masked.masks.where(found.ids[unknown[0]])} holds the id {unknown[0]}, which is no class ({len(unknown)} "
            f"such ids in {masked.split}): name them in data.names, or ignore them, data.ignore={listed}."
        )
    if found.empty == len(masked):
        raise UserError(f"split {masked.split}: data.ignore leaves no pixel of any mask: check it.")


def _named(path: Path) -> dict[int, str]:
    """Ids and names in a JSON file: {"7": "road", …} or ["road", …], numbered from 0."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        named = dict(enumerate(content)) if isinstance(content, list) else {int(k): v for k, v in content.items()}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"data.names={path} cannot be read ({type(error).__name__}): give JSON, id: name.") from error
    if not all(isinstance(name, str) and 0 <= number < MOST_IDS for number, name in named.items()):
        raise UserError(f"data.names={path}: give a name for each id, which is a whole number below {MOST_IDS}.")
    if len(set(named.values())) < len(named):
        raise UserError(f"data.names={path}: two ids have the same name: give each its own.")
    return named
