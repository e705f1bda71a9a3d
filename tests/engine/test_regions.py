"""Regions against OpenCV, SciPy and the definition."""

from itertools import pairwise

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from timm_dseq.engine.regions import ORDERS, REGIONS, connected_components, otsu_foreground, rank_regions
from timm_dseq.engine.saliency import min_max
from timm_dseq.errors import UserError

from .. import reference
from ..tiny import islands


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def spiral(h, w):
    """A path of one patch's width that winds to the middle: the longest way through a grid."""
    grid = np.zeros((h, w), dtype=bool)
    r, c, dr, dc = 0, 0, 0, 1
    grid[0, 0] = True
    for _ in range(h * w):
        ahead = (r + dr, c + dc)
        beyond = (r + 2 * dr, c + 2 * dc)
        free = 0 <= ahead[0] < h and 0 <= ahead[1] < w and not grid[ahead]
        if free and not (0 <= beyond[0] < h and 0 <= beyond[1] < w and grid[beyond]):
            r, c = ahead
            grid[r, c] = True
        else:
            dr, dc = dc, -dr
    return grid


def comb(h, w):
    grid = np.zeros((h, w), dtype=bool)
    grid[:, ::2] = True
    grid[-1] = True
    return grid


def zigzag(h, w):
    grid = np.zeros((h, w), dtype=bool)
    grid[::2] = True
    grid[1::4, -1] = True
    grid[3::4, 0] = True
    return grid


def assert_same_components(foreground):
    ours = connected_components(torch.from_numpy(foreground)).numpy()
    for mine, mask in zip(ours, foreground, strict=True):
        theirs, count = ndimage.label(mask, np.ones((3, 3)))
        assert len(np.unique(mine[mask])) == count
        assert len(set(zip(mine[mask].tolist(), theirs[mask].tolist(), strict=True))) == count
        assert not mine[~mask].any()


@pytest.mark.parametrize("size", [(14, 14), (7, 19), (1, 30), (64, 5), (2, 2)])
@pytest.mark.parametrize("density", [0.2, 0.4, 0.5, 0.7])
def test_components_equal_scipy_on_random_maps(size, density):
    assert_same_components((torch.rand(500, *size, generator=generator()) < density).numpy())


@pytest.mark.parametrize("size", [(14, 14), (32, 32), (64, 64), (64, 17), (9, 33)])
def test_components_equal_scipy_on_spirals_combs_and_checkerboards(size):
    h, w = size
    checkers = np.indices(size).sum(0) % 2 == 0
    shapes = [spiral(h, w), comb(h, w), zigzag(h, w), checkers, np.ones(size, dtype=bool), np.zeros(size, dtype=bool)]
    shapes += [~shape for shape in shapes[:3]] + [shape[::-1, ::-1].copy() for shape in shapes[:3]]
    assert spiral(h, w).sum() > h * w / 3
    assert_same_components(np.stack(shapes))


def test_known_rounds_suffice_where_the_device_is_never_asked(monkeypatch):
    """On the CPU the loop ends early; elsewhere it must be right without that."""
    monkeypatch.setattr(torch, "equal", lambda a, b: False)
    assert_same_components(np.stack([spiral(32, 32), comb(32, 32), zigzag(32, 32), ~spiral(32, 32)]))
    assert_same_components((torch.rand(200, 16, 16, generator=generator()) < 0.45).numpy())


