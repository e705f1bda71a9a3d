"""Masks and predictions → figures, by their definitions.

maxF (TokenCut's): beta² = .3; a map is cut above each of the levels 0, 1/255 … 254/255; F of each image at each level,
the mean over images, then the greatest over levels: one level for the whole data set. (Others take the best level of
each image, which is never less.) IoU, accuracy and MAE are means over images.

Predictions are made of patches, so the pixels of each label in each patch are all that is needed of a mask.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

BETA, LEVELS = 0.3, 255


def patch_counts(labels: torch.Tensor, grid: tuple[int, int], classes: int) -> torch.Tensor:
    """Pixels of each label 0 … classes − 1 in each patch: labels (H, W), negative ones not counted → (h·w, classes).

    A pixel belongs to the patch that its centre lies in.
    """
    (height, width), (h, w) = labels.shape, grid
    row = (2 * torch.arange(height) + 1) * h // (2 * height)
    column = (2 * torch.arange(width) + 1) * w // (2 * width)
    known = labels >= 0
    cell = ((row[:, None] * w + column) * classes + labels)[known]
    return torch.bincount(cell, minlength=h * w * classes).view(h * w, classes)


def cuts(maps: torch.Tensor, objects: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps (K, N) in [0, 1] and which of their pixels are object (N,) → at each level, the pixels above it that are
    object, and all that are: (K, LEVELS) each."""
    k = len(maps)
    above = (maps * LEVELS).ceil().long().clamp(0, LEVELS)  # how many levels a pixel is above
    above += torch.arange(k)[:, None] * (LEVELS + 1)
    counts = []
    for values in (above[:, objects], above):
        histogram = torch.bincount(values.flatten(), minlength=k * (LEVELS + 1)).view(k, LEVELS + 1)
        counts.append(histogram.flip(1).cumsum(1).flip(1)[:, 1:].double())
    return counts[0], counts[1]


def at_size(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Maps (K, h, w) between the centres of patches: (K, H, W)."""
    return F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def f_curves(maps: torch.Tensor, objects: torch.Tensor) -> torch.Tensor:
    """F at each level: maps (K, N), and which of their pixels are object (N,) → (K, LEVELS)."""
    hit, said = cuts(maps, objects)
    return f_measure(hit, said, objects.sum())


def max_f(maps: torch.Tensor, masks: Sequence[torch.Tensor]) -> float:
    """Of maps (n, h, w), and masks (H, W) bool of any sizes, in per cent."""
    curves = [
        f_curves(at_size(one[None], mask.shape).flatten(1), mask.flatten())
        for one, mask in zip(maps, masks, strict=True)
    ]
    return 100 * float(torch.cat(curves).mean(0).max())


def f_measure(hit: torch.Tensor, said: torch.Tensor, area: torch.Tensor) -> torch.Tensor:
    """F from the pixels that are rightly said to be object, that are said to be, and that are; 0 without a hit."""
    precision, recall = hit / said.clamp(min=1), hit / area
    return (1 + BETA) * precision * recall / (BETA * precision + recall).clamp(min=1e-12)


def binary_figures(predicted: torch.Tensor, counts: torch.Tensor) -> dict[str, torch.Tensor]:
    """F, IoU and accuracy (1 − MAE) of predictions of patches (..., n) bool, from the pixels in each patch (n, 2) that
    are ground, and that are object: (...) each."""
    ground, objects = counts.double().unbind(1)
    predicted = predicted.double()
    hit, false = predicted @ objects, predicted @ ground
    area, all_pixels = objects.sum(), counts.sum()
    return {
        "f": f_measure(hit, hit + false, area),
        "iou": hit / (area + false),
        "accuracy": (all_pixels - area - false + hit) / all_pixels,
    }


def adjusted_rand(table: torch.Tensor) -> torch.Tensor:
    """The adjusted Rand index of contingency tables (..., R, K): pixels of each region in each class → (...).

    1 for equal partitions, 0 on average for random ones. 1, too, where both have a single part.
    """

    def pairs(count: torch.Tensor) -> torch.Tensor:
        return count * (count - 1) / 2

    table = table.double()
    both = pairs(table).sum((-2, -1))
    regions, classes = pairs(table.sum(-1)).sum(-1), pairs(table.sum(-2)).sum(-1)
    expected = regions * classes / pairs(table.sum((-2, -1))).clamp(min=1)
    most = (regions + classes) / 2
    return torch.where(most == expected, 1.0, (both - expected) / torch.where(most == expected, 1.0, most - expected))


def scene_figures(regions: torch.Tensor, counts: torch.Tensor) -> dict[str, torch.Tensor]:
    """Ranked regions and the remainder (..., N, n) bool against the pixels of ground and objects in each patch
    (n, 1 + K): (...) each.

    ari: of all pixels, the ground being a class, the remainder a region. fg_ari: of the pixels of objects alone.
    purity: the share of the ranked regions' pixels that are of the region's main object; 0 without regions.
    """
    table = regions.double() @ counts.double()  # (..., N, 1 + K)
    ranked = table[..., :-1, :]
    main = ranked[..., 1:].amax(-1).sum(-1)
    return {
        "fg_ari": adjusted_rand(table[..., 1:]),
        "ari": adjusted_rand(table),
        "purity": main / ranked.sum((-2, -1)).clamp(min=1),
    }
