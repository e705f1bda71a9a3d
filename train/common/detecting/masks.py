"""Masks: polygons and run-length codes as COCO has them ↔ bitmaps (h, w) uint8 of 0 and 1."""

import math
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as coco

from .annotated import Pair, Segmentation

MOST_PIXELS = 2 * 89_478_485  # as of images


def fault(segmentation: Any, size: Pair) -> str | None:
    """What keeps a segmentation from being a mask of an image of this (height, width), in words; quick."""
    if isinstance(segmentation, dict):
        told, counts = segmentation.get("size"), segmentation.get("counts")
        if not isinstance(counts, (str, bytes, list)) or not isinstance(told, (list, tuple)) or len(told) != 2:
            return "is neither polygons nor a run-length code"
        if tuple(told) != size:
            return f"is of {told[1]} × {told[0]} pixels, and its image has {size[1]} × {size[0]}"
        return None
    if not isinstance(segmentation, list) or not segmentation:
        return "is neither polygons nor a run-length code"
    for polygon in segmentation:
        numbers = isinstance(polygon, list) and all(isinstance(x, (int, float)) for x in polygon)
        if not numbers or len(polygon) % 2 or len(polygon) < 6 or not math.isfinite(sum(polygon)):
            return "has a polygon that is no list of at least three x, y"
    return None


def encoded(segmentation: Segmentation, size: Pair) -> dict[str, Any]:
    """A compressed run-length code of an image of this (height, width). ValueError if it is none."""
    height, width = size
    if height * width > MOST_PIXELS:
        raise ValueError("too many pixels")
    if isinstance(segmentation, list):
        return coco.merge(coco.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        if sum(segmentation["counts"]) != height * width:
            raise ValueError("the runs are not as long as the image")
        return coco.frPyObjects(segmentation, height, width)
    return segmentation


def bitmap(segmentation: Segmentation, size: Pair) -> np.ndarray:
    """(h, w) uint8, 1 where the object is. ValueError if it is no mask."""
    return coco.decode(encoded(segmentation, size))


def code(mask: np.ndarray) -> dict[str, Any]:
    """A bitmap (h, w) as a compressed run-length code."""
    return coco.encode(np.asfortranarray(mask, dtype=np.uint8))


def box_around(segmentation: Segmentation, size: Pair) -> np.ndarray:
    """Left, top, right, bottom (4,) of a mask."""
    left, top, width, height = coco.toBbox(encoded(segmentation, size))
    return np.array([left, top, left + width, top + height])
