"""Boxes as torchvision draws them, pixels as PIL resizes them, and no sample depends on its batch."""

import math

import numpy as np
import pytest
import torch
from common.data import crops
from common.data.crops import _YIQ, Colours, _weights, box_draws, crop_boxes, cropped, cropped_windows
from common.data.order import sample_seeds
from PIL import Image
from scipy.stats import ks_2samp
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as tv

from timm_dseq import view_windows
from timm_dseq.engine.random import uniform
from timm_dseq.engine.views.windows import cut

ALL = Colours(jitter=0.5, hue=0.1, gray=0.2, solarize=0.1)

SCALE = (0.3, 1.0)
SHAPES = [(100, 100), (60, 200), (375, 500), (30, 1000), (1, 1), (1, 4000), (3, 2)]


def boxes_of(count, shape, scale=SCALE, seed=0):
    samples = torch.stack([torch.zeros(count, dtype=torch.long), torch.arange(count)], dim=1)
    return crop_boxes(box_draws(sample_seeds(seed, samples), scale), np.tile(shape, (count, 1)))


def noise(count, side, low=0, high=256):
    draw = torch.Generator().manual_seed(side)
    return torch.randint(low, high, (count, 3, side, side), generator=draw, dtype=torch.uint8)


def by_pil(images, boxes, size):
    """Cropped, then resized, one by one."""
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    pairs = zip(pictures, boxes.tolist(), strict=True)
    crops = [tv.resized_crop(picture, *box, [size, size], InterpolationMode.BICUBIC) for picture, box in pairs]
    return torch.stack([tv.pil_to_tensor(crop) for crop in crops])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [SCALE, (1e-6, 1e-5), (1.0, 1.0)])
def test_every_box_lies_in_its_image(shape, scale):
    top, left, height, width = boxes_of(2000, shape, scale).T
    assert min(height.min(), width.min()) >= 1 and min(top.min(), left.min()) >= 0
    assert (top + height).max() <= shape[0] and (left + width).max() <= shape[1]


@pytest.mark.parametrize("shape", [(100, 100), (60, 200), (375, 500)])
def test_boxes_are_spread_as_torchvisions(shape):
    ours = boxes_of(4000, shape).astype(float)
    picture = Image.new("RGB", shape[::-1])
    torch.manual_seed(0)
    theirs = np.array([RandomResizedCrop.get_params(picture, SCALE, (3 / 4, 4 / 3)) for _ in range(4000)], float)
    facts = {
        "area": lambda box: box[:, 2] * box[:, 3],
        "aspect": lambda box: np.log(box[:, 3] / box[:, 2]),
        "top": lambda box: box[:, 0] / shape[0],
        "left": lambda box: box[:, 1] / shape[1],
    }
    for name, fact in facts.items():
        assert ks_2samp(fact(ours), fact(theirs)).pvalue > 1e-3, name


def test_an_image_too_long_for_any_box_is_cut_in_its_middle():
    assert boxes_of(3, (30, 1000)).tolist() == [[0, 480, 30, 40]] * 3
    assert boxes_of(3, (1000, 30)).tolist() == [[480, 0, 40, 30]] * 3


def test_a_box_depends_on_its_own_seed_only():
    whole = boxes_of(64, (375, 500))
    assert len({tuple(box) for box in whole.tolist()}) > 60
    samples = torch.tensor([[0, i] for i in range(64)])
    sizes = np.tile((375, 500), (64, 1))
    for at in (0, 13, 63):
        draws = box_draws(sample_seeds(0, samples[at : at + 1]), SCALE)
        assert crop_boxes(draws, sizes[:1]).tolist() == whole[at : at + 1].tolist()


@pytest.mark.parametrize(("side", "size"), [(128, 112), (128, 32), (64, 112), (33, 48), (16, 16), (256, 224)])
def test_pixels_are_those_of_pil_up_to_rounding(side, size):
    """The levels stay away from 0 and 255: where those in between are cut off, PIL's own versions differ."""
    images, sizes = noise(24, side, 64, 192), np.tile((side, side), (24, 1))
    for scale in (SCALE, (0.01, 0.1)):
        boxes = boxes_of(24, (side, side), scale)
        off = (cropped(images, sizes, boxes, size).int() - by_pil(images, boxes, size).int()).abs()
        assert off.float().mean() < 0.05
        assert (off > 1).float().mean() < 1e-5 and off.max() <= 2


