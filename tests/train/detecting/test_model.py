"""The detector: a batch's loss is the sum of its images', and every kind trains and detects."""

import pytest
import torch
from common.dense.backbone import DenseBackbone, at_depth
from common.dense.pyramid import EVERYWHERE, TAPS
from common.detecting.model import Detector
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from ..dense.test_backbone import vit


def detector(kind="dseq", with_masks=True, **args):
    depth = args.get("depth", 4)
    taps, everywhere = ([at_depth(share, depth) for share in shares[kind]] for shares in (TAPS, EVERYWHERE))
    dense = DenseBackbone(vit(depth=depth, **args), taps, 2, everywhere)
    torch.manual_seed(1)
    return Detector(dense, kind, 3, 64, (0.5,) * 3, (0.5,) * 3, with_masks, channels=16, samples=32)


def batch(count=3):
    torch.manual_seed(2)
    images, targets = torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8), []
    for number in range(count):  # the last image has no objects
        boxes = torch.tensor([[4.0, 6, 30, 40], [20, 22, 60, 50]])[: 2 if number + 1 < count else 0]
        masks = torch.zeros(len(boxes), 64, 64, dtype=torch.bool)
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
            mask[top:bottom, left:right] = True
        targets.append({"boxes": boxes, "labels": torch.tensor([1, 3])[: len(boxes)], "masks": masks})
    return images, targets, torch.arange(count) * 31 + 5


PARTS = {"objectness", "rpn_box_reg", "classifier", "box_reg", "mask"}


@pytest.mark.parametrize("kind", TAPS)
def test_a_batchs_loss_and_gradient_are_the_sums_of_its_images(kind):
    model = detector(kind).train()
    images, targets, seeds = batch()
    together = model(images, targets, seeds)
    assert together.keys() == PARTS
    sum(together.values()).backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)
    model.zero_grad()
    sums = dict.fromkeys(PARTS, 0.0)
    for i in (2, 0, 1):
        for name, loss in (parts := model(images[i : i + 1], targets[i : i + 1], seeds[i : i + 1])).items():
            sums[name] += loss.item()
        sum(parts.values()).backward()
    assert {name: loss.item() for name, loss in together.items()} == pytest.approx(sums, rel=1e-4)
    for name, gradient in gradients.items():
        other = model.get_parameter(name).grad
        torch.testing.assert_close(other, gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item() + 1e-7, msg=name)


def test_what_is_sampled_depends_on_the_seed_alone():
    model = detector().train()
    images, targets, seeds = batch()
    losses = {}
    for name, own, noise in (("one", seeds, 1), ("same", seeds, 2), ("other", seeds + 1, 1)):
        torch.manual_seed(noise)
        losses[name] = sum(model(images, targets, own).values()).item()
    assert losses["one"] == losses["same"] != losses["other"]


def test_boxes_alone_need_no_masks():
    model = detector(with_masks=False).train()
    images, targets, seeds = batch()
    targets = [{name: value for name, value in target.items() if name != "masks"} for target in targets]
    assert model(images, targets, seeds).keys() == PARTS - {"mask"}
    assert model.name == "Faster R-CNN" and detector().name == "Mask R-CNN"


@pytest.mark.parametrize("args", [{}, {"class_token": False, "global_pool": "avg", "patch_size": 14}])
def test_images_of_any_size_are_searched_and_what_is_found_lies_in_them(args):
    model = detector(**args).eval()
    model.rcnn.roi_heads.score_thresh = 0.0
    sizes = [(50, 90), (200, 30), (3, 500), (700, 1), (1, 1)]  # some get thinner than a pixel
    found = model([torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes])
    for one, (height, width) in zip(found, sizes, strict=True):
        assert len(one["boxes"]) and one["masks"].shape[1:] == (1, height, width)
        assert (one["boxes"] >= 0).all() and (one["boxes"] <= torch.tensor([width, height] * 2)).all()
        assert set(one["labels"].tolist()) <= {1, 2, 3}


def test_images_are_resized_as_torchvision_does():
    transform = GeneralizedRCNNTransform(64, 64, [0.5] * 3, [0.5] * 3, size_divisible=32)
    for size in ((50, 90), (200, 30), (64, 64), (2, 100), (40, 1279), (1, 64), (3, 192)):
        image = torch.rand(3, *size)
        ours, theirs = detector().rcnn.transform([image])[0], transform([image])[0]
        assert ours.image_sizes == theirs.image_sizes
        torch.testing.assert_close(ours.tensors, theirs.tensors, rtol=0, atol=0)


def test_bf16_gives_finite_losses():
    model = detector().train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(*batch())
    assert all(torch.isfinite(loss) and loss.dtype == torch.float32 for loss in losses.values())
