"""The convention of boxes (xywh, xyxy, cxcywh; pixels or shares of the image), told by the data and never assumed.

Read in a wrong convention, many boxes have negative sides, leave their image, or differ from their areas and masks.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from timm_dseq import UserError

Convention = Literal["xywh", "xyxy", "cxcywh", "xywh-shares", "xyxy-shares", "cxcywh-shares"]
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)
FIT, MISFIT = 0.01, 0.05  # shares of odd boxes, up to which a convention fits, and from which on it does not


@dataclass(frozen=True)
class Evidence:
    """Boxes as they are stored (n, 4), and what is known of each: its image's height and width (n, 2), its area or
    its mask's (n,), and the box around its mask (n, 4) as left, top, right, bottom; NaN where it is not known."""

    boxes: np.ndarray
    sizes: np.ndarray
    areas: np.ndarray
    around: np.ndarray


def corners(boxes: np.ndarray, convention: Convention, sizes: np.ndarray) -> np.ndarray:
    """Boxes (n, 4) in this convention, of images of these heights and widths (n, 2) → left, top, right, bottom."""
    order, _, shares = convention.partition("-")
    first, second = boxes[:, :2], boxes[:, 2:]
    if order == "cxcywh":
        first = first - second / 2
    if order != "xyxy":
        second = first + second
    both = np.concatenate([first, second], axis=1)
    return both * sizes[:, [1, 0, 1, 0]] if shares else both


def odd(evidence: Evidence, convention: Convention) -> float:
    """The share of boxes that cannot be in this convention."""
    found = corners(evidence.boxes, convention, evidence.sizes)
    sides = found[:, 2:] - found[:, :2]
    limits = evidence.sizes[:, [1, 0]]
    slack = np.maximum(1.5, 0.005 * limits)  # annotators and rounding
    wrong = (sides < 0).any(1) | (found[:, :2] < -slack).any(1) | (found[:, 2:] > limits + slack).any(1)
    wrong |= evidence.areas > 1.02 * (sides + 1).prod(1)  # a mask's area is at most its box's
    gaps = np.abs(found - evidence.around) > np.maximum(2.5, 0.05 * np.tile(sides, 2))
    wrong |= (gaps & ~np.isnan(evidence.around)).any(1)
    if convention.endswith("-shares"):
        wrong |= (evidence.boxes > 1.01).any(1)
    else:  # sides of less than a pixel throughout are shares, unless the image is a pixel
        wrong |= (evidence.boxes <= 1.01).all(1) & (evidence.sizes > 1).any(1)
    return float(wrong.mean())


def equal_areas(evidence: Evidence, convention: Convention) -> bool:
    """Whether the areas that are known are the boxes' own in this convention."""
    known = ~np.isnan(evidence.areas)
    found = corners(evidence.boxes, convention, evidence.sizes)[known]
    areas = (found[:, 2:] - found[:, :2]).prod(1)
    close = np.isclose(areas, evidence.areas[known], rtol=0.01, atol=1.0)
    return bool(known.any() and close.mean() >= 1 - FIT)


def settle(evidence: Evidence, where: str, asked: Convention | None, usual: Convention | None = None) -> Convention:
    """The convention that the data shows, or one line. asked: data.box_format. usual: the format's, if data fits it.

    The data may fit several: it then shows one if that fits clearly and no other does.
    """
    share = {convention: odd(evidence, convention) for convention in CONVENTIONS}
    if asked or usual:
        wanted = asked or usual
        better = min(share, key=share.get)
        if share[wanted] >= MISFIT:
            fits = f"they fit {better}" if share[better] <= FIT else "they fit no convention"
            raise UserError(
                f"{where}: {share[wanted]:.0%} of the boxes cannot be {wanted}, they leave their images or differ from "
                f"their areas or masks; {fits}: check the annotations, or name --data.box_format."
            )
        return wanted
    fit = [convention for convention in CONVENTIONS if share[convention] < MISFIT]
    if len(same := [convention for convention in fit if equal_areas(evidence, convention)]) == 1:
        fit = same
    if len(fit) != 1 or share[fit[0]] > FIT:
        found = " and ".join(fit) or "no convention"
        choices = "|".join(fit or CONVENTIONS)
        raise UserError(f"{where}: the boxes fit {found}, so say which it is: --data.box_format {choices}")
    return fit[0]
