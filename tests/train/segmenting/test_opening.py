"""Images with masks of the Hub, of Parquet files and of folders; ids with gaps, and every mistake in one line."""

import json

import datasets
import numpy as np
import pyarrow.parquet
import pytest
from accelerate import Accelerator
from common.segmenting.classes import IGNORED, check_known, classes_of, look_at
from common.segmenting.masks import read_ids
from common.segmenting.opening import SCENE_NAMES, open_masked, resolved
from common.segmenting.settings import Masks
from PIL import Image

from timm_dseq import UserError

from ..segmentings import patches
from .test_masks import encoded


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def folder(tmp_path):
    return patches(tmp_path / "patches")


def classes_in(data: Masks, accelerator):
    """Both splits and the classes, checked as a program does."""
    data = resolved(data)
    splits = open_masked(data)
    found = [look_at(split, data.ignore, 0, accelerator) for split in splits]
    classes = classes_of(data, splits[0], found[0])
    for split, of in zip(splits, found, strict=True):
        check_known(split, of, classes, data.ignore)
    return *splits, classes, found


def row(ids, size=None, **kinds):
    """An image and its mask, encoded."""
    mask = Image.fromarray(np.array(ids, np.uint8))
    return {"image": encoded(Image.new("RGB", size or mask.size)), "mask": encoded(mask), **kinds}


def parquet(folder, **splits):
    folder.mkdir(exist_ok=True)
    for split, rows in splits.items():
        columns = {name: [each[name] for each in rows] for name in rows[0]}
        kinds = datasets.Features({name: datasets.Image() for name in columns})
        datasets.Dataset.from_dict(columns, features=kinds).to_parquet(folder / f"{split}.parquet")
    return folder


