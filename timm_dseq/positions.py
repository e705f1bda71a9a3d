"""Fixed 2-D sin-cos positions, shared by the encoder and the predictor: (h, w) grid → (h·w, dim)."""

import torch
from timm.layers import build_sincos2d_pos_embed


def sincos_positions(grid: tuple[int, int], dim: int, device: torch.device | None = None) -> torch.Tensor:
    """Sin-cos positions of a grid, patches row by row: (h·w, dim), float32.

    The channels are those of MAE and I-JEPA, quarter by quarter: sin and cos of the column, sin and cos of the row.
    timm puts the row first, so the two halves are swapped.
    """
    by_row_first = build_sincos2d_pos_embed(list(grid), dim, interleave_sin_cos=True, device=device)
    return by_row_first.roll(dim // 2, dims=1)
