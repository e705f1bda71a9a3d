"""Annotations of every kind become the same objects, and what is wrong with them is one line."""

import dataclasses
import json
import math

import datasets
import numpy as np
import pytest
from common.data.scenes import FORMS
from common.detecting import masks
from common.detecting.reading.opening import open_annotated
from common.detecting.settings import Annotations
from PIL import Image

from timm_dseq import UserError
from timm_dseq.images import UnreadableImage, decode

from .annotations import IDS, coco_folder, drawn, parquet_folder


def assert_scenes(annotated, split="train", with_masks=True):
    """What was read is what was drawn."""
    for index, objects in enumerate(annotated.objects):
        picture, shapes = drawn(split, index)
        own = [mask for _, mask in shapes]
        assert [annotated.names[label] for label in objects.labels] == [form for form, _ in shapes]
        for box, mask, at in zip(objects.boxes, own, range(len(own)), strict=True):
            ys, xs = np.nonzero(mask)
            np.testing.assert_allclose(box, [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
            if with_masks:
                np.testing.assert_array_equal(masks.bitmap(objects.masks[at], (128, 128)), mask)
        assert annotated.source.read(index, decode).tobytes() == picture.tobytes()


def test_a_coco_folder_is_read_with_gaps_in_its_ids(tmp_path):
    train, test = open_annotated(Annotations(path=str(coco_folder(tmp_path))))
    assert (len(train), len(test), train.names, train.ids, train.has_masks) == (8, 4, FORMS, IDS, True)
    assert_scenes(train)
    assert_scenes(test, "test")
    assert "8 images of train" in train.said() and "with masks" in train.said()


@pytest.mark.parametrize("layout", ["coco's own", "roboflow's", "named"])
def test_other_layouts_are_found(layout, tmp_path):
    folder = coco_folder(tmp_path / "x")
    settings = {"path": str(folder)}
    if layout == "coco's own":
        (folder / "annotations").mkdir()
        for split in ("train", "val"):
            (folder / f"instances_{split}.json").rename(folder / "annotations" / f"instances_{split}2017.json")
            (folder / split).rename(folder / f"{split}2017")
    elif layout == "roboflow's":
        for split, other in (("train", "train"), ("val", "valid")):
            (folder / split).rename(folder / other)
            (folder / f"instances_{split}.json").rename(folder / other / "_annotations.coco.json")
    else:
        settings = {
            **{"path": str(folder / "instances_train.json"), "images": str(folder / "train")},
            **{"test": str(folder / "instances_val.json"), "test_images": str(folder / "val")},
        }
    train, test = open_annotated(Annotations(**settings))
    assert_scenes(train)
    assert_scenes(test, "test")


def polygons(content):
    """Squares as polygons, and as run lengths that are not compressed."""
    for one in content["annotations"]:
        left, top, width, height = (int(x) for x in one["bbox"])
        right, bottom = left + width, top + height
        one["segmentation"] = [[left, top, right, top, right, bottom, left, bottom]]
        if one["id"] % 2:
            square = np.zeros((128, 128), int)
            square[top:bottom, left:right] = 1
            flat = square.T.flatten()
            edges = np.flatnonzero(np.diff(flat)) + 1
            one["segmentation"] = {"size": [128, 128], "counts": np.diff([0, *edges, flat.size]).tolist()}


def test_polygons_and_plain_run_lengths_are_masks_too(tmp_path):
    train, _ = open_annotated(Annotations(path=str(coco_folder(tmp_path, change=polygons))))
    for objects in train.objects:
        for box, segmentation in zip(objects.boxes.astype(int), objects.masks, strict=True):
            square = np.zeros((128, 128), np.uint8)
            square[box[1] : box[3], box[0] : box[2]] = 1
            np.testing.assert_array_equal(masks.bitmap(segmentation, (128, 128)), square)


def test_crowds_and_boxes_without_an_area_are_counted_and_not_trained_on(tmp_path):
    def change(content):
        content["annotations"][0]["iscrowd"] = 1
        content["annotations"][1]["bbox"][2] = 0

    train, _ = open_annotated(Annotations(path=str(coco_folder(tmp_path, train=30, change=change))))
    every = sum(len(objects.labels) for objects in train.objects)
    assert sum(objects.trainable.sum() for objects in train.objects) == every - 2
    assert "1 crowds, not trained on" in train.said() and "1 boxes without an area, left out" in train.said()


def first(**fields):
    def change(content):
        content["annotations"][0] |= fields

    return change


def without(part):
    return lambda content: {name: value for name, value in content.items() if name != part}


def every(**fields):
    def change(content):
        for one in content["annotations"]:
            one |= fields

    return change


def last_of_many(**fields):
    def change(content):
        one = content["annotations"][0]
        content["annotations"] = [{**one, "id": number} for number in range(1, 4002)]
        content["annotations"][-1] |= fields

    return change


def as_corners(content):
    for one in content["annotations"]:
        left, top, width, height = one["bbox"]
        one["bbox"] = [left, top, left + width, top + height]


WRONG = {
    "no annotations": (lambda c: {**c, "annotations": []}, "has an empty list of annotations"),
    "no images": (lambda c: {**c, "images": []}, "has an empty list of images"),
    "a part is missing": (without("categories"), "has no list of categories, so it is no detection data set"),
    "no objects": (lambda c: [1], "has no list of images"),
    "of other images": (
        lambda c: {**c, "images": [{**one, "file_name": "cat" + one["file_name"]} for one in c["images"]]},
        r"none of the 8 images of .* are in .*train \(the first one missing: cat000.png\): is it the JSON of another",
    ),
    "outside the folder": (
        lambda c: {**c, "images": [{**c["images"][0], "file_name": "../x.png"}, *c["images"][1:]]},
        "../x.png leaves the folder of images",
    ),
    "an unknown category": (first(category_id=2), "annotation 1 is of category 2, which is not in its categories"),
    "an unknown image": (first(image_id=5), "annotation 1 is of image 5, which is not in its images"),
    "no box": (first(bbox=None), "annotation 1 has no bbox of four numbers"),
    "a box of text": (first(bbox=["a", 1, 2, 3]), "annotation 1 has no bbox of four numbers"),
    "all degenerate": (
        every(bbox=[3, 4, 0, 0], area=0, segmentation=None),
        "no object can be trained on, all are",
    ),
    "all crowds": (every(iscrowd=1), "no object can be trained on"),
    "a mask of another size": (
        first(segmentation={"size": [64, 64], "counts": "0"}),
        "the segmentation of annotation 1 is of 64 × 64 pixels, and its image has 128 × 128",
    ),
    "a mask that is none": (
        first(segmentation={"size": [128, 128], "counts": [5]}),
        "the segmentation of annotation 1 has runs of 5 pixels in all, and its image has 16384",
    ),
    "an empty mask": (
        first(segmentation={"size": [128, 128], "counts": ""}),
        "annotation 1 has counts that are no run",
    ),
    "negative runs": (
        first(segmentation={"size": [128, 128], "counts": [16385, -1]}),
        "counts that are no run lengths",
    ),
    "runs with points": (first(segmentation={"size": [128, 128], "counts": [0.5, 16383.5]}), "are no run lengths"),
    "the last of many masks": (
        last_of_many(segmentation={"size": [128, 128], "counts": "PPPo"}),
        "the segmentation of annotation 4001 has",
    ),
    "a polygon far away": (
        first(segmentation=[[2e9, 1, 2, 2, 3, 9]]),
        "annotation 1 has a polygon that leaves its image",
    ),
    "a polygon without end": (first(segmentation=[[10**400, 1, 2, 2, 3, 9]]), "a polygon that leaves its image of 128"),
    "a polygon of no number": (first(segmentation=[[1, math.nan, 2, 2, 3, 9]]), "annotation 1 has a polygon"),
    "a box without end": (first(bbox=[10**400, 1, 2, 3]), "annotation 1 has no bbox of four numbers: mend it"),
    "an area without end": (first(area=10**400), "annotation 1 has the area 1000000.*, which is none: mend it"),
    "an area that is no number": (first(area=math.nan), "annotation 1 has the area nan"),
    "an area of text": (first(area="12"), "annotation 1 has the area 12, which is none"),
    "a list as category": (first(category_id=[3]), r"no category_id, or a wrong one \(\[3\]\): {'id': 1,"),
    "a crowd of text": (first(iscrowd="0"), "annotation 1 has iscrowd '0', which is neither 0 nor 1: mend it"),
    "a size without end": (
        lambda c: {**c, "images": [{**c["images"][0], "width": 10**400}, *c["images"][1:]]},
        "image 100 has 10000.* × 128 pixels, none or too many",
    ),
    "a line as polygon": (first(segmentation=[[1, 1, 2, 2]]), "annotation 1 has a polygon that is no list of at least"),
    "a size of nothing": (
        lambda c: {**c, "images": [{**c["images"][0], "width": 0}, *c["images"][1:]]},
        "image 100 has 0 × 128 pixels",
    ),
    "two of one id": (
        lambda c: {**c, "images": [{**one, "id": 100} for one in c["images"]]},
        "two images have the same id",
    ),
    "boxes of corners": (as_corners, "of the boxes cannot be xywh, .* they fit xyxy"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_a_coco_file_is_one_line(case, tmp_path):
    change, says = WRONG[case]
    with pytest.raises(UserError, match=says) as error:
        open_annotated(Annotations(path=str(coco_folder(tmp_path, change=change))))
    assert "\n" not in str(error.value)


def test_a_test_split_of_other_classes_is_refused(tmp_path):
    folder = coco_folder(tmp_path)
    file = folder / "instances_val.json"
    content = json.loads(file.read_text())
    content["categories"][1]["name"] = "wheel"
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="has category 3, wheel; the training split calls it square"):
        open_annotated(Annotations(path=str(folder)))


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("{tmp}/x.json", "data.images=None is no folder: name that of the images"),
        ("{tmp}/nowhere", "nowhere does not exist"),
    ],
)
def test_a_path_that_is_none_is_one_line(path, says, tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UserError, match=says) as error:
        open_annotated(Annotations(path=path.replace("{tmp}", str(tmp_path))))
    assert "\n" not in str(error.value)


def test_a_split_of_one_json_file_is_none(tmp_path):
    folder = coco_folder(tmp_path)
    data = Annotations(path=str(folder / "instances_train.json"), images=str(folder / "train"), test="val")
    with pytest.raises(UserError, match=r"data.test=val is no JSON file, and data.path is one: name that of the test"):
        open_annotated(data)


def test_a_damaged_image_of_a_table_is_named_with_its_split(tmp_path):
    folder = parquet_folder(tmp_path / "x")
    rows = datasets.Dataset.from_parquet(str(folder / "test.parquet")).cast_column(
        "image", datasets.Image(decode=False)
    )
    rows = rows.map(
        lambda row, at: {"image": {"bytes": row["image"]["bytes"][: 5000 if at == 2 else None], "path": None}},
        with_indices=True,
    )
    rows.to_parquet(folder / "test.parquet")
    with pytest.raises(UserError, match=r"x, test, row 2: .*truncated.*: mend or remove this image"):
        open_annotated(Annotations(path=str(folder)))
    train, _ = open_annotated(Annotations(path=str(folder), train="test", test="train", limit=2))
    wrong = dataclasses.replace(train, sizes=[(9, 9)] * 2)
    with pytest.raises(UnreadableImage, match=r"test, row 1 is 128 × 128, and .* says 9 × 9"):
        wrong.picture(1)


def test_a_file_that_is_no_json_is_one_line(tmp_path):
    folder = coco_folder(tmp_path)
    (folder / "instances_train.json").write_text("{")
    with pytest.raises(UserError, match=r"instances_train.json cannot be read as JSON"):
        open_annotated(Annotations(path=str(folder)))


CONVERSIONS = {
    "xywh": lambda box: box,
    "xyxy": lambda box: [box[0], box[1], box[0] + box[2], box[1] + box[3]],
    "cxcywh-shares": lambda box: [(box[0] + box[2] / 2) / 128, (box[1] + box[3] / 2) / 128, box[2] / 128, box[3] / 128],
}


@pytest.mark.parametrize("convention", CONVERSIONS)
def test_a_column_of_objects_is_read_in_the_convention_that_it_shows(convention, tmp_path):
    folder = parquet_folder(tmp_path / "x", CONVERSIONS[convention], count=24)
    train, test = open_annotated(Annotations(path=str(folder), test="test"))
    assert (train.names, train.has_masks) == (FORMS, False)
    assert_scenes(train, with_masks=False)
    assert_scenes(test, "test", with_masks=False)
    assert "boxes only" in train.said()


def test_classes_without_names_and_areas_and_a_limit(tmp_path):
    folder = parquet_folder(tmp_path / "x", CONVERSIONS["xyxy"], area=True, names=False, count=24)
    train, _ = open_annotated(Annotations(path=str(folder), test="train", limit=20))
    assert len(train) == 20 and train.names[:2] == ("class 0", "class 1")
    box = train.objects[0].boxes[0]
    assert train.objects[0].areas[0] == pytest.approx((box[2] - box[0]) * (box[3] - box[1]))


def test_what_is_wrong_with_a_column_of_objects_is_one_line(tmp_path):
    folder = parquet_folder(tmp_path / "x")

    def refused(says, **settings):
        with pytest.raises(UserError, match=says) as error:
            open_annotated(Annotations(path=str(folder), test="test", **settings))
        assert "\n" not in str(error.value)

    refused("has no column things: name it with data.objects", objects="things")
    refused("column 'image' holds no bbox and category of objects", objects="image")
    refused("boxes cannot be xyxy", box_format="xyxy")
    rows = datasets.Dataset.from_parquet(str(folder / "train.parquet"))
    rows.map(lambda row: {"objects": {"bbox": [], "category": []}}).to_parquet(folder / "train.parquet")
    refused("has no annotations")


WRONG_ROWS = {
    "no class": ({"category": [0, None]}, "train, row 1: an object has no class"),
    "a class below": ({"category": [0, -1]}, "train, row 1: a class is not one of the 100,000 that there can be"),
    "a class far above": ({"category": [0, 10**15]}, "train, row 1: a class is not one of the 100,000 that"),
    "a class more": ({"category": [0, 1, 1]}, "train, row 1: boxes, classes and areas differ in number"),
    "no box": ({"bbox": [None, [1, 2, 3, 4]]}, "train, row 1: .* or a box has not four numbers: mend it"),
    "boxes of other lengths": ({"bbox": [[1, 2, 3], [1, 2, 3, 4, 5]]}, "train, row 1: .* not four numbers"),
    "two boxes as one": ({"bbox": [[1, 2, 3, 4] * 2, [1, 2, 3, 4] * 2]}, "train, row 1: .* not four numbers"),
    "no number": ({"bbox": [[1, 2, 3, math.nan], [1, 2, 3, 4]]}, "train, row 1: .* not four numbers"),
    "far away": ({"bbox": [[1, 2, 1e300, 4], [1, 2, 3, 4]]}, "train, row 1: .* not four numbers"),
    "an area below": ({"area": [-1, 4]}, "train, row 1: .* an area that is none"),
    "an area of no number": ({"area": [math.nan, 4]}, "train, row 1: .* an area that is none"),
}


@pytest.mark.parametrize(
    ("case", "entries"),
    [(case, entries) for case in WRONG_ROWS for entries in (False, True) if (case, entries) != ("a class more", True)],
)
def test_an_object_that_is_none_is_one_line(case, entries, tmp_path):
    """Columns of lists, and of entries."""
    (damage, says), right = WRONG_ROWS[case], {"bbox": [[5, 5, 15, 20]] * 2, "category": [0, 1], "area": [300, None]}
    image = {"bytes": b"", "path": None}
    rows = [right, {**right, **damage}, right]
    if entries:
        rows = [[dict(zip(row, values, strict=True)) for values in zip(*row.values(), strict=True)] for row in rows]
    column = {"bbox": datasets.List(datasets.List(datasets.Value("float64")))}
    column |= {"category": datasets.List(datasets.Value("int64")), "area": datasets.List(datasets.Value("float64"))}
    kind = datasets.List({name: one.feature for name, one in column.items()}) if entries else column
    kinds = datasets.Features({"image": datasets.Image(), "objects": kind})
    made = datasets.Dataset.from_dict({"image": [image] * 3, "objects": rows}, features=kinds)
    made.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UserError, match=says) as error:
        open_annotated(Annotations(path=str(tmp_path), box_format="xywh", test="train"))
    assert "\n" not in str(error.value)


