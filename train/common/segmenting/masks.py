"""The one place where masks of classes are read: encoded, or open in Pillow → ids (H, W). Of a palette, its indices."""

from typing import Any

import numpy as np

from timm_dseq.images import UnreadableImage, as_unreadable, open_image

MOST_IDS = 65_536  # of 16 bits


@as_unreadable()
def read_ids(value: Any) -> np.ndarray:
    """An encoded mask {"bytes", "path"}, or one that is open → (H, W) of a whole-number type, 0 … 65,535."""
    mask = open_image(value)
    if mask.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L"):
        raise UnreadableImage(
            f"a mask in colours ({mask.mode}) does not tell its classes: write the id of each pixel's class, as a "
            "greyscale or palette PNG"
        )
    if mask.format == "JPEG":
        raise UnreadableImage("a JPEG does not keep ids as they were: write masks as PNG")
    ids = np.asarray(mask.convert("I") if mask.mode.startswith("I;") else mask)
    if mask.mode == "1":
        ids = ids.astype(np.uint8)
    if mask.mode.startswith("I") and not (ids.min() >= 0 and ids.max() < MOST_IDS):
        raise UnreadableImage(f"its ids go from {ids.min()} to {ids.max()}, and 0 to {MOST_IDS - 1} can be read")
    return ids
