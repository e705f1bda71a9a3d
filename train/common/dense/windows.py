"""Attention within windows: tokens (B, P + h·w, D) through timm's own blocks, each window a row of its own.

A map is cut into the fewest equal windows that are no larger than asked for, so that it is padded little: 64 × 64
patches into 5 × 5 windows of 13 × 13. Patches see the patches of their window, and the P prefix tokens (class,
registers), of which every window has a copy. The copies are updated apart, and averaged behind the blocks. One window
over the whole map is global attention.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from timm_dseq.engine.vit import run_blocks

Grid = tuple[int, int]  # rows and columns


def attend_in_windows(
    blocks: Sequence[nn.Module], tokens: torch.Tensor, grid: Grid, window: int, checkpointing: bool = False
) -> torch.Tensor:
    """(B, P + h·w, D) → the same shape, behind blocks that attend within windows of at most window × window patches."""
    size = tuple(ceil_div(side, ceil_div(side, window)) for side in grid)
    rows, rule = split(tokens, grid, size), None
    if grid[0] % size[0] or grid[1] % size[1]:  # what pads the map is seen by nobody
        real = split(torch.ones_like(tokens[..., :1], dtype=torch.float32), grid, size) > 0
        rule = real[:, None, None, :, 0]  # (B·n, 1, 1, P + size)
    return join(run_blocks(blocks, rows, rule, checkpointing), grid, size)


def split(tokens: torch.Tensor, grid: Grid, size: Grid) -> torch.Tensor:
    """(B, P + h·w, D) → (B·n, P + size, D), the n windows of an image side by side; zeros pad the map."""
    (h, w), (a, b) = grid, size
    prefix, patches = tokens.split([tokens.shape[1] - h * w, h * w], dim=1)
    batch, channels = len(tokens), tokens.shape[-1]
    patches = F.pad(patches.reshape(batch, h, w, channels), (0, 0, 0, -w % b, 0, -h % a))
    down, across = patches.shape[1] // a, patches.shape[2] // b
    patches = patches.reshape(batch, down, a, across, b, channels).transpose(2, 3)
    return torch.cat([prefix.repeat_interleave(down * across, 0), patches.reshape(-1, a * b, channels)], dim=1)


def join(rows: torch.Tensor, grid: Grid, size: Grid) -> torch.Tensor:
    """The inverse of `split`: the padding goes, and of the prefix tokens the mean over windows is left."""
    (h, w), (a, b) = grid, size
    down, across, channels = ceil_div(h, a), ceil_div(w, b), rows.shape[-1]
    prefix, patches = rows.split([rows.shape[1] - a * b, a * b], dim=1)
    prefix = prefix.unflatten(0, (-1, down * across)).mean(1)
    patches = patches.reshape(-1, down, across, a, b, channels).transpose(2, 3)
    patches = patches.reshape(-1, down * a, across * b, channels)[:, :h, :w]
    return torch.cat([prefix, patches.flatten(1, 2)], dim=1)


def ceil_div(a: int, b: int) -> int:
    """⌈a / b⌉."""
    return -(-a // b)
