"""I-JEPA's random blocks of patches: seeds (B,) → one context block and four target blocks for each sample.

The blocks of a sample are a pure function of its seed. They are not cut to the sizes of others in the batch.
"""

from dataclasses import dataclass

import torch

from ..arguments import check_grid, check_seeds, check_span, check_whole
from ..host import to_device
from .random import uniform

ATTEMPTS = 21  # the first, and at most 20 more


@dataclass(frozen=True)
class Blocks:
    """Context and target blocks of B images on one grid; a target that was dropped is empty."""

    context: torch.Tensor  # (B, h, w) bool, without the targets' patches
    targets: torch.Tensor  # (B, 4, h, w) bool
    seeds: torch.Tensor  # (B,)

    def to(self, device: torch.device | str) -> "Blocks":
        """The same blocks on a device, copied without making the host wait."""
        device = torch.device(device) if isinstance(device, str) else device
        return Blocks(*(to_device(part, device) for part in (self.context, self.targets, self.seeds)))

    def __len__(self) -> int:
        return len(self.context)

    def __getitem__(self, index) -> "Blocks":
        return Blocks(self.context[index], self.targets[index], self.seeds[index])


def block_masks(
    grid: tuple[int, int],
    seeds: torch.Tensor,
    context_scale: tuple[float, float] = (0.85, 1.0),
    target_scale: tuple[float, float] = (0.15, 0.2),
    target_aspect: tuple[float, float] = (0.75, 1.5),
    num_targets: int = 4,
    min_context: int = 10,
) -> Blocks:
    """Draw the context block and the target blocks of each seed (B,), on a grid (h, w).

    Scales are shares of the grid, aspects are height / width in patches; the context has the grid's aspect. Where fewer
    than `min_context` patches of it are left outside the targets, all blocks are drawn again, at most 20 times; after
    that, targets are dropped, the last first.
    """
    check_grid(grid)
    check_seeds(seeds)
    for name, scale in (("context_scale", context_scale), ("target_scale", target_scale)):
        check_span(name, scale, 1.0)
    check_span("target_aspect", target_aspect, float("inf"))
    check_whole("num_targets", num_targets, 1)
    check_whole("min_context", min_context, 0)
    h, w = grid
    b, blocks = len(seeds), num_targets + 1
    draws = uniform(seeds, ATTEMPTS * blocks * 4).view(b, ATTEMPTS, blocks, 4)  # scale, aspect, row, column
    scale, aspect, row, column = draws.unbind(-1)  # each (B, attempts, blocks), the context first
    context = context_scale[0] + (context_scale[1] - context_scale[0]) * scale[:, :, :1]
    targets = target_scale[0] + (target_scale[1] - target_scale[0]) * scale[:, :, 1:]
    area = h * w * torch.cat([context, targets], dim=2)
    aspect = target_aspect[0] + (target_aspect[1] - target_aspect[0]) * aspect
    aspect[:, :, 0] = h / w
    height = (area * aspect).sqrt().round().clamp(1, h)
    width = (area / aspect).sqrt().round().clamp(1, w)
    rows = _span(row, height, h)  # (B, attempts, blocks, h)
    columns = _span(column, width, w)
    masks = rows[..., :, None] & columns[..., None, :]  # (B, attempts, blocks, h, w)

    seen = masks[:, :, 0] & ~masks[:, :, 1:].any(2)  # (B, attempts, h, w)
    enough = seen.sum((2, 3)) >= min_context
    enough[:, -1] = True
    attempt = enough.int().argmax(1)  # the first that leaves enough, or the last
    masks = masks.gather(1, attempt.view(b, 1, 1, 1, 1).expand(-1, 1, blocks, h, w))[:, 0]
    taken = masks[:, 1:].cumsum(1) > 0  # (B, targets, h, w): the first target, the first two, …
    left = (masks[:, :1] & ~taken).sum((2, 3))
    targets = masks[:, 1:] & (left >= min_context)[:, :, None, None]
    return Blocks(masks[:, 0] & ~targets.any(1), targets, seeds)


def _span(draw: torch.Tensor, length: torch.Tensor, size: int) -> torch.Tensor:
    """The cells of an interval of this length, at a random start, all equally likely: (…, size) bool."""
    free = size - length
    start = torch.minimum((draw * (free + 1)).floor(), free)[..., None]
    cell = torch.arange(size, device=draw.device)
    return (cell >= start) & (cell < start + length[..., None])
