"""Training crops: image and mask stay together, and what is random is a function of (seed, epoch, index)."""

import numpy as np
import pytest
import torch
from common.data.source import Source
from common.segmenting.classes import IGNORED, Classes
from common.segmenting.images import Crops, Whole
from common.segmenting.opening import Masked
from common.segmenting.settings import Augment
from PIL import Image

IDS = (10, 20, 30, 40)
GREYS = np.zeros(256, np.uint8)
GREYS[list(IDS)] = (40, 100, 160, 220)


def masked(height=60, width=90) -> Masked:
    """One image of four quarters, each a class with a grey of its own."""
    ids = np.full((height, width), 10, np.uint8)
    ids[: height // 2, width // 2 :], ids[height // 2 :, : width // 2], ids[height // 2 :, width // 2 :] = 20, 30, 40
    rows = [{"image": Image.fromarray(GREYS[ids]).convert("RGB"), "mask": Image.fromarray(ids)}]
    return Masked(Source("x", rows, "image", None, 0), Source("x", rows, "mask", None, 0), "train")


def crops(augment=None, size=48, seed=0, **shape) -> Crops:
    return Crops(
        masked(**shape), Classes(IDS, tuple("abcd")), augment or Augment(distort=0), size, (0.5, 0.5, 0.5), seed
    )


def test_every_pixel_of_a_crop_keeps_its_class():
    """Apart from pixels at an edge, which are of mixed greys."""
    seen, ignored = set(), 0
    for epoch in range(30):
        image, numbers = crops()[epoch, 0]
        assert image.shape == (3, 48, 48) and image.dtype == torch.uint8 and numbers.shape == (48, 48)
        wanted = torch.tensor([*GREYS[list(IDS)].tolist(), 128])[numbers.long()]  # IGNORED is -1: the mean's grey
        assert (image[0] == wanted).float().mean() > 0.9
        seen |= set(numbers.unique().tolist())
        ignored += (numbers == IGNORED).sum().item()
    assert seen == {IGNORED, 0, 1, 2, 3} and ignored


def test_scales_places_and_flips_are_all_drawn():
    few = Augment(scale=(1, 1), distort=0)
    lefts = [crops(few, size=30, height=30)[epoch, 0][1] for epoch in range(40)]
    assert {tuple(x[0].tolist()) for x in lefts} > {tuple(lefts[0][0].tolist())}
    first = {x[0, 0].item() - x[0, -1].item() for x in lefts}
    assert {-1, 1} <= first  # as it is, and flipped
    (large, _), (small, _) = (crops(Augment(scale=(s, s), flip=0, distort=0), size=200)[0, 0] for s in (2, 0.5))
    assert [(image != 128).any(0).sum().item() for image in (large, small)] == [120 * 180, 30 * 45]


def test_a_sample_is_a_function_of_seed_epoch_and_index_alone():
    whole = Augment()
    image, numbers = crops(whole)[3, 0]
    torch.rand(7)
    again = crops(whole)[3, 0]
    assert torch.equal(image, again[0]) and torch.equal(numbers, again[1])
    for other in (crops(whole)[4, 0], crops(whole, seed=1)[3, 0]):
        assert not torch.equal(image, other[0])


def test_distortion_changes_colours_and_no_place():
    same = Augment(scale=(1, 1), flip=0, distort=1)
    image, numbers = crops(same, size=100)[0, 0]
    plain, known = crops(Augment(scale=(1, 1), flip=0, distort=0), size=100)[0, 0]
    assert torch.equal(numbers, known) and not torch.equal(image, plain)


@pytest.mark.parametrize("factor", [0.37, 1.0, 1.613, 2.0])
def test_no_factor_leads_out_of_the_image(factor):
    for epoch in range(20):
        one = crops(Augment(scale=(factor, factor)), size=31, height=1 + epoch, width=97)
        assert one[epoch, 0][0].shape == (3, 31, 31)


def test_a_test_image_is_whole_with_its_classes():
    index, (image, numbers) = Whole(masked(), Classes(IDS[:3], tuple("abc")))[0]
    assert index == 0 and image.shape == (3, 60, 90)
    assert numbers[0, 0] == 0 and numbers[-1, 0] == 2 and numbers[-1, -1] == IGNORED
