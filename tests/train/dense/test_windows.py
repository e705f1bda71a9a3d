"""Attention in windows, with timm's own blocks, against global attention and against one mask over all tokens."""

import math

import pytest
import torch
from common.dense.windows import attend_in_windows, join, split
from common.supervised.drop_path import PerSampleDropPath
from timm.models.vision_transformer import Block, ParallelScalingBlock
from torch import nn

DIM, HEADS = 24, 3


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def blocks(count=2, kind=Block, **args):
    return nn.ModuleList(kind(DIM, HEADS, qkv_bias=True, **args) for _ in range(count)).double()


def tokens_of(grid, prefix, batch=2):
    return torch.randn(batch, prefix + grid[0] * grid[1], DIM, dtype=torch.float64)


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize(("grid", "window"), [((4, 6), 6), ((4, 6), 14), ((7, 7), 7)])
def test_one_window_over_the_map_is_global_attention(grid, window, prefix):
    layers, tokens = blocks(), tokens_of(grid, prefix)
    expected = nn.Sequential(*layers)(tokens)
    torch.testing.assert_close(attend_in_windows(layers, tokens, grid, window), expected)


def in_one_row(layers, tokens, grid, window, prefix):
    """The definition: one row of all patches and of a copy of the prefix for each window, under one mask."""
    size = [math.ceil(side / math.ceil(side / window)) for side in grid]  # of windows that are as equal as can be
    down, across = (torch.arange(side) // own for side, own in zip(grid, size, strict=True))
    of_patch = (down[:, None] * 1000 + across).flatten()  # (h·w,)
    windows = of_patch.unique()
    row = torch.cat([*[tokens[:, :prefix]] * len(windows), tokens[:, prefix:]], dim=1)
    own = torch.cat([windows.repeat_interleave(prefix), of_patch])
    for layer in layers:
        row = layer(
            row, attn_mask=torch.zeros(len(own), len(own)).double().masked_fill(own[:, None] != own, -torch.inf)
        )
    copies = row[:, : len(windows) * prefix].reshape(len(row), len(windows), prefix, DIM)
    return torch.cat([copies.mean(1), row[:, len(windows) * prefix :]], dim=1)


@pytest.mark.parametrize("kind", [Block, ParallelScalingBlock])
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize(("grid", "window"), [((6, 6), 3), ((5, 7), 3), ((2, 9), 4), ((1, 5), 2), ((8, 3), 7)])
def test_windows_equal_one_mask_over_all_tokens(grid, window, prefix, kind):
    layers, tokens = blocks(kind=kind), tokens_of(grid, prefix)
    expected = in_one_row(layers, tokens, grid, window, prefix)
    torch.testing.assert_close(attend_in_windows(layers, tokens, grid, window), expected)


def test_checkpointing_changes_neither_outputs_nor_gradients():
    layers, tokens = blocks(), tokens_of((5, 7), 1).requires_grad_()
    outputs = {}
    for checkpointing in (False, True):
        out = attend_in_windows(layers, tokens, (5, 7), 3, checkpointing)
        outputs[checkpointing] = (
            out.detach(),
            *torch.autograd.grad(out.square().sum(), [tokens, *layers.parameters()]),
        )
    for one, other in zip(outputs[False], outputs[True], strict=True):
        torch.testing.assert_close(one, other)


def test_join_undoes_split():
    for grid, size in [((6, 6), (3, 3)), ((5, 7), (3, 4)), ((1, 5), (1, 2))]:
        for prefix in (0, 2):
            tokens = tokens_of(grid, prefix)
            torch.testing.assert_close(join(split(tokens, grid, size), grid, size), tokens)


def test_drop_path_drops_all_windows_of_a_sample_together():
    layers = blocks(1, drop_path=0.5)
    drop = PerSampleDropPath(layers)
    layers.train()
    tokens = tokens_of((5, 7), 1, batch=8)
    drop.draw(torch.arange(8) * 977)
    assert 0 < (drop.factors == 0).sum() < drop.factors.numel()
    batch = attend_in_windows(layers, tokens, (5, 7), 3)
    for index in range(8):  # alone, with its own factors
        drop.draw(torch.tensor([index * 977]))
        torch.testing.assert_close(attend_in_windows(layers, tokens[index : index + 1], (5, 7), 3)[0], batch[index])
    drop.factors = torch.zeros(8, 2)
    torch.testing.assert_close(attend_in_windows(layers, tokens, (5, 7), 3), tokens)
