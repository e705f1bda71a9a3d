"""I-JEPA's blocks against their definition."""

import pytest
import torch

from timm_dseq.engine.random import uniform
from timm_dseq.engine.target_blocks import block_masks


def extent(masks):
    """Rows, columns, first row, first column of each block (…, h, w)."""
    rows, columns = masks.any(-1), masks.any(-2)
    return rows.sum(-1), columns.sum(-1), rows.int().argmax(-1), columns.int().argmax(-1)


def test_uniform_numbers_are_uniform_and_independent():
    draws = uniform(torch.arange(20000), 6)
    assert draws.min() >= 0 and draws.max() < 1
    histogram = torch.stack([torch.histc(column, 20, 0, 1) for column in draws.T])
    assert ((histogram - 1000).square() / 1000).sum(1).max() < 50  # χ² with 19 degrees: p < 2e-4
    assert (torch.corrcoef(draws.T) - torch.eye(6)).abs().max() < 0.03
    assert torch.corrcoef(torch.stack([draws[:-1, 0], draws[1:, 0]]))[0, 1].abs() < 0.03
    assert (uniform(torch.tensor([7, 7 + 2**32, 7 + 2**50]), 4).unique(dim=0).shape[0]) == 3


def test_each_sample_is_a_function_of_its_seed_alone():
    seeds = torch.randint(0, 2**60, (50,), generator=torch.Generator().manual_seed(0))
    many = block_masks((14, 14), seeds)
    for i in (0, 13, 49):
        one = block_masks((14, 14), seeds[i : i + 1])
        assert torch.equal(one.context[0], many.context[i]) and torch.equal(one.targets[0], many.targets[i])


@pytest.mark.parametrize("grid", [(14, 14), (12, 20)])
def test_targets_follow_the_definition(grid):
    h, w = grid
    blocks = block_masks(grid, torch.arange(4000))
    assert blocks.targets.flatten(2).any(2).all()
    rows, columns, top, left = (x.flatten().float() for x in extent(blocks.targets))
    assert torch.equal(rows * columns, blocks.targets.flatten(0, 1).sum((1, 2)).float())  # full rectangles
    scale, aspect = rows * columns / (h * w), rows / columns
    # the sides are rounded to whole patches, which moves them by half a patch at most
    assert (rows >= (0.15 * h * w * 0.75) ** 0.5 - 0.5).all() and (rows <= (0.2 * h * w * 1.5) ** 0.5 + 0.5).all()
    assert (columns >= (0.15 * h * w / 1.5) ** 0.5 - 0.5).all() and (columns <= (0.2 * h * w / 0.75) ** 0.5 + 0.5).all()
    assert scale.mean().item() == pytest.approx(0.175, abs=0.004)
    assert aspect.mean().item() == pytest.approx(1.125, abs=0.03)
    assert torch.corrcoef(torch.stack([scale, aspect]))[0, 1].abs() < 0.1
    # every place equally likely: the mean start is half the free room, and both ends occur
    for start, length, size in ((top, rows, h), (left, columns, w)):
        free = size - length
        assert (start / free).mean().item() == pytest.approx(0.5, abs=0.01)
        assert (start == 0).any() and (start == free).any()
        share = ((start == 0).float() * (free + 1)).mean()
        assert share.item() == pytest.approx(1, abs=0.08)


def test_the_context_has_the_aspect_of_the_grid_and_its_scale():
    seen = block_masks((12, 24), torch.arange(4000), target_scale=(0.001, 0.001))
    whole = seen.context | seen.targets.any(1)
    rows, columns = extent(whole)[:2]
    inside = (rows - columns / 2).abs() <= 1  # a target may lie outside the context
    assert inside.float().mean() > 0.6
    area = (rows * columns)[inside] / (12 * 24)
    assert area.mean().item() == pytest.approx(0.925, abs=0.02)
    assert area.min() >= 0.79


def test_contexts_and_targets_never_overlap_and_enough_is_left():
    blocks = block_masks((14, 14), torch.arange(5000))
    assert not (blocks.context & blocks.targets.any(1)).any()
    assert (blocks.context.sum((1, 2)) >= 10).all()
    assert (blocks.context.sum((1, 2)) > 100).any()  # nothing is cut to the smallest


def test_targets_are_dropped_from_the_last_where_no_draw_leaves_enough():
    blocks = block_masks((4, 4), torch.arange(500), min_context=10)
    kept = blocks.targets.flatten(2).any(2)
    assert not kept.all()
    assert not (kept[:, 1:] & ~kept[:, :-1]).any()
    assert (blocks.context.sum((1, 2)) >= 10)[kept.any(1)].all()