def test_an_image_of_another_size_than_annotated_is_named(tmp_path, capsys):
    from detect import main

    folder = coco_folder(tmp_path / "x")
    Image.new("RGB", (100, 128)).save(folder / "train" / "003.png")
    arguments = ["--model=dseq_jepa_vit_ti16", "--random=true", f"--data={folder}", "--workers=0", "--detector.size=64"]
    arguments += ["--optim.batch_size=8", f"--output_dir={tmp_path / 'run'}", f"--results={tmp_path / 'r.jsonl'}"]
    assert main(arguments) == 1
    assert "003.png (row 3) is 100 × 128, and instances_train.json says 128 × 128" in capsys.readouterr().err


def test_objects_without_a_mask_among_others_are_counted(tmp_path):
    folder = coco_folder(tmp_path, change=first(segmentation=None))
    train, test = open_annotated(Annotations(path=str(folder)))
    assert "boxes only, as 1 have no mask" in train.said() and "with masks" in test.said()


def test_a_file_that_is_listed_twice_is_said(tmp_path):
    def change(content):
        content["images"][3]["file_name"] = content["images"][0]["file_name"]

    train, test = open_annotated(Annotations(path=str(coco_folder(tmp_path, change=change))))
    assert "1 listed again with a file of another" in train.said()
    assert "listed again" not in test.said()


def test_an_image_of_one_pixel_has_a_box_of_one(tmp_path):
    def change(content):
        content["images"], content["annotations"] = content["images"][:1], content["annotations"][:1]
        content["images"][0] |= {"width": 1, "height": 1}
        content["annotations"][0] |= {"bbox": [0, 0, 1, 1], "area": 1, "segmentation": [[0, 0, 1, 0, 1, 1, 0, 1]]}

    train, _ = open_annotated(Annotations(path=str(coco_folder(tmp_path, change=change))))
    np.testing.assert_array_equal(train.objects[0].boxes, [[0, 0, 1, 1]])