@pytest.mark.parametrize(("size", "smooth"), [((14, 14), True), ((14, 14), False), ((28, 28), True), ((64, 64), True)])
def test_otsu_equals_opencv(size, smooth):
    count = 5000 if size == (14, 14) else 300
    maps = torch.rand(count, *size, generator=generator())
    if smooth:
        maps = torch.nn.functional.avg_pool2d(maps[:, None], 3, 1, 1)[:, 0]
    flat = min_max(maps.flatten(1))
    ours = otsu_foreground(flat).numpy()
    for mine, values in zip(ours, (flat * 255).round().to(torch.uint8).numpy(), strict=True):
        _, theirs = cv2.threshold(values[None], 0, 1, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
        assert np.array_equal(mine, theirs[0].astype(bool))


@settings(max_examples=80, deadline=None)
@given(
    h=st.integers(1, 20),
    w=st.integers(2, 20),
    seed=st.integers(0, 2**31),
    n=st.integers(2, 7),
    share=st.sampled_from([0, 0.02, 0.15]),
    order=st.sampled_from(ORDERS),
    kind=st.sampled_from(REGIONS),
)
def test_regions_are_disjoint_cover_the_grid_and_are_ranked(h, w, seed, n, share, order, kind):
    maps = torch.cat([islands(3, h, w, generator(seed)), torch.rand(3, h, w, generator=generator(seed))])
    regions = rank_regions(maps, n, share, order, torch.arange(6), kind)
    assert regions.masks.shape == (6, n, h, w)
    assert (regions.masks.sum(1) == 1).all()
    assert torch.equal(regions.area, regions.masks.sum((2, 3)))
    filled = regions.area > 0
    assert torch.equal(filled[:, :-1].sum(1), regions.count)
    assert not (filled[:, 1:-1] & ~filled[:, :-2]).any()  # found ones first
    if kind == "components":
        assert ((regions.area[:, :-1] >= share * h * w) | ~filled[:, :-1]).all()
    scores = regions.score[:, :-1]
    pairs = filled[:, :-1][:, 1:]
    if order == "saliency":
        assert (scores[:, :-1] >= scores[:, 1:])[pairs].all()
    if order == "inverse":
        assert (scores[:, :-1] <= scores[:, 1:])[pairs].all()
    if order == "spatial":
        first = regions.masks[:, :-1].flatten(2).int().argmax(2)
        assert (first[:, :-1] < first[:, 1:])[pairs].all()


def test_regions_equal_the_slow_reference():
    maps = torch.cat([islands(150, 9, 11, generator()), torch.rand(150, 9, 11, generator=generator())])
    regions = rank_regions(maps)
    assert (regions.count > 1).sum() > 50
    for i, values in enumerate(min_max(maps.flatten(1))):
        theirs = reference.regions(values, (9, 11), 5, 0.02)
        ours = [set(m.flatten().nonzero().flatten().tolist()) for m in regions.masks[i] if m.any()]
        assert ours == theirs


def test_ties_go_to_the_larger_area_then_to_the_lowest_patch():
    one = torch.zeros(1, 5, 9)
    one[0, 0, 0] = one[0, 2, 2:4] = one[0, 4, 8] = 1.0
    regions = rank_regions(one, min_area=0)
    assert [m.flatten().nonzero().flatten().tolist() for m in regions.masks[0, :3]] == [[20, 21], [0], [44]]


def test_constant_and_unfinished_maps_have_only_the_remainder():
    maps = torch.stack([torch.zeros(4, 4), torch.ones(4, 4), torch.eye(4) * torch.nan, torch.eye(4) * torch.inf])
    for kind in REGIONS:
        regions = rank_regions(maps, regions=kind)
        assert (regions.count == 0).all() and regions.masks[:, -1].all() and not regions.masks[:, :-1].any()


def test_random_order_is_a_function_of_the_seed():
    maps = islands(40, 12, 12, generator())
    seeds = torch.arange(40)
    a = rank_regions(maps, order="random", seeds=seeds, min_area=0)
    one = rank_regions(maps[7:8], order="random", seeds=seeds[7:8], min_area=0)
    other = rank_regions(maps, order="random", seeds=seeds + 1, min_area=0)
    plain = rank_regions(maps, min_area=0)
    assert torch.equal(a.masks[7], one.masks[0])
    assert not torch.equal(a.masks, other.masks)
    assert torch.equal(a.masks[:, :-1].any(1), plain.masks[:, :-1].any(1))
    assert len({tuple(order) for order in a.score[plain.count == 4][:, :4].argsort(1).tolist()}) > 5


@pytest.mark.parametrize(("h", "w", "n"), [(14, 14, 5), (12, 20, 5), (14, 14, 4), (28, 28, 7), (3, 17, 6)])
def test_uniform_regions_are_near_equal_rectangles(h, w, n):
    masks = rank_regions(torch.rand(1, h, w, generator=generator()), n, regions="uniform").masks[0]
    areas = []
    for mask in masks:
        rows, columns = mask.any(1).sum(), mask.any(0).sum()
        areas.append(int(mask.sum()))
        assert areas[-1] == rows * columns
    assert max(areas) - min(areas) <= h + w


@pytest.mark.parametrize(("h", "w", "n"), [(8, 8, 4), (14, 14, 5), (3, 17, 6)])
def test_bands_are_of_equally_many_patches_and_none_is_more_salient_than_the_one_before(h, w, n):
    maps = torch.rand(9, h, w, generator=generator())
    regions = rank_regions(maps, n, regions="bands")
    size = round(h * w / (n + 1))
    assert (regions.area[:, :-1] == size).all() and (regions.area[:, -1] == h * w - (n - 1) * size).all()
    for values, masks in zip(maps, regions.masks, strict=True):
        for band, following in pairwise(masks):
            assert values[band].min() >= values[following].max()


def test_half_precision_maps_are_ranked_in_full_precision():
    maps = islands(20, 14, 14, generator()).bfloat16()
    assert torch.equal(rank_regions(maps).masks, rank_regions(maps.float()).masks)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_regions": 1}, "num_regions=1"),
        ({"min_area": 2}, "min_area=2"),
        ({"order": "best"}, "order='best'"),
        ({"regions": "slic"}, "regions='slic'"),
        ({"stop_after": 5}, "stop_after=5"),
        ({"order": "random"}, "needs seeds"),
    ],
)
def test_options_that_make_no_regions_are_named(options, says):
    with pytest.raises(UserError, match=says):
        rank_regions(torch.rand(1, 4, 4), **options)
