"""Labelled data sets: one word, a folder or a file; numbering, subsets, CLEVR's labels; mistakes in one line."""

import io
import json

import datasets
import pytest
import torch
from common.labels.aliases import ALIASES
from common.labels.clevr import label_of
from common.labels.labelled import open_labelled
from common.labels.settings import Labels
from common.labels.subsets import holdout_mask
from PIL import Image

from timm_dseq import UserError

from ..tunings import colours


def png(*colour):
    file = io.BytesIO()
    Image.new("RGB", (20, 20), colour).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def parquet(folder, names=None, **splits):
    """folder/SPLIT.parquet with these labels each, and other columns where a split is a dictionary."""
    folder.mkdir(exist_ok=True, parents=True)
    for split, columns in splits.items():
        columns = columns if isinstance(columns, dict) else {"label": columns}
        count = len(next(iter(columns.values())))
        kind = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
        kinds = {k: kind if k == "label" else datasets.Value("string" if k == "scene" else "int64") for k in columns}
        rows = {"image": [png(i, 0, 0) for i in range(count)], **columns}
        features = datasets.Features({"image": datasets.Image(), **kinds})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
    return str(folder)


def test_a_folder_of_two_parquet_files(tmp_path):
    found = open_labelled(Labels(path=str(colours(tmp_path / "data"))))
    assert (len(found.train), len(found.test), found.names) == (64, 24, ["red", "green", "blue"])
    assert (found.train_split, found.test_split) == ("train", "test")
    assert found.train.labels([3, 5]).tolist() == [0, 2]
    assert found.train.picture(0).size == (40, 40)


def test_a_parquet_file_and_another_to_test_on(tmp_path):
    path = parquet(tmp_path / "data", one=[0, 1, 1], two=[1, 0])
    found = open_labelled(Labels(path=f"{path}/one.parquet", test=f"{path}/two.parquet"))
    assert (found.train.truth.tolist(), found.test.truth.tolist()) == ([0, 1, 1], [1, 0])


def test_a_label_column_of_the_users_choice(tmp_path):
    columns = {"label": [0, 1, 0, 1], "other": [2, 1, 0, 2]}
    path = parquet(tmp_path / "data", train=columns, test=columns)
    assert open_labelled(Labels(path=path, label="other")).train.truth.tolist() == [2, 1, 0, 2]


def image_folder(folder, **splits):
    for split, classes in splits.items():
        for number, (name, count) in enumerate(classes.items()):
            place = folder / split / name
            place.mkdir(parents=True)
            for i in range(count):
                (place / f"{split}{number}{i}.png").write_bytes(png(i, number, 0)["bytes"])
    return str(folder)


def test_a_folder_of_images_whose_test_lacks_a_class_keeps_the_numbering(tmp_path):
    path = image_folder(tmp_path / "photos", train={"ant": 2, "bee": 3, "cow": 2}, val={"cow": 1, "ant": 2})
    found = open_labelled(Labels(path=path))
    assert found.names == ["ant", "bee", "cow"] and found.test_split == "val"
    assert found.train.truth.bincount().tolist() == [2, 3, 2]
    assert found.test.truth.bincount(minlength=3).tolist() == [2, 0, 1]


def test_a_class_that_is_tested_only_is_named_with_its_split(tmp_path):
    folder = image_folder(tmp_path / "data", train={"a": 1, "b": 1}, val={"a": 1, "b": 1, "c": 1})
    with pytest.raises(UserError, match="class 'c' is in val but not in train"):
        open_labelled(Labels(path=folder))


def test_a_folder_of_one_class_says_what_is_wanted(tmp_path):
    folder = image_folder(tmp_path / "data", train={"a": 2}, val={"a": 1})
    with pytest.raises(UserError, match="each class is a folder, and there have to be two"):
        open_labelled(Labels(path=folder))


def test_an_empty_folder_is_told_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"cannot be opened .*check data\.path") as error:
        open_labelled(Labels(path=str(tmp_path)))
    assert "\n" not in str(error.value)


def test_a_misspelt_word_is_told_with_what_was_meant(hub):
    with pytest.raises(UserError, match="did you mean imagenette"):
        open_labelled(Labels(path="imagenett"))


