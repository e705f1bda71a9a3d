"""Jittered images: pixels, boxes and masks stay together, and a sample is a function of its key alone."""

import numpy as np
import pytest
import torch
from common.data.source import Source
from common.detecting import masks
from common.detecting.annotated import Annotated, Objects
from common.detecting.jitter import JitteredImages, collate
from PIL import Image

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


def painted(height=90, width=140):
    """One image with three rectangles of pure colours on black, whose masks and boxes are known."""
    picture, boxes, codes = np.zeros((height, width, 3), np.uint8), [], []
    for left, top, right, bottom, colour in ((10, 8, 60, 50, 0), (80, 20, 130, 40, 1), (30, 60, 90, 85, 2)):
        picture[top:bottom, left:right] = COLOURS[colour]
        bits = np.zeros((height, width), np.uint8)
        bits[top:bottom, left:right] = 1
        boxes.append([left, top, right, bottom])
        codes.append(masks.code(bits))
    objects = Objects(np.array(boxes, float), np.arange(3), np.zeros(3, bool), np.ones(3), codes)
    source = Source("x", [{"image": Image.fromarray(picture)}], "image", None, 0)
    return Annotated(source, [objects], ("r", "g", "b"), (1, 2, 3), "train", [(height, width)], [7])


def jittered(scale=(0.3, 2.0), flip=0.5, with_masks=True, seed=0):
    return JitteredImages(painted(), seed, 96, scale, flip, with_masks)


def test_boxes_and_masks_lie_where_their_colours_are():
    seen, images = 0, jittered()
    for epoch in range(60):
        pixels, target = images[epoch, 0]
        assert pixels.shape == (3, 96, 96) and pixels.dtype == torch.uint8
        assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"])
        for box, label, mask in zip(target["boxes"], target["labels"], target["masks"], strict=True):
            own = (pixels.float() - torch.tensor(COLOURS[label - 1]).view(3, 1, 1)).abs().sum(0) < 128
            assert (mask ^ own).sum() <= 0.06 * max(own.sum(), 1) + 30  # edges are blurred
            left, top, right, bottom = box.tolist()
            ys, xs = torch.nonzero(own, as_tuple=True)
            if len(xs):
                around = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
                assert np.abs(np.array([left, top, right, bottom]) - [float(x) for x in around]).max() <= 2.5
            assert 0 <= left < right <= 96 and 0 <= top < bottom <= 96
            seen += 1
    assert seen > 60


def test_scales_flips_and_cuts_vary_and_small_images_are_padded_with_zeros():
    images = jittered(scale=(0.5, 0.5), flip=0.5)
    first = [images[epoch, 0][1]["boxes"][0, 0] for epoch in range(20)]  # of the red one
    sides = {bool(left < 20) for left in first}
    assert sides == {True, False}  # the red one lies on the left, or flipped on the right
    pixels, _ = images[0, 0]
    assert (pixels[:, 31:] == 0).all() and (pixels[:, :, 48:] == 0).all() and pixels.any()  # 90 × 140 → 31 × 48
    large = jittered(scale=(2.0, 2.0), flip=0)
    assert len({tuple(large[epoch, 0][1]["boxes"].flatten().tolist()) for epoch in range(10)}) > 5


def test_a_sample_is_a_function_of_seed_epoch_and_index():
    def same(one, other):
        return torch.equal(one[0], other[0]) and all(torch.equal(one[1][name], other[1][name]) for name in one[1])

    assert same(jittered()[4, 0], jittered()[4, 0])
    assert not same(jittered()[4, 0], jittered()[5, 0])
    assert not same(jittered()[4, 0], jittered(seed=1)[4, 0])


def test_a_batch_and_boxes_only():
    samples = [jittered(with_masks=False)[epoch, 0] for epoch in range(3)]
    images, targets = collate(samples)
    assert images.shape == (3, 3, 96, 96) and len(targets) == 3
    assert all(target.keys() == {"boxes", "labels"} for target in targets)


@pytest.mark.parametrize("scale", [0.02, 0.1])
def test_objects_that_become_too_small_are_left_out(scale):
    _, target = jittered(scale=(scale, scale))[0, 0]
    assert all((box[2:] - box[:2] >= 1).all() for box in target["boxes"])
    assert len(target["boxes"]) == len(target["masks"]) < 4
