"""WHICH: saliency maps (B, h, w) → ranked regions, masks (B, N, h, w).

Otsu's threshold, 8-connected components of the foreground, small ones dropped, the best N − 1 ranked by mean saliency;
the last region is the remainder. Batched on the device; nothing is copied to the host.
"""

import math
from dataclasses import dataclass
from numbers import Real

import torch

from ..arguments import check_seeds, check_tensor, check_whole
from ..errors import UserError
from .random import uniform
from .saliency import min_max
from .vit import full_precision

ORDERS = ("saliency", "inverse", "random", "spatial")
REGIONS = ("components", "bands", "uniform")


@dataclass(frozen=True)
class Regions:
    """The regions R_1 … R_N of B images: those that exist in their order, then empty ones, the remainder last."""

    masks: torch.Tensor  # (B, N, h, w) bool
    count: torch.Tensor  # (B,) regions found, without the remainder
    area: torch.Tensor  # (B, N) patches
    score: torch.Tensor  # (B, N) mean saliency, 0 for an empty region


@torch.no_grad()
def rank_regions(
    saliency: torch.Tensor,
    num_regions: int = 5,
    min_area: float = 0.02,
    order: str = "saliency",
    seeds: torch.Tensor | None = None,
    regions: str = "components",
    stop_after: int | None = None,
) -> Regions:
    """The regions of saliency maps (B, h, w), at most `num_regions` with the remainder.

    order: `saliency`, `inverse`, `random` (a pure function of `seeds` (B,)) or `spatial` (by the first patch); it does
    not change which regions there are. regions: `components` of the foreground, `bands` of equally many patches, the
    most salient first, or `uniform` for near-equal rectangles.
    stop_after=k: the sequence ends with R_k, later regions and the remainder are empty. A constant map, or one that is
    not finite, has only the remainder.
    """
    check_options(num_regions, min_area, order, regions, stop_after)
    if order == "random" and seeds is None:
        raise UserError("order='random' needs seeds: one integer for each image")
    check_tensor("saliency", saliency, (None, None, None), "(B, h, w)")
    if order == "random":
        check_seeds(seeds, len(saliency))
    b, h, w = saliency.shape
    with torch.autocast(saliency.device.type, enabled=False):
        flat = min_max(full_precision(saliency).flatten(1))  # (B, n)
        flat = torch.where(flat.isfinite().all(1, keepdim=True), flat, torch.zeros_like(flat))
        varied = flat.amax(1) > 0  # (B,)
        if regions == "uniform":
            candidates = _rectangles(h, w, num_regions, saliency.device).expand(b, -1, -1)
        elif regions == "bands":
            candidates = _bands(flat, num_regions)
        else:
            candidates = _large_components(otsu_foreground(flat).view(b, h, w), min_area * h * w)
        candidates = candidates & varied[:, None, None]
        masks = _rank(candidates, flat, num_regions - 1, order, seeds)
        masks = torch.cat([masks, ~masks.any(1, keepdim=True)], dim=1)  # (B, N, n)
        count = masks[:, :-1].any(2).sum(1)
        if stop_after is not None:
            masks = masks & (torch.arange(num_regions, device=masks.device) < stop_after)[:, None]
        area = masks.sum(2)
        score = (masks * flat[:, None]).sum(2) / area.clamp(min=1)
    return Regions(masks.view(b, num_regions, h, w), count, area, score)


def check_options(num_regions: int, min_area: float, order: str, regions: str, stop_after: int | None) -> None:
    """One line for an option that is unknown or leaves no sequence of regions."""
    check_whole("num_regions", num_regions, 0)
    if stop_after is not None:
        check_whole("stop_after", stop_after, 0)
    if num_regions < 2:
        raise UserError(f"num_regions={num_regions}: a sequence needs at least 2, one to see and one to predict")
    if not isinstance(min_area, Real) or not 0 <= min_area < 1:
        raise UserError(f"min_area={min_area!r} is a share of the image: give a number from 0 to below 1")
    if order not in ORDERS:
        raise UserError(f"order={order!r} is unknown: choose one of {', '.join(ORDERS)}")
    if regions not in REGIONS:
        raise UserError(f"regions={regions!r} is unknown: choose one of {', '.join(REGIONS)}")
    if stop_after is not None and not 2 <= stop_after < num_regions:
        raise UserError(
            f"stop_after={stop_after} leaves nothing to predict, or all: choose from 2 to {num_regions - 1}"
        )