def test_inaturalist_folders_take_the_split_that_is_named(tmp_path, monkeypatch):
    places = {"ant": 1, "bee": 1}
    path = image_folder(tmp_path / "inat", train={"ant": 3, "bee": 3}, train_mini=places, val=places)
    found = open_labelled(Labels(path=f"inat21-mini:{path}", classes=2))
    assert (len(found.train), len(found.test), found.train_split) == (2, 2, "train_mini")
    assert len(open_labelled(Labels(path=f"inat21:{path}", classes=2)).train) == 6
    with pytest.raises(UserError, match=r"has 2 classes and data\.classes=10000"):
        open_labelled(Labels(path=f"inat21:{path}"))


def test_every_known_data_set_has_a_word():
    paths = {alias.path: alias for alias in ALIASES.values()}
    for path, image, label, classes in [
        ("ILSVRC/imagenet-1k", "image", "label", 1000),
        ("timm/imagenet-1k-wds", "jpg", "cls", 1000),
        ("clane9/imagenet-100", "image", "label", 100),
        ("frgfm/imagenette", "image", "label", 10),
        ("Donghyun99/CUB-200-2011", "image", "label", 200),
        ("tanganke/stanford_cars", "image", "label", 196),
        ("clip-benchmark/wds_vtab-clevr_count_all", "webp", "cls", 8),
        ("clip-benchmark/wds_vtab-clevr_closest_object_distance", "webp", "cls", 6),
    ]:
        alias = paths[path]
        assert (alias.image, alias.label, alias.classes) == (image, label, classes)
    assert paths["frgfm/imagenette"].config == "160px"
    assert ALIASES["inat21-mini"].train == "train_mini" and ALIASES["inat21"].classes == 10_000


