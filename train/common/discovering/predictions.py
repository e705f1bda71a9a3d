"""WHICH: maps (B, h, w) → binary predictions of where the object is, (B, h·w) bool for each way to make them."""

import torch

from timm_dseq.engine.random import uniform
from timm_dseq.engine.regions import Regions, connected_components, otsu_foreground

# What each way takes for object, for tables.
OTSU, RANK_1, REGIONS = "Otsu", "rank 1", "regions"


def binary(maps: torch.Tensor, regions: Regions) -> dict[str, torch.Tensor]:
    """All above Otsu's threshold; the region of rank 1; all ranked regions (which are Otsu's but for small ones):
    (B, h·w) bool each. regions: of these maps."""
    masks = regions.masks.flatten(2)
    return {OTSU: otsu_foreground(maps.flatten(1)), RANK_1: masks[:, 0], REGIONS: masks[:, :-1].any(1)}


def random_order(seeds: torch.Tensor, draws: int, patches: int) -> torch.Tensor:
    """The place of each patch in `draws` random orders of an image with each of these seeds (B,): (B, draws, n).

    The patches whose place is below a make a random mask of area a.
    """
    values = uniform(seeds, draws * patches).view(len(seeds), draws, patches)
    return values.argsort(dim=2, stable=True).argsort(dim=2, stable=True)


def largest_box(mask: torch.Tensor) -> torch.Tensor:
    """The box of greatest area round an 8-connected part of each mask (B, h, w): (B, 4) left, top, right, bottom, in
    patches. All 0 for an empty mask."""
    b, h, w = mask.shape
    label = connected_components(mask).flatten(1)  # (B, n), 0 outside
    row, column = (x.expand(b, -1) for x in (torch.arange(h * w) // w, torch.arange(h * w) % w))
    edges = []
    for at, how, start in ((column, "amin", w), (row, "amin", h), (column + 1, "amax", 0), (row + 1, "amax", 0)):
        edges.append(torch.full((b, h * w + 1), start).scatter_reduce(1, label, at, how))
    boxes = torch.stack(edges, dim=2)  # (B, n + 1, 4)
    area = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(2)
    area[:, 0] = 0
    best = area.argmax(1)
    found = boxes[torch.arange(b), best]
    return torch.where(area.amax(1, keepdim=True) > 0, found, 0)


def in_pixels(boxes: torch.Tensor, grid: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
    """Boxes (..., 4) in patches of a grid (h, w) → pixels of an image of this width and height."""
    scale = torch.tensor([size[0] / grid[1], size[1] / grid[0]])
    return boxes * torch.cat([scale, scale])


def elsewhere(boxes: torch.Tensor, seeds: torch.Tensor, draws: int, size: tuple[int, int]) -> torch.Tensor:
    """Boxes of the same size at random places inside the image: corners (k, 4), a seed for each → (k, draws, 4)."""
    extent = boxes[:, None, 2:] - boxes[:, None, :2]
    room = torch.tensor(size) - extent
    corner = uniform(seeds, 2 * draws).view(-1, draws, 2) * room
    return torch.cat([corner, corner + extent], dim=2)