@pytest.mark.parametrize("shape", [(96, 160), (200, 90), (64, 64)])
def test_a_squashed_image_is_framed_as_the_image_itself(shape):
    """A smooth picture, so that nothing is lost by squashing: an error of half a pixel would show."""
    down, across = np.mgrid[0 : shape[0], 0 : shape[1]]
    waves = [np.sin(down / 9), np.cos(across / 11), np.sin((down + across) / 13)]
    picture = Image.fromarray((128 + 90 * np.stack(waves, 2)).round().astype(np.uint8))
    square = picture.resize((128, 128), Image.Resampling.BICUBIC)
    images = torch.from_numpy(np.array(square)).permute(2, 0, 1).expand(16, -1, -1, -1)
    boxes = boxes_of(16, shape)
    ours = cropped(images, np.tile(shape, (16, 1)), boxes, 64).int()
    theirs = torch.stack(
        [
            tv.pil_to_tensor(tv.resized_crop(picture, *box, [64, 64], InterpolationMode.BICUBIC)).int()
            for box in boxes.tolist()
        ]
    )
    assert (ours - theirs).abs().float().mean() < 0.7
    assert (ours - theirs)[..., 4:-4, 4:-4].abs().max() <= 3


def test_boxes_of_a_line_of_pixels_are_cropped_and_weights_never_leave_exact_numbers():
    """Products stay whole numbers below 2**24 of the smallest weight."""
    for side, size in ((256, 224), (128, 16), (32, 96)):
        for length in (0.02, 0.5, 1.0, 1.3, 2.7, side / 3, side):
            start = torch.linspace(0, side - length, 41, dtype=torch.float64)
            lines = torch.arange(size).expand(len(start), -1)
            weights = _weights(start, torch.full_like(start, length), side, size, lines)
            assert (weights.sum(2) == 1).all()
            assert weights.abs().sum(2).max() * 128 * 2**16 < 2**24
            assert torch.equal((weights * 2**16).round(), weights * 2**16)
    images = torch.full((3, 3, 64, 64), 200, dtype=torch.uint8)
    shape = np.tile((1, 4000), (3, 1))
    assert (cropped(images, shape, crop_boxes(box_draws(torch.arange(3), SCALE), shape), 32) == 200).all()


def test_pixels_do_not_depend_on_the_batch_nor_on_tensor_cores(monkeypatch):
    images, boxes, sizes = noise(40, 96), boxes_of(40, (96, 96)), np.full((40, 2), 96)
    whole = cropped(images, sizes, boxes, 80)
    for parts in (1, 7, 40):
        split = [cropped(images[i::parts], sizes[i::parts], boxes[i::parts], 80) for i in range(parts)]
        assert all(torch.equal(split[i], whole[i::parts]) for i in range(parts))
    monkeypatch.setattr("common.data.crops._AT_ONCE", 1)
    assert torch.equal(cropped(images, sizes, boxes, 80), whole)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(cropped(images, sizes, boxes, 80), whole)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pixels_are_the_same_on_a_gpu():
    images, boxes, sizes = noise(40, 96), boxes_of(40, (150, 90)), np.tile((150, 90), (40, 1))
    seeds = torch.arange(40)
    host, device = (cropped(images.to(where), sizes, boxes, 80) for where in ("cpu", "cuda"))
    assert torch.equal(host, device.cpu())
    assert torch.equal(ALL(host, seeds), ALL(device, seeds).cpu())
    windows, flips = view_windows((8, 8), seeds, 0.25), seeds % 3 == 0
    host, device = (
        cropped_windows(images.to(where), sizes, boxes, 64, flips, windows, (8, 8)).cpu() for where in ("cpu", "cuda")
    )
    assert torch.equal(host, device)


def test_without_a_setting_nothing_is_touched():
    images = noise(4, 16)
    assert Colours()(images, torch.arange(4)) is images


