"""A closer look at test time (GLSim's way): images → the view of each one's most salient region, and what it gains.

Images come at twice the model's size, (B, 3, 2H, 2W), so that the view (B, 3, H, W) shows more detail than the whole.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from timm.models import VisionTransformer
from torch.nn import functional as F

from timm_dseq import UserError, saliency_map
from timm_dseq.engine.saliency import check_query

from .run import results

QueryName = Literal["cls_param", "cls_out", "attention", "norm", "border", "ncut"]
DETAIL = 2  # times the model's size: how large the image is that is cropped
TOP = 1 / 16  # of the patches: the most salient ones, which a view has to hold
MARGIN = 1  # patches around them
LEAST = 0.5  # of the image's sides: a view is no smaller
CROP = (DETAIL, TOP, MARGIN, LEAST)  # belongs to the key of whatever is computed with it


def salient_boxes(saliency: torch.Tensor) -> torch.Tensor:
    """Maps (B, h, w) → top, left and side (B, 3), shares of the image's height, width and both.

    A box has the image's shape and holds its most salient patches and those around them; of a map that is the same
    everywhere, all patches.
    """
    h, w = saliency.shape[1:]
    flat = saliency.flatten(1)
    best = flat.topk(max(1, round(TOP * h * w)), dim=1).indices
    held = torch.zeros_like(flat, dtype=torch.bool).scatter(1, best, True) | (flat == flat[:, :1]).all(1, keepdim=True)
    held = held.view(-1, h, w)
    spans = []
    for inside in (held.any(2), held.any(1)):  # of the rows (B, h), of the columns (B, w)
        n, found = inside.shape[1], inside.float()
        first, last = found.argmax(1), n - found.flip(1).argmax(1)
        spans.append(torch.stack([(first - MARGIN).clamp(min=0), (last + MARGIN).clamp(max=n)], dim=1) / n)
    spans = torch.stack(spans)  # (2, B, 2)
    side = (spans[..., 1] - spans[..., 0]).amax(0).clamp(min=LEAST)
    start = (spans.mean(2) - side / 2).clamp(min=0).minimum(1 - side)
    return torch.stack([*start, side], dim=1)


def check_crop(model: torch.nn.Module, query: str) -> None:
    """One line for a model that is no plain ViT, or cannot answer the query."""
    try:
        check_query(model, query)
    except UserError as error:
        raise UserError(f"salient_crop: {error}") from error


@torch.no_grad()
def salient_views(model: VisionTransformer, images: torch.Tensor, query: str) -> torch.Tensor:
    """Normalised images (B, 3, 2H, 2W) → the views (B, 3, H, W) that show their most salient regions."""
    fine = images.shape[2:]
    size = [side // DETAIL for side in fine]
    whole = F.interpolate(images, size=size, mode="bilinear", antialias=True)
    views = []
    for image, (top, left, side) in zip(images, salient_boxes(saliency_map(model, whole, query)).tolist(), strict=True):
        height, width = (round(side * full) for full in fine)
        y, x = min(round(top * fine[0]), fine[0] - height), min(round(left * fine[1]), fine[1] - width)
        view = image[None, :, y : y + height, x : x + width]
        views.append(F.interpolate(view, size=size, mode="bicubic", antialias=True))
    return torch.cat(views)


def gain(closer: Sequence[torch.Tensor], plain: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Of answers with and without the views, (n,) bool for each seed: points gained, and the 95 % interval over test
    images, in pairs."""
    gained = torch.stack([a.double() - b.double() for a, b in zip(closer, plain, strict=True)]).mean(0)
    return {"points": 100 * gained.mean().item(), "interval": [100 * bound for bound in results.interval(gained)]}


def said(gained: dict[str, Any]) -> str:
    """A gain as words."""
    low, high = gained["interval"]
    return f"the salient crop gains {gained['points']:+.2f} points [{low:+.2f}, {high:+.2f}]"
