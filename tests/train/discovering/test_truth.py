"""Truth is read as it is written; what does not fit its image is named before anything is judged."""

import numpy as np
import pytest
from common.data.opening import SUFFIXES
from common.discovering.settings import Objects
from common.discovering.truth import open_truths, read_mask
from PIL import Image

from timm_dseq import UserError
from timm_dseq.images import UnreadableImage

from ..data.test_source import encoded
from .scenes import SIZE, as_folders, as_parquet, squares


def labels_of(image, numbered=None, unknown=None, kind="PNG"):
    return read_mask(encoded(image, kind), numbered, unknown)


def palette_mask():
    """Index 2 is black, index 0 white: read as colours, objects and ground would change places."""
    image = Image.fromarray(np.array([[0, 1, 2], [2, 2, 255]], np.uint8), "P")
    image.putpalette([255, 255, 255, 9, 9, 9, 0, 0, 0, *[80] * 759])
    return image


def test_a_palette_png_is_its_indices():
    assert labels_of(palette_mask()).tolist() == [[0, 1, 2], [2, 2, 255]]
    assert labels_of(palette_mask(), unknown=255).tolist() == [[0, 1, 2], [2, 2, -1]]


def test_grey_masks_are_cut_in_the_middle_unless_they_number_objects():
    grey = Image.fromarray(np.array([[0, 1, 127, 128, 255]], np.uint8))
    assert labels_of(grey).tolist() == [[0, 0, 0, 1, 1]]
    assert labels_of(grey, numbered=True).tolist() == [[0, 1, 127, 128, 255]]
    assert labels_of(grey.convert("RGB")).tolist() == [[0, 0, 0, 1, 1]]
    assert labels_of(grey.point(lambda x: x > 127, "1")).tolist() == [[0, 0, 0, 1, 1]]
    deep = Image.fromarray(np.array([[0, 3, 40_000]], np.uint16))
    assert labels_of(deep).tolist() == [[0, 0, 1]] and labels_of(deep, numbered=True).tolist() == [[0, 3, 40_000]]


def test_a_picture_is_no_mask():
    with pytest.raises(UnreadableImage, match="its mask is a picture in colours"):
        labels_of(Image.new("RGB", (3, 3), "red"))


def test_a_column_and_a_folder_of_masks_are_read_alike(tmp_path):
    images, masks, _ = squares(3)
    by_column = open_truths(Objects(str(as_parquet(tmp_path / "t.parquet", images, masks))), 0)
    photos, truths = as_folders(tmp_path, images, masks)
    by_folder = open_truths(Objects(str(photos), mask=str(truths)), 0)
    assert len(by_column) == len(by_folder) == 3
    for (_, _, one), (_, _, other) in zip(by_column, by_folder, strict=True):
        assert np.array_equal(one.labels, other.labels) and one.size == other.size == SIZE


def test_photos_of_all_formats_that_are_images_elsewhere_are_paired_with_their_masks(tmp_path):
    images, masks, _ = squares(len(SUFFIXES))
    photos, truths = as_folders(tmp_path, images, masks)
    for number, suffix in enumerate(SUFFIXES):
        (photos / f"{number}.jpg").rename(photos / f"{number}{suffix}")
    assert len(open_truths(Objects(str(photos), mask=str(truths)), 0)) == len(SUFFIXES)


def test_images_without_an_object_are_left_out_and_counted(tmp_path):
    images, masks, _ = squares(5)
    masks[1] = masks[3] = Image.new("L", SIZE)
    truths = open_truths(Objects(str(as_parquet(tmp_path / "t.parquet", images, masks))), 0)
    assert truths.empty == [1, 3] and truths.rows == [0, 2, 4]


def refused(data, words):
    with pytest.raises(UserError, match=words):
        open_truths(data, 0)


def test_a_mask_of_another_size_is_named_and_taken_if_it_is_asked_for(tmp_path):
    images, masks, _ = squares(3)
    masks[1] = masks[1].resize((SIZE[0] // 2, SIZE[1] // 2), Image.Resampling.NEAREST)
    file = str(as_parquet(tmp_path / "t.parquet", images, masks))
    refused(Objects(file), r"row 1: its mask has 24×16 pixels, the image 48×32 .*other_size true takes it")
    assert open_truths(Objects(file, other_size=True), 0)[1][2].labels.shape == (16, 24)
    masks[1] = masks[1].resize((30, 30))
    file = str(as_parquet(tmp_path / "u.parquet", images, masks))
    refused(Objects(file, other_size=True), r"row 1: its mask has 30×30 pixels, the image 48×32: mend")


def test_what_cannot_be_judged_is_one_line(tmp_path):
    images, masks, _ = squares(3)
    file = str(as_parquet(tmp_path / "t.parquet", images, masks))
    refused(Objects(file, mask="truth"), "has no column 'truth': name that of the masks as data.mask")
    refused(Objects(file, mask="image"), "column 'image' holds the masks: name that of the images as data.image")
    refused(Objects(file, skip=3), "data.skip=3 leaves none of 3 images")
    refused(Objects(file, boxes="nowhere.json"), r"nowhere\.json does not exist")
    numbered = [mask.point(lambda x: x // 255) for mask in masks]
    dark = str(as_parquet(tmp_path / "dark.parquet", images, numbered))
    refused(Objects(dark), "no mask holds an object: if they number the objects, give --data.numbered true")
    assert len(open_truths(Objects(dark, numbered=True), 0)) == 3
    photos, truths = as_folders(tmp_path, images, masks)
    (truths / "1.png").unlink()
    refused(Objects(str(photos), mask=str(truths)), "1 is in one of .* alone: each image needs a mask of its name")


@pytest.mark.parametrize("column", ["image", "mask"])
def test_an_image_or_mask_that_cannot_be_read_is_named(tmp_path, column):
    images, masks, _ = squares(3)
    columns = {"image": [encoded(x, "PNG") for x in images], "mask": [encoded(x, "PNG") for x in masks]}
    columns[column][2]["bytes"] = columns[column][2]["bytes"][:60]
    refused(Objects(str(as_parquet(tmp_path / "t.parquet", **columns))), "row 2: .*: mend or remove this image")


def test_boxes_are_found_in_a_column_alone_or_in_a_mapping(tmp_path):
    images, _, boxes = squares(4)
    for number, column in enumerate(({"boxes": boxes}, {"objects": [{"bbox": own} for own in boxes]})):
        file = str(as_parquet(tmp_path / f"{number}.parquet", images, **column))
        truths = open_truths(Objects(file), 0)
        assert truths.form == "xyxy"
        assert [truths[place][2].boxes.tolist() for place in range(4)] == boxes
    with pytest.raises(UserError, match="row 0: boxes holds no boxes of four numbers"):
        open_truths(Objects(str(as_parquet(tmp_path / "b.parquet", images, boxes=[[[1, 2, 3]]] * 4))), 0)