def test_colours_change_as_torchvision_changes_them():
    images, seeds, jitter = noise(32, 48), torch.arange(32), 0.4
    ours = Colours(jitter)(images, seeds)
    factors = 1 + jitter * (2 * uniform(seeds, 4, stream=4)[:, 1:] - 1)
    assert factors.min() < 0.65 and factors.max() > 1.35
    for image, own, (brightness, contrast, saturation) in zip(images, ours, factors.tolist(), strict=True):
        other = tv.adjust_contrast(tv.adjust_brightness(image / 255, brightness), contrast)
        off = (own - 255 * tv.adjust_saturation(other, saturation)).abs()
        assert off.max() < 3 and off.mean() < 0.5  # levels are rounded behind each of three changes
    for part in (slice(0, 1), slice(5, 12)):
        assert torch.equal(Colours(jitter)(images[part], seeds[part]), ours[part])


def test_colours_turn_in_the_plane_of_equal_brightness():
    images, seeds = noise(32, 24), torch.arange(32)
    ours = Colours(hue=0.2)(images, seeds)
    turns = 0.2 * (2 * uniform(seeds, 5, stream=4)[:, 4] - 1)
    for image, own, turn in zip(images, ours, turns.tolist(), strict=True):
        r, g, b = image.double()
        y = 0.299 * r + 0.587 * g + 0.114 * b
        i, q = 0.596 * r - 0.274 * g - 0.322 * b, 0.211 * r - 0.523 * g + 0.312 * b
        angle = 2 * math.pi * turn
        i, q = math.cos(angle) * i - math.sin(angle) * q, math.sin(angle) * i + math.cos(angle) * q
        rgb = torch.linalg.solve(torch.tensor(_YIQ).double(), torch.stack([y, i, q]).flatten(1)).view(3, *y.shape)
        assert (own - rgb.clamp(0, 255)).abs().max() < 0.8  # rounded, and the matrix is
    assert (ours.float() - images.float()).abs().mean() > 10


def test_gray_has_one_colour_and_solarized_turns_what_is_bright():
    images, seeds = noise(1, 16).expand(2000, -1, -1, -1), torch.arange(2000)
    grays = Colours(gray=0.2)(images, seeds)
    lost = (grays == grays[:, :1]).all(1).all((1, 2))
    assert abs(lost.float().mean() - 0.2) < 4 * math.sqrt(0.2 * 0.8 / 2000)
    assert torch.equal(grays[~lost], images[~lost])
    solarized = Colours(solarize=0.1)(images, seeds)
    turned = (solarized != images).any(1).any(1).any(1)
    assert abs(turned.float().mean() - 0.1) < 4 * math.sqrt(0.1 * 0.9 / 2000)
    assert torch.equal(solarized[turned][0], torch.where(images[0] >= 128, 255 - images[0], images[0]))


@pytest.mark.parametrize("colours", [Colours(hue=0.3), Colours(gray=0.5), Colours(solarize=0.5), ALL])
def test_colours_of_a_sample_do_not_depend_on_the_batch(colours):
    images, seeds = noise(24, 32), torch.arange(24)
    whole = colours(images, seeds)
    for part in (slice(0, 1), slice(5, 12)):
        assert torch.equal(colours(images[part], seeds[part]), whole[part])


def test_flips_mirror_what_the_box_shows():
    images, boxes, sizes = noise(30, 96), boxes_of(30, (150, 90)), np.tile((150, 90), (30, 1))
    flips = torch.arange(30) % 3 == 0
    plain = cropped(images, sizes, boxes, 80)
    expected = torch.where(flips[:, None, None, None], plain.flip(3), plain)
    assert torch.equal(cropped(images, sizes, boxes, 80, flips), expected)


@pytest.mark.parametrize(("grid", "size"), [((8, 8), 64), ((7, 7), 112), ((5, 5), 40)])
def test_windows_alone_are_those_of_whole_crops_to_the_last_bit(grid, size, monkeypatch):
    monkeypatch.setattr(crops, "_AT_ONCE", 5 * 12 * 96**2)  # five images at a time, or fewer
    images, views = noise(7, 96), 3
    boxes, sizes = boxes_of(7 * views, (150, 90)), np.tile((150, 90), (7 * views, 1))
    seeds = torch.arange(7 * views)
    windows, flips = view_windows(grid, seeds, 0.25), seeds % 2 == 0
    whole = cropped(images.repeat_interleave(views, 0), sizes, boxes, size, flips)
    ours = cropped_windows(images, sizes, boxes, size, flips, windows, grid)
    assert ours.dtype == torch.uint8 and torch.equal(ours, cut(whole, windows, grid))