@pytest.mark.parametrize("word", [word for word, alias in ALIASES.items() if alias.path])
def test_a_word_opens_its_data_set_of_the_hub_and_can_be_overridden(word, monkeypatch):
    alias, asked = ALIASES[word], []

    def load_dataset(path, name=None, split=None, **_):
        asked.append((path, name, split))
        labels = list(range(alias.classes))
        kinds = {alias.image: datasets.Image(), alias.label: datasets.ClassLabel(num_classes=alias.classes)}
        rows = {alias.image: [png(0, 0, 0)] * len(labels), alias.label: labels}
        return datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = open_labelled(Labels(path=word))
    assert asked == [(alias.path, alias.config, "train"), (alias.path, alias.config, alias.test)]
    assert (found.train.image, found.train.label, len(found.names)) == (alias.image, alias.label, alias.classes)
    asked.clear()
    open_labelled(Labels(path=word, config="big", train="train[:50%]", test="other"))
    assert asked == [(alias.path, "big", "train[:50%]"), (alias.path, "big", "other")]


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("imagenet", "accept its terms at https://huggingface.co/datasets/ILSVRC/imagenet-1k"),
        ("imagenet-wds", "timm/imagenet-1k-wds"),
        ("inat21", "it is not on the Hub: download train.tar.gz"),
        ("inat21-mini", "download train_mini.tar.gz"),
        ("cub:/nowhere", "/nowhere is no folder"),
        ("no/such-data", "no/such-data"),
        ("/nowhere", "/nowhere"),
    ],
)
def test_what_is_gated_or_missing_says_how_to_get_it(path, says, hub):
    with pytest.raises(UserError, match=says) as error:
        open_labelled(Labels(path=path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("splits", "settings", "says"),
    [
        ({"train": [0, 1], "test": [0, 1]}, {"label": "cls"}, "has no column 'cls': data.label is one of image, label"),
        ({"train": {"size": [0, 1]}, "test": {"size": [0, 1]}}, {}, "no column of classes: name it as data.label"),
        ({"train": [0, 1, 0], "test": [0, 2]}, {}, "class '2' is in test but not in train"),
        ({"train": [1, 1], "test": [1]}, {}, "holds one class only"),
        ({"train": [0, 1], "test": [0, 1]}, {"classes": 3}, "has 2 classes and data.classes=3"),
        ({"train": [0, 1], "test": [-1, -1]}, {}, "split test: 2 images have no label"),
        ({"train": [0, None, 1], "test": [0, 1]}, {}, "split train: 1 images have no label"),
        ({"train": [None, None], "test": [0, 1]}, {}, "split train: 2 images have no label"),
        ({"train": [0, 10**9], "test": [0]}, {}, "split train: a label is 1000000000, and classes are numbered from 0"),
        ({"train": [0, 1], "test": [10**9]}, {}, "split test: a label is 1000000000, and classes are numbered from 0"),
        ({"train": [0, 1]}, {}, "no split to test on"),
        ({"train": [0, 1, 1], "test": [0, 1]}, {"subset": "2-per-class"}, "class '0' has 1 images only: take fewer"),
        ({"train": [0, 1], "test": [0]}, {"subset": "some"}, "neither a share"),
        ({"train": [0, 1], "test": [0]}, {"scenes": "scene"}, "data.label has to name what is computed"),
        (
            {"train": {"label": [0, 1]}, "test": {"label": [0, 1]}},
            {"scenes": "scene", "label": "count"},
            "has no column 'scene': data.scenes is one of",
        ),
    ],
)
def test_bad_labels_are_named_before_any_work(splits, settings, says, tmp_path):
    path = parquet(tmp_path / "data", **splits)
    with pytest.raises(UserError, match=says) as error:
        open_labelled(Labels(path=path, **settings))
    assert "\n" not in str(error.value)


def test_a_share_takes_the_same_of_each_class_and_depends_on_the_seed(tmp_path):
    path = parquet(tmp_path / "data", train=[0] * 100 + [1] * 40 + [2] * 3, test=[0, 1, 2])
    found = [open_labelled(Labels(path=path, subset="10%"), seed) for seed in (0, 0, 1)]
    assert found[0].train.truth.bincount().tolist() == [10, 4, 1]
    first, again, other = ([one.train.picture(i).getpixel((0, 0))[0] for i in range(15)] for one in found)
    assert first == again != other and len(set(first)) == 15
    assert found[0].train_split == "train (10%)"
    few = open_labelled(Labels(path=path, subset="3-per-class"), 5)
    assert few.train.truth.bincount().tolist() == [3, 3, 3]


def test_a_file_names_rows_or_images(tmp_path):
    path = image_folder(tmp_path / "photos", train={"ant": 4, "bee": 4}, val={"ant": 1, "bee": 1})
    chosen = tmp_path / "subset.txt"
    chosen.write_text("train02.png\ntrain11.png\n\n")
    found = open_labelled(Labels(path=path, subset=str(chosen)))
    assert [found.train.picture(i).getpixel((0, 0)) for i in range(2)] == [(2, 0, 0), (1, 1, 0)]
    chosen.write_text("7\n0\n")
    assert open_labelled(Labels(path=path, subset=str(chosen))).train.truth.tolist() == [0, 1]
    for content, says in (
        ("8\n0", "there is no row 8"),
        ("x.png\n", "1 images are not in the split, the first is x.png"),
        ("", "is empty"),
        ("0\n1", "class 'bee' is in val but not in what is learnt from"),
        ("²\n", "1 images are not in the split, the first is ²"),
        ("\udcff\udcfe", r"cannot be read \(UnicodeDecodeError\): give a text file"),
    ):
        chosen.write_bytes(content.encode(errors="surrogateescape"))
        with pytest.raises(UserError, match=says):
            open_labelled(Labels(path=path, subset=str(chosen)))


def test_a_file_names_images_by_as_much_of_their_path_as_it_writes(tmp_path):
    path = tmp_path / "photos"
    for name, shade in (("ant", 0), ("bee", 100)):
        for split, numbers in (("train", range(1, 5)), ("val", (1,))):
            (path / split / name).mkdir(parents=True)
            for number in numbers:
                (path / split / name / f"{number}.png").write_bytes(png(shade + number, 0, 0)["bytes"])
    chosen = tmp_path / "subset.txt"
    chosen.write_text("ant/1.png\nant/2.png\nbee/3.png\n")
    found = open_labelled(Labels(path=str(path), subset=str(chosen))).train
    assert [found.picture(i).getpixel((0, 0))[0] for i in range(3)] == [1, 2, 103]
    chosen.write_text("elsewhere/train/ant/1\nbee/3.jpg\n")
    with pytest.raises(UserError, match="1 images are not in the split, the first is elsewhere/train/ant/1"):
        open_labelled(Labels(path=str(path), subset=str(chosen)))
    chosen.write_text("ant/1\nbee/3.jpg\n")
    assert len(open_labelled(Labels(path=str(path), subset=str(chosen))).train) == 2
    chosen.write_text("1.png\n")
    with pytest.raises(UserError, match=r"1.png may be .*ant/1.png or .*bee/1.png: write more of its path"):
        open_labelled(Labels(path=str(path), subset=str(chosen)))


@pytest.mark.parametrize("share", ["0%", "100.5%", "200%"])
def test_a_share_of_nothing_or_of_more_than_all_is_refused(share, tmp_path):
    path = parquet(tmp_path / "data", train=[0, 1] * 4, test=[0, 1])
    with pytest.raises(UserError, match=f"data.subset={share} is no share"):
        open_labelled(Labels(path=path, subset=share))


def test_classes_are_the_numbers_that_occur(tmp_path):
    path = parquet(tmp_path / "data", train=[5, 1000, 0, 5], test=[1000, 0])
    found = open_labelled(Labels(path=path))
    assert found.names == ["0", "5", "1000"] and found.train.classes == found.test.classes == 3
    assert found.train.truth.tolist() == [1, 2, 0, 1] and found.test.truth.tolist() == [2, 0]


def test_clevr_labels_by_the_published_rule():
    def scene(*depths):
        return [{"pixel_coords": [1, 2, depth]} for depth in depths]

    assert [label_of(scene(*[9] * count), "count") for count in (3, 10)] == [0, 7]
    depths = [7, 8, 8.01, 8.5, 8.6, 9, 9.2, 9.5, 9.7, 10, 10.1, 40]
    assert [label_of(scene(99, d, 50), "distance") for d in depths] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_clevr_labels_are_computed_from_a_column_of_scenes(tmp_path):
    scenes = [json.dumps([{"pixel_coords": [0, 0, 7 + i]}] * (3 + i)) for i in range(4)]
    split = {"scene": scenes}
    path = parquet(tmp_path / "data", train=split, test=split)
    for label, expected in (("count", [0, 1, 2, 3]), ("distance", [0, 0, 2, 4])):
        found = open_labelled(Labels(path=path, scenes="scene", label=label))
        assert found.train.truth.tolist() == expected
        assert open_labelled(Labels(path=f"clevr-{label}:{path}")).test.truth.tolist() == expected
    assert len(found.names) == 6
    with pytest.raises(UserError, match="row 0 holds no scene of CLEVR"):
        open_labelled(
            Labels(
                path=parquet(tmp_path / "bad", train={"scene": ["{}"]}, test={"scene": ["{}"]}),
                scenes="scene",
                label="count",
            )
        )


def test_clevrs_own_archive(tmp_path):
    for split, counts in (("train", (3, 5, 4)), ("val", (4, 3))):
        (tmp_path / "images" / split).mkdir(parents=True)
        scenes = []
        for i, count in enumerate(counts):
            name = f"CLEVR_{split}_{i:06d}.png"
            (tmp_path / "images" / split / name).write_bytes(png(i, 0, 0)["bytes"])
            scenes.append({"image_filename": name, "objects": [{"pixel_coords": [0, 0, 8 + i]}] * count})
        (tmp_path / "scenes").mkdir(exist_ok=True)
        (tmp_path / "scenes" / f"CLEVR_{split}_scenes.json").write_text(json.dumps({"scenes": scenes}))
    found = open_labelled(Labels(path=f"clevr-count:{tmp_path}", test="val"))
    assert (found.train.truth.tolist(), found.test.truth.tolist()) == ([0, 2, 1], [1, 0])
    assert found.train.picture(2).getpixel((0, 0)) == (2, 0, 0)
    path = tmp_path / "scenes" / "CLEVR_val_scenes.json"
    crowd = [{"image_filename": "x.png", "objects": [{"pixel_coords": [0, 0, 8]}] * 12}]
    for content, says in (
        ("{", "CLEVR_val_scenes.json holds no scenes of CLEVR"),
        ("[]", "CLEVR_val_scenes.json holds no scenes of CLEVR"),
        ('{"scenes": [7]}', "CLEVR_val_scenes.json holds no scenes of CLEVR"),
        ('{"scenes": []}', "split val: it has no images"),
        (json.dumps({"scenes": crowd}), "split val: a label is 9, and classes are numbered from 0 to 7 at most"),
        (json.dumps({"scenes": [{**crowd[0], "objects": []}]}), "split val: 1 images have no label"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=says):
            open_labelled(Labels(path=f"clevr-count:{tmp_path}", test="val"))


def test_images_held_out_are_a_share_of_each_class():
    truth = torch.tensor([0] * 50 + [1] * 20 + [2])
    aside = holdout_mask(truth, 0.1, 0)
    assert truth[aside].bincount(minlength=3).tolist() == [5, 2, 0]
    assert torch.equal(aside, holdout_mask(truth, 0.1, 0)) and not torch.equal(aside, holdout_mask(truth, 0.1, 1))
