"""Figures against their definitions, said slowly, and against scikit-learn."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from common.discovering.judging import WAYS, Judging
from common.discovering.measures import adjusted_rand, binary_figures, f_curves, patch_counts, scene_figures
from common.discovering.predictions import OTSU, RANK_1, REGIONS, binary, random_order
from common.discovering.truth import Truth
from sklearn.metrics import adjusted_rand_score
from torch.nn import functional as F

from timm_dseq.engine.regions import rank_regions


def slow_f(predicted, mask):
    hit = (predicted & mask).sum()
    precision, recall = hit / max(predicted.sum(), 1), hit / mask.sum()
    return 1.3 * precision * recall / (0.3 * precision + recall) if hit else 0.0


def slow_max_f(maps, masks):
    """One image and one threshold at a time."""
    by_level = [np.mean([slow_f(m * 255 > k, mask) for m, mask in zip(maps, masks, strict=True)]) for k in range(255)]
    return 100 * max(by_level)


def at_size_between(patches, size):
    """Between the centres of patches: (h, w) → an array of this size."""
    return F.interpolate(patches[None, None], size, mode="bilinear", align_corners=False)[0, 0].numpy()


def at_size(patches, size):
    """A pixel is in the patch that its centre lies in: (h, w) bool → an array of this size."""
    (height, width), (h, w) = size, patches.shape
    rows = [math.floor(Fraction((2 * y + 1) * h, 2 * height)) for y in range(height)]
    columns = [math.floor(Fraction((2 * x + 1) * w, 2 * width)) for x in range(width)]
    return patches.numpy()[np.ix_(rows, columns)]


def scene(sizes, grid, objects=1, seed=0):
    """Maps (B, h, w), and labels (H, W) of each image."""
    draw = torch.Generator().manual_seed(seed)
    maps = torch.rand(len(sizes), *grid, generator=draw)
    coarse = [torch.randint(0, objects + 1, (3, 3), generator=draw) for _ in sizes]
    for labels in coarse:
        labels[1, 1] = objects
    labels = [F.interpolate(c[None, None].float(), size)[0, 0].int() for c, size in zip(coarse, sizes, strict=True)]
    return maps, labels


def judged(maps, labels, draws=3, min_area=0.02, scenes=False):
    judging = Judging(["mine"], len(maps), 5, min_area, draws, scenes)
    truths = [Truth((each.shape[1], each.shape[0]), labels=each.numpy()) for each in labels]
    judging.add(range(len(maps)), {"mine": maps}, torch.rand(len(maps), 3, 32, 32), truths, torch.arange(len(maps)))
    return judging.records()


SIZES = [(37, 52), (40, 33), (24, 24)]


@pytest.mark.parametrize("grid", [(5, 7), (8, 8)])
def test_max_f_and_mae_are_those_of_every_image_and_threshold_by_itself(grid):
    maps, labels = scene(SIZES, grid)
    record = judged(maps, labels)[0]
    full = [at_size_between(m, size) for m, size in zip(maps, SIZES, strict=True)]
    masks = [each.numpy() > 0 for each in labels]
    assert record["max_f"] == pytest.approx(slow_max_f(full, masks), abs=1e-6)
    mae = np.mean([np.abs(f - mask).mean() for f, mask in zip(full, masks, strict=True)])
    assert record["mae"] == pytest.approx(mae, abs=1e-6)


def test_each_level_is_cut_by_itself():
    full, mask = torch.rand(2, 700, generator=torch.Generator().manual_seed(0)), torch.arange(700) % 3 == 0
    slow = [[slow_f((one * 255 > k).numpy(), mask.numpy()) for k in range(255)] for one in full]
    np.testing.assert_allclose(f_curves(full, mask).numpy(), slow, atol=1e-9)


def test_binary_figures_are_those_of_the_masks_at_full_size():
    maps, labels = scene(SIZES, (6, 5))
    maps = (maps - maps.amin((1, 2), keepdim=True)) / (maps.amax((1, 2)) - maps.amin((1, 2)))[:, None, None]
    record = judged(maps, labels)[0]
    regions = rank_regions(maps, 5, 0.02)
    for way, patches in {
        OTSU: binary(maps, regions)[OTSU].view(maps.shape),
        RANK_1: regions.masks[:, 0],
        REGIONS: regions.masks[:, :4].any(1),
    }.items():
        found = {"f": [], "iou": [], "accuracy": []}
        for mask, truth in zip(patches, labels, strict=True):
            said = at_size(mask, truth.shape)
            real = truth.numpy() > 0
            found["f"].append(slow_f(said, real))
            found["iou"].append((said & real).sum() / (said | real).sum())
            found["accuracy"].append((said == real).mean())
        for name, values in found.items():
            assert record["predictions"][way][name] == pytest.approx(100 * np.mean(values), abs=1e-9), (way, name)


def test_a_perfect_map_has_all_and_its_inverse_next_to_nothing():
    blocks = torch.zeros(2, 4, 4)
    blocks[:, 1:3, 1:3] = 1
    labels = [F.interpolate(each[None, None], (32, 48))[0, 0].int() for each in blocks]
    for maps, max_f, iou in ((blocks, 100, 100), (1 - blocks, 0, 0)):
        at_full_size = torch.stack([F.interpolate(m[None, None], (32, 48))[0, 0].flatten() for m in maps])
        objects = labels[0].flatten() > 0
        assert 100 * f_curves(at_full_size, objects).mean(0).max() == pytest.approx(max_f)
        error = (at_full_size - objects.float()).abs().mean()
        assert error == pytest.approx(0 if max_f else 1)
        found = judged(maps, labels, min_area=0.0)[0]["predictions"][OTSU]
        assert found["iou"] == pytest.approx(iou) and found["accuracy"] == pytest.approx(iou)


def test_a_constant_map_says_the_whole_image():
    maps, labels = scene(SIZES, (4, 4))
    (whole,) = judged(maps, labels)[1]["predictions"].values()
    assert whole["iou"] == pytest.approx(100 * np.mean([(each.numpy() > 0).mean() for each in labels]))


def test_pixels_where_nothing_is_known_count_nowhere():
    maps, (labels,) = scene([(32, 32)], (4, 4))
    hidden = labels.clone()
    hidden[:8] = -1  # the first row of patches
    counts = patch_counts(hidden, (4, 4), 2)
    assert counts[:4].sum() == 0 and counts.sum() == 24 * 32
    lower = judged(maps, [hidden])[0]
    full = at_size_between(maps[0], (32, 32))[8:]
    mask = labels[8:].numpy() > 0
    assert lower["mae"] == pytest.approx(np.abs(full - mask).mean(), abs=1e-6)
    assert lower["max_f"] == pytest.approx(slow_max_f([full], [mask]), abs=1e-6)
    predicted = binary(maps, rank_regions(maps, 5, 0.02))[OTSU].clone()
    predicted[0, :4] = ~predicted[0, :4]  # what is said there does not matter
    figures = binary_figures(predicted[0], counts)
    assert lower["predictions"][OTSU]["iou"] == pytest.approx(100 * float(figures["iou"]))


def test_random_masks_have_the_area_of_the_prediction_and_depend_on_their_image_alone():
    orders = random_order(torch.tensor([5, 6, 7]), 4, 30)
    assert torch.equal(orders.sort(dim=2).values, torch.arange(30).expand(3, 4, 30))
    assert torch.equal(random_order(torch.tensor([7]), 4, 30)[0], orders[2])
    assert len({tuple(order.tolist()) for order in orders.flatten(0, 1)}) == 12


def test_random_masks_meet_the_share_that_chance_gives():
    maps, labels = scene([(64, 64)] * 40, (8, 8))
    maps = maps ** torch.linspace(0.2, 9, 40)[:, None, None]  # large and small predictions
    record = judged(maps, labels, draws=50)[0]["predictions"][OTSU]
    predicted = binary(maps, rank_regions(maps, 5, 0.02))[OTSU].float().mean(1)
    area = torch.stack([(each > 0).float().mean() for each in labels])
    expected = (predicted * area / (predicted + area - predicted * area)).mean()
    assert record["random_iou"] == pytest.approx(100 * float(expected), rel=0.03)


@pytest.mark.parametrize("seed", range(6))
def test_ari_is_scikit_learns(seed):
    draw = np.random.default_rng(seed)
    ours, theirs = draw.integers(0, 1 + seed, 200), draw.integers(0, 4, 200)
    table = torch.zeros(1 + seed, 4)
    for a, b in zip(ours, theirs, strict=True):
        table[a, b] += 1
    assert float(adjusted_rand(table)) == pytest.approx(adjusted_rand_score(theirs, ours), abs=1e-12)


def test_ari_of_single_parts_is_scikit_learns():
    for table, pair in (([[7.0]], ([0] * 7, [0] * 7)), ([[3.0, 4.0]], ([0] * 7, [0] * 3 + [1] * 4))):
        assert float(adjusted_rand(torch.tensor(table))) == adjusted_rand_score(*pair)


def test_scenes_are_judged_pixel_by_pixel():
    maps, labels = scene([(30, 45), (33, 20), (30, 30)], (6, 5), objects=4, seed=3)
    labels[2].clamp_(max=1)  # an image with one object is a scene, too
    records = judged(maps, labels, scenes=True)
    regions = rank_regions(maps, 5, 0.02).masks
    found = {"ari": [], "fg_ari": [], "purity": []}
    for masks, truth in zip(regions, labels, strict=True):
        region = at_size(masks.float().argmax(0), truth.shape).ravel()
        truth = truth.numpy().ravel()
        found["ari"].append(adjusted_rand_score(truth, region))
        found["fg_ari"].append(adjusted_rand_score(truth[truth > 0], region[truth > 0]))
        main = [np.bincount(truth[(region == r) & (truth > 0)], minlength=5).max() for r in range(4)]
        found["purity"].append(sum(main) / max((region < 4).sum(), 1))
    for name, values in found.items():
        assert records[0]["scene"][name] == pytest.approx(100 * np.mean(values)), name
    assert records[-1]["map"] == "rectangles" and set(WAYS) == records[0]["predictions"].keys()


def test_regions_that_are_the_objects_are_pure_and_agree():
    counts = torch.tensor([[4, 0, 0], [0, 4, 0], [0, 0, 4]])  # three patches, each of one class
    regions = torch.tensor([[False, True, False], [False, False, True], [True, False, False]])
    assert {name: float(value) for name, value in scene_figures(regions, counts).items()} == {
        "fg_ari": 1.0,
        "ari": 1.0,
        "purity": 1.0,
    }