def otsu_foreground(flat: torch.Tensor) -> torch.Tensor:
    """Patches above Otsu's threshold of maps in [0, 1], rounded to 8 bits: (B, n) → (B, n) bool.

    The variance between the two classes is compared in integers: exact up to 128×128 patches, and without float64.
    """
    n = flat.shape[1]
    if n > 128 * 128:
        raise UserError(f"{n} patches are more than the 128×128 that regions are made for: use larger patches")
    levels = (flat * 255).round().long()
    ordered = levels.sort(dim=1).values
    below = torch.arange(1, n, device=flat.device)  # patches at or below each candidate threshold
    weight = below * (n - below)
    partial = ordered.cumsum(1)
    # weight · (difference of the class means), exact; squared over weight it is n² times the variance between classes
    gap = (n * partial[:, :-1] - below * partial[:, -1:]).abs()
    product = gap * (gap % weight)
    quotient = gap * (gap // weight) + product // weight
    variance = quotient * 2**20 + (product % weight) * 2**20 // weight
    is_edge = ordered[:, 1:] > ordered[:, :-1]
    best = torch.where(is_edge, variance, -1).argmax(1, keepdim=True) if n > 1 else ordered.new_zeros(len(flat), 1)
    return levels > ordered.gather(1, best)


def connected_components(foreground: torch.Tensor) -> torch.Tensor:
    """8-connected components of (B, h, w) bool: (B, h, w) int64, 0 for background, else 1 + the component's last patch.

    Each round joins every tree of patches to the greatest label that touches it, then shortens all paths to their
    roots. Round 1 leaves local maxima alone, at most one tree in each 2×2 patches. After that each tree joins another
    at least every second round, since the neighbour that it outranks has joined a greater one: the number of trees
    halves. So a fixed number of rounds is enough, and the host need not ask the device whether more are needed.
    """
    b, h, w = foreground.shape
    n = h * w
    inside = foreground.flatten(1)
    first = torch.arange(n + 1, device=foreground.device).expand(b, -1)
    label = torch.where(inside, first[:, 1:], 0)
    trees, spare = n, False
    while trees > 1:
        near = torch.nn.functional.max_pool2d(label.view(b, 1, h, w).float(), 3, 1, 1).flatten(1) * inside
        # pooled as float32, which holds every label exactly: some devices cannot pool integers
        parent = first.float().scatter_reduce(1, label, near, "amax").long()
        for _ in range(math.ceil(math.log2(trees))):
            parent = parent.gather(1, parent)
        joined = parent.gather(1, label)
        if label.device.type == "cpu" and torch.equal(joined, label):  # here asking costs nothing
            break
        label = joined
        if trees == n:
            trees = math.ceil(h / 2) * math.ceil(w / 2)
        else:
            trees, spare = (trees // 2 if spare else trees), not spare
    return label.view(b, h, w)


def _large_components(foreground: torch.Tensor, min_patches: float) -> torch.Tensor:
    """Masks (B, K, n) of the components with at least `min_patches` patches; the rest of the K are empty."""
    b, h, w = foreground.shape
    label = connected_components(foreground).flatten(1)
    n = h * w
    sizes = torch.zeros(b, n + 1, device=label.device).scatter_add(1, label, torch.ones(b, n, device=label.device))
    sizes[:, 0] = 0
    at_most = math.ceil(h / 2) * math.ceil(w / 2)  # components cannot touch
    if min_patches > 1:
        at_most = min(at_most, int(n / min_patches))
    size, which = sizes.topk(at_most, dim=1)  # (B, K)
    large = (size >= min_patches) & (size > 0)
    return (label[:, None] == which[:, :, None]) & large[:, :, None]


def _bands(flat: torch.Tensor, num_regions: int) -> torch.Tensor:
    """N − 1 bands of equally many patches of maps (B, n), the most salient first: (B, N − 1, n) bool. The patches of
    the two bands that would come next are left over, so that the remainder is twice as large."""
    size = max(1, round(flat.shape[1] / (num_regions + 1)))
    place = flat.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # of each patch among all, by saliency
    return place[:, None] // size == torch.arange(num_regions - 1, device=flat.device)[:, None]


def _rectangles(h: int, w: int, count: int, device: torch.device) -> torch.Tensor:
    """The grid in `count` near-equal rectangles, cut into bands of rows: (1, count, n) bool."""
    bands = min(h, max(1, round(math.sqrt(count * h / w))))
    masks = torch.zeros(count, h, w, dtype=torch.bool, device=device)
    start = 0
    for band in range(bands):
        stop = count * (band + 1) // bands
        # a band is as tall as its share of the rectangles
        rows = slice(round(h * start / count), round(h * stop / count))
        for i in range(start, stop):
            cut = [round(w * (j - start) / (stop - start)) for j in (i, i + 1)]
            masks[i, rows, cut[0] : cut[1]] = True
        start = stop
    return masks.flatten(1)[None]


def _rank(
    candidates: torch.Tensor, flat: torch.Tensor, keep: int, order: str, seeds: torch.Tensor | None
) -> torch.Tensor:
    """The `keep` candidates (B, K, n) of the highest mean saliency, in the given order: (B, keep, n) bool."""
    b, k, n = candidates.shape
    area = candidates.sum(2)
    score = torch.where(area > 0, (candidates * flat[:, None]).sum(2) / area.clamp(min=1), -1.0)
    patch = torch.arange(n, device=flat.device)
    first_patch = torch.where(candidates, patch, n).amin(2)
    # sorted by the least important key first: a stable sort keeps its order where the next keys tie
    ranking = torch.arange(k, device=flat.device).expand(b, -1)
    for key, descending in ((first_patch, False), (area, True), (score, True)):
        ranking = ranking.gather(1, key.gather(1, ranking).argsort(dim=1, descending=descending, stable=True))
    ranking = ranking[:, :keep]
    if ranking.shape[1] < keep:
        empty = candidates.new_zeros(b, 1, n)
        candidates = torch.cat([candidates, empty], 1)
        ranking = torch.cat([ranking, ranking.new_full((b, keep - k), k)], 1)
    chosen = candidates.gather(1, ranking[:, :, None].expand(-1, -1, n))
    if order != "saliency":
        present = chosen.any(2)
        if order == "inverse":
            key = -torch.arange(keep, device=flat.device).expand(b, -1).float()
        elif order == "spatial":
            key = torch.where(chosen, patch, n).amin(2).float()
        else:
            key = uniform(seeds.to(flat.device), keep)
        key = torch.where(present, key, float("inf"))
        chosen = chosen.gather(1, key.argsort(dim=1, stable=True)[:, :, None].expand(-1, -1, n))
    return chosen
