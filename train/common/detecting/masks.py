"""Masks: polygons and run-length codes as COCO has them ↔ bitmaps (h, w) uint8 of 0 and 1."""

import math
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as coco

from .annotated import Pair, Segmentation

_NONE = "is neither polygons nor a run-length code"
_DIGITS = 6  # of 5 bits, of which a run's number has at most so many: 30 bits count the pixels of any image


def fault(segmentation: Any, size: Pair) -> str | None:
    """What keeps a segmentation from being a mask of an image of this (height, width), in words; nothing is decoded.

    A code's runs have to be as long as the image. Polygons may leave it, as annotators' do, but no further than the
    image is large: on a longer way around they would take all memory.
    """
    if isinstance(segmentation, dict):
        told, counts = segmentation.get("size"), segmentation.get("counts")
        if not isinstance(told, (list, tuple)) or [type(side) for side in told] != [int, int]:
            return _NONE
        if tuple(told) != size:
            return f"is of {told[1]} × {told[0]} pixels, and its image has {size[1]} × {size[0]}"
        total = _plain_total(counts) if isinstance(counts, list) else _total(counts)
        if total is None:
            return "has counts that are no run lengths"
        if total != size[0] * size[1]:
            return f"has runs of {str(total)[:20]} pixels in all, and its image has {size[0] * size[1]}"
        return None
    if not isinstance(segmentation, list) or not segmentation:
        return _NONE
    far = max(size)
    for polygon in segmentation:
        numbers = isinstance(polygon, list) and set(map(type, polygon)) <= {int, float}
        if not numbers or len(polygon) % 2 or len(polygon) < 6:
            return "has a polygon that is no list of at least three x, y"
        if not (-far <= min(polygon) and max(polygon) <= 2 * far) or math.isnan(sum(polygon)):
            return f"has a polygon that leaves its image of {size[1]} × {size[0]} further than that is large"
    return None


def _plain_total(counts: list) -> int | None:
    """How many pixels the runs of a code that is not compressed have in all; None if they are no runs."""
    return sum(counts) if set(map(type, counts)) <= {int} and min(counts, default=0) >= 0 else None


def _total(counts: Any) -> int | None:
    """The same of a compressed code.

    A letter less 48 is five bits, the lowest first, and whether the number goes on; its highest bit is the sign. From
    the fourth number on it is the difference to the last but one.
    """
    if not isinstance(counts, str) or not counts.isascii():
        return None
    letters = np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - 48
    last = np.flatnonzero(letters & 32 == 0)  # the last letter of each number
    if not len(letters) or letters.min() < 0 or letters.max() > 63 or not len(last) or last[-1] != len(letters) - 1:
        return None
    first = np.concatenate([[0], last[:-1] + 1])
    length = last - first + 1
    if length.max() > _DIGITS:
        return None
    place = np.arange(len(letters)) - np.repeat(first, length)
    numbers = np.add.reduceat((letters & 31) << 5 * place, first)
    numbers -= (letters[last] >> 4 & 1) << 5 * length
    numbers[1::2] = numbers[1::2].cumsum()
    numbers[2::2] = numbers[2::2].cumsum()
    return int(numbers.sum()) if numbers.min() >= 0 else None


def encoded(segmentation: Segmentation, size: Pair) -> dict[str, Any]:
    """A mask without a fault as a compressed run-length code of an image of this (height, width)."""
    if isinstance(segmentation, list):
        return coco.merge(coco.frPyObjects(segmentation, *size))
    return coco.frPyObjects(segmentation, *size) if isinstance(segmentation["counts"], list) else segmentation


def bitmap(segmentation: Segmentation, size: Pair) -> np.ndarray:
    """(h, w) uint8, 1 where the object is. For a mask without a fault."""
    return coco.decode(encoded(segmentation, size))


def code(mask: np.ndarray) -> dict[str, Any]:
    """A bitmap (h, w) as a compressed run-length code."""
    return coco.encode(np.asfortranarray(mask, dtype=np.uint8))


def box_around(segmentation: Segmentation, size: Pair) -> np.ndarray:
    """Left, top, right, bottom (4,) of a mask without a fault."""
    left, top, width, height = coco.toBbox(encoded(segmentation, size))
    return np.array([left, top, left + width, top + height])
