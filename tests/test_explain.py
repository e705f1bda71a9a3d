"""Pictures show what the regions and the plan say."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from timm_dseq import UserError
from timm_dseq.engine.plans import plan_regions
from timm_dseq.engine.regions import rank_regions
from timm_dseq.engine.saliency import saliency_map
from timm_dseq.explain import COLOURS, draw_regions, draw_saliency, draw_sequence, explain, to_tensor

from .tiny import encoder


def photo(width=120, height=80):
    x = torch.arange(width)[None, :, None] * torch.tensor([1, 2, 0]) + torch.arange(height)[:, None, None]
    return Image.fromarray((x % 256).to(torch.uint8).numpy())


def two_regions():
    saliency = torch.zeros(1, 6, 6)
    saliency[0, :2, :2], saliency[0, 4:, 3:] = 1.0, 0.8
    return rank_regions(saliency)


def tint_of(colour):
    """Which region's colour lies over a grey of 128."""
    tints = [[0.58 * 128 + 0.42 * c for c in other] for other in COLOURS]
    return min(range(len(tints)), key=lambda i: sum((a - b) ** 2 for a, b in zip(colour, tints[i], strict=True)))


@pytest.mark.parametrize("size", [(48, 48), (40, 72)])
def test_a_sheet_has_a_picture_for_each_part_and_step(size):
    torch.manual_seed(0)
    model = encoder(size)
    sheet = explain(model, photo(), min_area=0.01, cell=96)
    steps = len(plan_regions(rank_regions_of(model)).targets)
    picture = round(96 * size[0] / size[1])
    assert sheet.width == 18 + max(4, steps) * (96 + 18)
    assert sheet.height == 18 + 2 * (picture + 34 + 9) + 22
    assert len(sheet.getcolors(sheet.width * sheet.height)) > 500


def rank_regions_of(model):
    return rank_regions(saliency_map(model, to_tensor(model, photo())), min_area=0.01)


def test_regions_wear_their_colours_and_the_remainder_none():
    picture = draw_regions(Image.new("RGB", (96, 96), (128, 128, 128)), two_regions())
    assert tint_of(picture.getpixel((2, 2))) == 0 and tint_of(picture.getpixel((50, 94))) == 1
    red, green, blue = picture.getpixel((88, 8))
    assert max(red, green, blue) - min(red, green, blue) < 20


def test_a_step_shows_the_visible_patches_as_they_are_and_hides_the_rest():
    image = Image.new("RGB", (96, 96), (10, 200, 30))
    (first, _), (second, caption) = draw_sequence(image, plan_regions(two_regions()))
    assert first.getpixel((20, 20)) == (10, 200, 30) and second.getpixel((20, 20)) == (10, 200, 30)
    assert first.getpixel((80, 20)) == (232, 233, 237)  # neither seen nor asked for
    assert first.getpixel((60, 92)) != (10, 200, 30) and second.getpixel((56, 72)) == (10, 200, 30)
    assert "remainder" in caption


def test_the_salient_part_is_the_bright_one():
    saliency = torch.zeros(6, 6)
    saliency[:3] = 1
    picture = draw_saliency(Image.new("RGB", (60, 60), (128, 128, 128)), saliency).convert("L")
    assert picture.getpixel((30, 5)) > picture.getpixel((30, 55)) + 60


def test_what_is_no_plain_vit_is_one_line():
    with pytest.raises(UserError, match="ResNet is no plain ViT") as error:
        explain(timm.create_model("test_resnet"), photo())
    assert "\n" not in str(error.value)


def test_the_badge_of_a_region_at_the_edge_is_whole():
    def white(row, column):
        """How many pixels are: the badge's rim and its number."""
        saliency = torch.zeros(1, 28, 28)
        saliency[0, row, column] = 1
        regions = rank_regions(saliency, 2, min_area=0.0)
        picture = draw_regions(Image.new("RGB", (168, 168)), regions)
        return int((np.asarray(picture).min(2) > 250).sum())

    inside = white(14, 14)
    assert inside > 60
    for place in ((0, 0), (0, 27), (27, 14), (14, 27), (27, 27)):
        assert abs(white(*place) - inside) < 0.1 * inside, place  # anti-aliasing
