"""The convention of boxes is found where the data shows it, and asked for where it does not."""

import numpy as np
import pytest
from common.boxes import CONVENTIONS, Evidence, corners, settle

from timm_dseq import UserError


def stored(corner, sizes, convention):
    """Boxes as left, top, right, bottom (n, 4) → as a data set of this convention would store them, one by one."""
    order, _, shares = convention.partition("-")
    rows = []
    for (left, top, right, bottom), (height, width) in zip(corner.tolist(), sizes.tolist(), strict=True):
        row = {
            "xywh": [left, top, right - left, bottom - top],
            "xyxy": [left, top, right, bottom],
            "cxcywh": [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top],
        }[order]
        rows.append([row[0] / width, row[1] / height, row[2] / width, row[3] / height] if shares else row)
    return np.array(rows)


def scenes(count=200, seed=0):
    draw = np.random.default_rng(seed)
    sizes = draw.integers(100, 640, (count, 2)).astype(float)
    first, second = np.sort(draw.random((2, count, 2)), axis=0)
    return np.concatenate([first, second], 1) * sizes[:, [1, 0, 1, 0]], sizes


def evidence(boxes, sizes, areas=None, around=None):
    unknown = np.full((len(boxes), 5), np.nan)
    areas = unknown[:, 0] if areas is None else areas
    return Evidence(boxes, sizes, areas, unknown[:, 1:] if around is None else around)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_many_boxes_and_the_sizes_of_their_images_show_the_convention(convention):
    for seed in range(5):
        corner, sizes = scenes(seed=seed)
        boxes = stored(corner, sizes, convention)
        assert settle(evidence(boxes, sizes), "here", None) == convention
        np.testing.assert_allclose(corners(boxes, convention, sizes), corner)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_a_few_odd_boxes_change_nothing(convention):
    corner, sizes = scenes(400)
    boxes = stored(corner, sizes, convention)
    boxes[:3, 2:] = 0  # degenerate
    boxes[3] *= 30  # far outside
    assert settle(evidence(boxes, sizes), "here", None) == convention


SMALL = np.array([[10.0, 12, 30, 40], [20, 25, 50, 60]])  # in images of 200 × 200: xywh, xyxy and cxcywh alike
SIZES = np.full((2, 2), 200.0)


def test_boxes_that_fit_several_conventions_are_asked_for_in_one_line():
    with pytest.raises(UserError, match=r"fit xywh and xyxy.*--data.box_format xywh\|xyxy") as error:
        settle(evidence(SMALL, SIZES), "here", None)
    assert "\n" not in str(error.value)
    assert settle(evidence(SMALL, SIZES), "here", "xyxy") == "xyxy"


def test_areas_and_masks_tell_what_sizes_do_not():
    areas = np.array([20 * 28, 30 * 35.0])  # of right − left, bottom − top
    assert settle(evidence(SMALL, SIZES, areas), "here", None) == "xyxy"
    around = np.array([[10.0, 12, 40, 52], [20, 25, 70, 85]])  # as of x, y, width, height
    assert settle(evidence(SMALL, SIZES, around=around), "here", None) == "xywh"


def test_a_convention_that_cannot_be_is_refused_even_if_it_is_usual_or_asked_for():
    corner, sizes = scenes()
    boxes = stored(corner, sizes, "xyxy")
    for asked, usual in ((None, "xywh"), ("xywh", None)):
        with pytest.raises(UserError, match=r"% of the boxes cannot be xywh.*they fit xyxy"):
            settle(evidence(boxes, sizes), "here", asked, usual)


def test_boxes_of_no_convention_are_refused():
    boxes = np.random.default_rng(0).uniform(-500, 5000, (50, 4))
    with pytest.raises(UserError, match="fit no convention"):
        settle(evidence(boxes, np.full((50, 2), 100.0)), "here", None)


def test_areas_of_masks_which_are_smaller_than_boxes_rule_out_what_is_too_small_for_them():
    boxes, areas = np.array([[10.0, 12, 100, 100], [5, 8, 90, 120]]), np.array([8500.0, 9900])
    with pytest.raises(UserError, match="fit xywh and xyxy"):
        settle(evidence(boxes, SIZES), "here", None)
    assert settle(evidence(boxes, SIZES, areas), "here", None) == "xywh"
