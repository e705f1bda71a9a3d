"""Logits of every pixel: windows equal a slow reference, and the loss is a sum over images."""

import pytest
import torch
from common.segmenting.classes import IGNORED
from common.segmenting.export import build
from common.segmenting.heads import HEADS
from common.segmenting.segmenter import losses, sliding, starts
from torch.nn import functional as F

from ..dense.test_backbone import vit

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def segmenter(head: str = "linear"):
    torch.manual_seed(0)
    return build(vit(depth=4), head, 16, 5, MEAN, STD).eval()


def image(*size: int) -> torch.Tensor:
    return torch.randint(0, 256, (3, *size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("size", [(64, 96), (50, 70), (17, 16)])
def test_every_pixel_gets_logits_at_any_size(head, size):
    model = segmenter(head)
    with torch.inference_mode():
        (logits,) = model(torch.stack([image(*size)] * 2))
    assert logits.shape == (2, 5, *size)


def test_a_map_is_enlarged_to_the_patches_it_stands_for_where_an_image_ends_within_one():
    """Without that, the maps of padded images would be squeezed into the image."""
    model = segmenter()
    padded = F.pad(image(50, 70).float(), (0, 10, 0, 14))
    with torch.inference_mode():
        maps = model.backbone(F.pad((image(50, 70)[None] - model.mean) / model.std, (0, 10, 0, 14)))
        wanted = F.interpolate(model.head(maps)[0], padded.shape[1:], mode="bilinear")[..., :50, :70]
        torch.testing.assert_close(model(image(50, 70)[None])[0], wanted)


@torch.inference_mode()
def slow(model, picture, window, stride):
    """Pixel by pixel, the mean over the windows that hold it."""
    (height, width), (h, w) = picture.shape[1:], (min(window, side) for side in picture.shape[1:])
    found = {}
    for i in range(1 + max(0, -(-(height - h) // stride))):
        for j in range(1 + max(0, -(-(width - w) // stride))):
            top, left = min(i * stride, height - h), min(j * stride, width - w)
            logits = model(picture[None, :, top : top + h, left : left + w])[0][0]
            for y in range(h):
                for x in range(w):
                    found.setdefault((top + y, left + x), []).append(logits[:, y, x])
    assert len(found) == height * width
    rows = [[torch.stack(found[y, x]).mean(0) for x in range(width)] for y in range(height)]
    return torch.stack([torch.stack(row) for row in rows]).permute(2, 0, 1)


@pytest.mark.parametrize("size", [(64, 40), (33, 90), (32, 32), (20, 70), (53, 54)])
def test_windows_equal_a_slow_reference(size):
    model = segmenter()
    with torch.inference_mode():
        ours = sliding(lambda images: model(images)[0], image(*size), 32, 21)
    torch.testing.assert_close(ours, slow(model, image(*size), 32, 21), rtol=1e-4, atol=1e-5)


def test_a_window_that_covers_the_image_is_the_whole_image():
    model = segmenter()
    with torch.inference_mode():
        ours = sliding(lambda images: model(images)[0], image(40, 60), 64, 42)
        torch.testing.assert_close(ours, model(image(40, 60)[None])[0][0])


def test_windows_begin_at_every_stride_and_the_last_one_ends_with_the_image():
    assert starts(853, 512, 341) == [0, 341]
    assert starts(854, 512, 341) == [0, 341, 342]
    assert starts(512, 512, 341) == [0]


def test_the_loss_is_a_sum_over_images_of_the_mean_over_their_pixels_without_the_ignored():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 4, 6, generator=generator)
    numbers = torch.randint(-1, 5, (3, 4, 6), generator=generator).short()
    numbers[2] = IGNORED
    (ours,) = losses([logits], numbers)
    wanted = 0.0
    for scores, truth in zip(logits, numbers, strict=True):
        for y in range(4):
            for x in range(6):
                if truth[y, x] != IGNORED:
                    wanted -= scores[:, y, x].log_softmax(0)[truth[y, x].long()] / 24
    torch.testing.assert_close(ours, wanted)
    apart = sum(losses([logits[i : i + 1]], numbers[i : i + 1])[0] for i in range(3))
    torch.testing.assert_close(ours, apart)


def test_a_frozen_backbone_stays_in_evaluation_and_gets_no_gradient():
    model = segmenter().train()
    assert model.head.training and not model.backbone.training
    model(torch.stack([image(32, 32)] * 2))[0].sum().backward()
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    assert all(parameter.grad is not None for parameter in model.head.parameters())


def test_in_training_the_auxiliary_head_joins_and_every_weight_of_upernet_learns():
    model = segmenter("upernet").train()
    logits = model(torch.stack([image(64, 64), image(64, 64).flip(1)]))
    assert [tuple(each.shape) for each in logits] == [(2, 5, 64, 64)] * 2
    sum(each.square().sum() for each in logits).backward()
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert not [name for name, weight in trained.items() if weight.grad is None or not weight.grad.any()]
    assert any(name.startswith("backbone.vit.blocks.0") for name in trained)