LAYOUTS = {
    "images and masks": ("images/{}", "masks/{}", "train", "val"),
    "ADE20K's own": ("images/{}", "annotations/{}", "training", "validation"),
    "a folder for each split": ("{}/images", "{}/masks", "train", "test"),
    "COCO's panoptic ids": ("{}", "semantic_{}", "train", "val"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_folders_are_found_and_ids_with_gaps_become_numbers(layout, folder, accelerator):
    images, masks, *names = LAYOUTS[layout]
    for split, name in zip(("train", "val"), names, strict=True):
        for part, place in (("images", images), ("masks", masks)):
            (folder / "new" / place.format(name)).parent.mkdir(parents=True, exist_ok=True)
            (folder / part / split).rename(folder / "new" / place.format(name))
    train, test, classes, found = classes_in(Masks(str(folder / "new")), accelerator)
    assert (train.split, test.split, len(train), len(test)) == (*names, 8, 4)
    assert classes.ids == (3, 7, 200) and classes.names == ("3", "7", "200")
    assert [each.empty for each in found] == [0, 0]
    ids = train.masks.read(0, read_ids)
    numbers = classes.numbers(ids)
    for number, id_ in ((0, 3), (1, 7), (2, 200), (IGNORED, 255)):
        assert ((numbers == number) == (ids == id_)).all()


def test_folders_may_be_named_and_files_may_lie_deeper_and_have_other_suffixes(folder, accelerator):
    (folder / "images" / "train" / "city").mkdir()
    (folder / "masks" / "train" / "city").mkdir()
    for kind, suffix in (("images", "webp"), ("masks", "png")):
        path = folder / kind / "train" / "0.png"
        Image.open(path).save(folder / kind / "train" / "city" / f"0.{suffix}")
        path.unlink()
    (folder / "images").rename(folder / "photos")
    data = Masks(str(folder), image="photos/{}", mask="masks/{}", limit=3)
    train, test, *_ = classes_in(data, accelerator)
    assert len(train) == len(test) == 3
    assert len(open_masked(Masks(str(folder), image="photos/{}", mask="masks/{}"))[0]) == 8


def test_parquet_files_with_a_column_of_masks(tmp_path, accelerator):
    rows = [row([[1, 0], [5, 255]]), row([[255, 255], [255, 255]])]
    train, _, classes, found = classes_in(Masks(str(parquet(tmp_path / "x", train=rows, test=rows[:1]))), accelerator)
    assert classes.ids == (0, 1, 5) and (train.images.image, train.masks.image) == ("image", "mask")
    assert [each.empty for each in found] == [1, 0]
    for split in ("train", "test"):  # as other libraries write them: bytes without datasets' word for an image
        plain = [{name: value["bytes"] for name, value in each.items()} for each in rows]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(plain), tmp_path / f"{split}.parquet")
    assert classes_in(Masks(str(tmp_path), mask="mask"), accelerator)[2].ids == (0, 1, 5)
    one, other = (str(tmp_path / "x" / f"{split}.parquet") for split in ("train", "test"))
    assert len(classes_in(Masks(one, train=one, test=other), accelerator)[2]) == 3


def test_ade20k_is_its_data_set_of_the_hub_with_other_ignored_and_can_be_overridden(monkeypatch, accelerator):
    asked = []

    def load_dataset(path, name=None, split=None, **_):
        asked.append((path, name, split))
        rows = [row(np.arange(151).reshape(1, -1))]
        columns = {"image": [rows[0]["image"]], "annotation": [rows[0]["mask"]], "scene_category": [7]}
        kinds = {"image": datasets.Image(), "annotation": datasets.Image(), "scene_category": datasets.Value("int64")}
        return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    train, _, classes, _ = classes_in(Masks("ade20k"), accelerator)
    assert asked == [("danjacobellis/scene_parse_150", None, split) for split in ("train", "validation")]
    numbers = classes.numbers(train.masks.read(0, read_ids))[0].tolist()
    assert len(classes) == 150 and numbers == [IGNORED, *range(150)]
    assert [classes.names[k] for k in (0, 12, 149)] == ["wall", "person", "flag"]
    asked.clear()
    open_masked(resolved(Masks("ade20k", train="train[:50%]", test="other")))
    assert [split for *_, split in asked] == ["train[:50%]", "other"]
    with pytest.raises(UserError, match="holds the id 0, which is no class"):
        classes_in(Masks("ade20k", ignore=[255]), accelerator)


def test_ade20k_as_a_folder_has_its_ignored_ids_and_finds_its_splits(folder, accelerator):
    data = resolved(Masks(f"ade20k:{folder}"))
    assert (data.path, data.ignore, data.test) == (str(folder), [0, 255], None)
    classes = classes_in(Masks(f"ade20k:{folder}", ignore=[200, 255]), accelerator)[2]
    assert classes.ids == tuple(range(1, 151))


def test_names_of_classes_come_from_a_file_and_are_all_classes(folder, accelerator):
    (folder / "names.json").write_text(json.dumps({"3": "ground", "7": "tree", "9": "sea", "200": "sky"}))
    classes = classes_in(Masks(str(folder)), accelerator)[2]
    assert classes.ids == (3, 7, 9, 200) and classes.names == ("ground", "tree", "sea", "sky")
    (folder / "list.json").write_text(json.dumps([str(number) for number in range(201)]))
    assert len(classes_in(Masks(str(folder), names=str(folder / "list.json")), accelerator)[2]) == 201


def test_scenes_have_masks_of_their_forms(accelerator):
    train, test, classes, found = classes_in(Masks("scenes", limit=6), accelerator)
    assert classes.names == SCENE_NAMES and len(train) == len(test) == 6
    assert 0 in found[0].ids and len(found[0].ids) > 3


def spoilt(what, folder):
    """A mistake in the folder, and settings that go with it."""
    mask, image = folder / "masks" / "train" / "5.png", folder / "images" / "train" / "5.png"
    settings = {}
    if what == "size":
        Image.new("L", (20, 10), 3).save(mask)
    elif what == "colours":
        Image.open(mask).convert("RGB").save(mask)
    elif what == "no mask":
        mask.unlink()
    elif what == "no image":
        image.unlink()
    elif what == "two files":
        (mask.parent / "5.tiff").write_bytes(b"")
    elif what == "broken mask":
        mask.write_bytes(b"no image")
    elif what == "unknown in test":
        Image.new("L", Image.open(mask).size, 99).save(folder / "masks" / "val" / "2.png")
    elif what == "unnamed":
        (folder / "names.json").write_text('{"3": "a", "200": "b"}')
    elif what == "one class":
        settings = {"ignore": [3, 7, 255]}
    elif what == "all ignored":
        (folder / "names.json").write_text('{"3": "a", "200": "b", "9": "c", "8": "d", "255": "e"}')
        settings = {"ignore": [3, 7, 200, 255]}
    elif what == "other count":
        settings = {"classes": 4}
    elif what == "names":
        (folder / "names.json").write_text("[1, 2]")
    elif what == "same names":
        (folder / "names.json").write_text('{"3": "a", "7": "a", "200": "b"}')
    elif what == "names no JSON":
        (folder / "names.json").write_text("{")
    elif what == "no test":
        (folder / "images" / "val").rename(folder / "images" / "extra")
    elif what == "empty":
        for path in (*mask.parent.iterdir(), *image.parent.iterdir()):
            path.unlink()
    elif what == "no column":
        (folder / "rows").mkdir()
        parquet(folder / "rows", train=[{"image": row([[1]])["image"]}])
        settings = {"path": str(folder / "rows"), "test": "train"}
    elif what == "numbers for masks":
        rows = datasets.Dataset.from_dict({"image": [row([[1]])["image"]], "mask": [5]})
        rows.cast_column("image", datasets.Image()).to_parquet(folder / "train.parquet")
        settings = {"path": str(folder / "train.parquet"), "mask": "mask", "test": "train"}
    elif what == "path":
        settings = {"path": "/nowhere"}
    elif what == "alias path":
        settings = {"path": "ade20k:/nowhere"}
    elif what == "scenes split":
        settings = {"path": "scenes", "test": "val"}
    return Masks(**{"path": str(folder), **settings})


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("size", "masks/train/5.png (row 5): a mask of 20 × 10 pixels, and its image has 48 × 40"),
        ("colours", "masks/train/5.png (row 5): a mask in colours (RGB) does not tell its classes"),
        ("no mask", "images/train/5.png has no file of its name in"),
        ("no image", "masks/train/5.png has no file of its name in"),
        ("two files", "masks/train/5.tiff differ in their suffix alone"),
        ("broken mask", "masks/train/5.png (row 5): UnidentifiedImageError"),
        ("unknown in test", "masks/val/2.png (row 2) holds the id 99, which is no class (1 such ids in val)"),
        ("unnamed", "holds the id 7, which is no class (1 such ids in train): name them in data.names, or ignore them, "
         "data.ignore=[7, 255]"),
        ("one class", "split train: 1 classes, and 2 to 4096 can be told apart"),
        ("all ignored", "split train: data.ignore leaves no pixel"),
        ("other count", "has 3 classes and data.classes=4"),
        ("names", "names.json: give a name for each id"),
        ("same names", "names.json: two ids have the same name"),
        ("names no JSON", "names.json cannot be read (JSONDecodeError)"),
        ("no test", "has no split to test on"),
        ("empty", "images/train is empty"),
        ("no column", "has no column of masks: name it as data.mask"),
        ("numbers for masks", "column 'mask' holds no masks"),
        ("path", "/nowhere does not exist"),
        ("alias path", "/nowhere is no folder"),
        ("scenes split", "scenes has no split 'val'"),
    ],
)  # fmt: skip
def test_every_mistake_is_one_line_that_names_it(what, says, folder, accelerator):
    with pytest.raises(UserError) as error:
        classes_in(spoilt(what, folder), accelerator)
    assert says in str(error.value) and "\n" not in str(error.value)
