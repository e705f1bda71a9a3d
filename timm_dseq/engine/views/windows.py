"""The patches that a view keeps: seeds (n,) → random windows of 2×2 patches (n, K), and what the encoder makes of them.

The windows of a view are a pure function of its seed.
"""

import torch
from timm.models import VisionTransformer

from ...arguments import check_grid, check_seeds, check_share
from ...errors import UserError
from ..random import uniform
from ..vit import embed_patches, final_norm, full_precision, run_blocks

SIDE = 2  # of a window, in patches
_STREAM = 5  # of the seeds' random numbers: streams 0 to 4 are taken


def view_windows(grid: tuple[int, int], seeds: torch.Tensor, share: float) -> torch.Tensor:
    """The patches (row by row in a grid h×w) in random windows, window by window: (n, K) int64, K about share · h · w.

    The windows are some of those that tile the grid. An odd grid has a row or column more than they cover: it is the
    first or the last one.
    """
    check_grid(grid)
    check_seeds(seeds)
    check_share("share", share)
    h, w = grid
    if min(grid) < SIDE:
        raise UserError(f"a grid of {h}×{w} patches is too small for windows of {SIDE}×{SIDE}: use larger images")
    rows, columns = h // SIDE, w // SIDE
    keep = min(max(1, round(share * h * w / SIDE**2)), rows * columns)
    draws = uniform(seeds, 2 + rows * columns, stream=_STREAM)
    window = draws[:, 2:].argsort(dim=1, stable=True)[:, :keep]  # (n, windows)
    top = window // columns * SIDE + h % SIDE * (draws[:, :1] < 0.5)
    left = window % columns * SIDE + w % SIDE * (draws[:, 1:2] < 0.5)
    corner = top * w + left
    return torch.stack([corner + i * w + j for i in range(SIDE) for j in range(SIDE)], dim=2).flatten(1)


def cut(images: torch.Tensor, patches: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The pixels of some patches of each image, one below the other: (n, C, H, W) and (n, K) → (n, C, K·p, q)."""
    n, channels, height, width = images.shape
    p, q = height // grid[0], width // grid[1]
    tiles = images.view(n, channels, grid[0], p, grid[1], q).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # (n, N, C, p, q)
    tiles = tiles[torch.arange(n, device=images.device)[:, None], patches]
    return tiles.transpose(1, 2).flatten(2, 3)


def encode_windows(model: VisionTransformer, pixels: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
    """What the encoder makes of some patches of each image, pooled: (n, C, K·p, q) and (n, K) → (n, D or 2·D).

    pixels: by `cut`. It is the mean of the encoded patches and, beside it, the class token, if there is one.
    """
    prefix = model.num_prefix_tokens
    tokens = embed_patches(model, pixels, patches)
    tokens = run_blocks(model.blocks, tokens, checkpointing=model.grad_checkpointing)
    tokens = full_precision(final_norm(model)(tokens))
    pooled = tokens[:, prefix:].mean(1)
    return pooled if model.cls_token is None else torch.cat([pooled, tokens[:, 0]], dim=1)


def pooled_width(model: VisionTransformer) -> int:
    """Numbers in what `encode_windows` returns for each image."""
    return model.embed_dim * (1 if model.cls_token is None else 2)
