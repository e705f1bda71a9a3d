"""Files of boxes, what is wrong with them, and CorLoc against a loop."""

import json

import numpy as np
import pytest
import torch
from common.discovering.boxes import coco_rows, voc_rows
from common.discovering.judging import Judging
from common.discovering.predictions import REGIONS, elsewhere, in_pixels, largest_box
from common.discovering.truth import Truth
from PIL import Image
from scipy import ndimage

from timm_dseq import UserError
from timm_dseq.engine.regions import rank_regions


def slow_largest(mask):
    """By SciPy's components, one at a time."""
    label, count = ndimage.label(mask, np.ones((3, 3)))
    best = (0, 0, 0, 0)
    for number in range(1, count + 1):
        rows, columns = np.nonzero(label == number)
        box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        if (box[2] - box[0]) * (box[3] - box[1]) > (best[2] - best[0]) * (best[3] - best[1]):
            best = box
    return best


def area(box):
    return (box[2] - box[0]) * (box[3] - box[1])


def test_the_largest_box_is_that_of_a_part_by_itself():
    masks = torch.rand(60, 7, 9, generator=torch.Generator().manual_seed(0)) < torch.linspace(0, 0.5, 60)[:, None, None]
    for mask, box in zip(masks, largest_box(masks).tolist(), strict=True):
        expected = slow_largest(mask.numpy())
        assert area(box) == area(expected)
        if area(expected):
            assert mask[box[1] : box[3], box[0] : box[2]].any()


def slow_iou(a, b):
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(w, 0) * max(h, 0)
    return both / (area(a) + area(b) - both)


def test_corloc_is_a_loop_over_images_and_their_boxes():
    draw = torch.Generator().manual_seed(1)
    maps = torch.rand(40, 5, 6, generator=draw)
    maps[:, 1:4, 1:4] += 0.6
    truths = []
    for _ in range(40):
        corner, extent = 10 + torch.rand(1, 2, generator=draw) * 30, 30 + torch.rand(1, 2, generator=draw) * 50
        truths.append(Truth((120, 90), boxes=torch.cat([corner, corner + extent], 1).numpy()))
    judging = Judging(["mine"], 40, 5, 0.02, 4)
    judging.add(range(40), {"mine": maps}, torch.rand(40, 3, 20, 24), truths, torch.arange(40))
    regions = rank_regions(maps, 5, 0.02).masks[:, :4].any(1)
    found = 0
    for mask, truth in zip(regions, truths, strict=True):
        box = [x * 120 / 6 if i % 2 == 0 else x * 90 / 5 for i, x in enumerate(slow_largest(mask.numpy()))]
        found += any(slow_iou(box, real) > 0.5 for real in truth.boxes.tolist())
    assert 0 < found < 40
    assert judging.records()[0]["predictions"][REGIONS]["corloc"] == pytest.approx(100 * found / 40)


def test_random_boxes_keep_their_size_and_lie_inside():
    own = in_pixels(torch.tensor([[1, 1, 3, 2], [0, 0, 8, 8]]), (8, 8), (160, 80))
    assert own.tolist() == [[20, 10, 60, 20], [0, 0, 160, 80]]
    others = elsewhere(own, torch.tensor([3, 4]), 50, (160, 80))
    torch.testing.assert_close(others[..., 2:] - others[..., :2], (own[:, 2:] - own[:, :2])[:, None].expand(-1, 50, -1))
    assert others[..., :2].min() >= 0 and (others[..., 2:] <= torch.tensor([160.0, 80])).all()
    assert len(others[0].unique(dim=0)) == 50


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (40, 30), "red").save(tmp_path / "photos" / f"{name}.jpg")
    return tmp_path / "photos"


def coco(folder, **changes):
    images = [{"id": i, "file_name": f"{name}.jpg", "width": 40, "height": 30} for i, name in enumerate("ab")]
    boxes = [
        {"image_id": 0, "bbox": [1, 2, 30, 20], "iscrowd": 0},
        {"image_id": 0, "bbox": [0, 0, 9, 9], "iscrowd": 1},
        {"image_id": 1, "bbox": [5, 5, 20, 20]},
    ]
    file = folder / "instances.json"
    file.write_text(json.dumps({"images": images, "annotations": boxes, **changes}))
    return file


def test_coco_crowds_are_left_out(photos):
    rows = coco_rows(photos, coco(photos))
    assert [row["boxes"] for row in rows] == [[[1, 2, 30, 20]], [[5, 5, 20, 20]]]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"annotations": [{"image_id": 9, "bbox": [0, 0, 1, 1]}]}, "KeyError: 9"),
        ({"images": 3}, "TypeError"),
        (
            {"images": [{"id": 0, "file_name": "z.jpg", "width": 4, "height": 3}], "annotations": []},
            "z.jpg does not exist",
        ),
    ],
)
def test_json_of_another_data_set_or_kind_is_refused(photos, changes, words):
    with pytest.raises(UserError, match=words):
        coco_rows(photos, coco(photos, **changes))


XML = """<annotation><filename>{name}.jpg</filename><size><width>40</width><height>30</height></size>
<object><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>40</xmax><ymax>20</ymax></bndbox></object></annotation>"""


def test_voc_counts_pixels_from_one(photos):
    for name in ("a", "b"):
        (photos / f"{name}.xml").write_text(XML.format(name=name))
    rows = voc_rows(photos, photos)
    assert [row["boxes"] for row in rows] == [[[0, 0, 40, 20]]] * 2
    (photos / "b.xml").write_text("<!DOCTYPE x [<!ENTITY a 'aa'>]>" + XML.format(name="b"))
    with pytest.raises(UserError, match=r"b\.xml holds no boxes as VOC has them"):
        voc_rows(photos, photos)
