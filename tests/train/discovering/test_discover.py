"""discover.py from its command line: what it prints, keeps, leaves out and refuses."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ..runs import environments, launch, said_of
from .scenes import TINY, as_folders, as_parquet, said_by, squares


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    images, masks, _ = squares(9)
    return as_parquet(tmp_path_factory.mktemp("squares") / "squares.parquet", images, masks)


def discover(folder, data, **settings):
    places = {"data__path": data, "results": folder / "results.jsonl", "output_dir": folder / "pictures", "pictures": 0}
    return said_by("discover", **{**TINY, **places, **settings})


def records_of(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_every_query_and_prior_is_a_row_and_colour_finds_what_only_colour_tells(tmp_path, data):
    code, said = discover(tmp_path, data, pictures=5)
    assert code == 0, said
    found = {record["map"]: record for record in records_of(tmp_path)}
    queries = {"cls_param", "cls_out", "attention", "norm", "border", "ncut"}
    priors = {"centre", "colour − border", "colour − mean", "constant"}
    assert found.keys() == queries | priors
    assert all(f"| {name} |" in said for name in found)
    assert found["colour − border"]["max_f"] > found["constant"]["max_f"] + 20
    assert {record["model"] for name, record in found.items() if name in priors} == {"no model"}
    (picture,) = (tmp_path / "pictures").iterdir()
    assert Image.open(picture).size[0] > 1000 and f"pictures: {picture}" in said


def test_the_same_command_finds_what_it_measured_and_other_masks_are_measured_anew(tmp_path, monkeypatch):
    images, masks, _ = squares(9)
    data, truths = as_folders(tmp_path, images, masks)
    settings = {"queries": "[border,norm]", "data__mask": truths}
    code, first = discover(tmp_path, data, **settings)
    before = records_of(tmp_path)
    import discover as script

    monkeypatch.setattr(script.Judging, "add", lambda *_: pytest.fail("judged again"))
    code, again = discover(tmp_path, data, **settings)
    assert code == 0 and records_of(tmp_path) == before
    assert [line for line in first.splitlines() if line.startswith("|")] == [
        line for line in again.splitlines() if line.startswith("|")
    ]
    monkeypatch.undo()
    for number, mask in enumerate(masks[::-1]):
        mask.save(truths / f"{number}.png")
    assert discover(tmp_path, data, **settings)[0] == 0
    assert len(records_of(tmp_path)) == 2 * len(before)


def test_batches_and_workers_change_nothing(tmp_path, data):
    for name, settings in {"one": {}, "other": {"batch_size": 2, "workers": 1}}.items():
        (tmp_path / name).mkdir()
        assert discover(tmp_path / name, data, **settings)[0] == 0
    for one, other in zip(records_of(tmp_path / "one"), records_of(tmp_path / "other"), strict=True):
        assert one["map"] == other["map"]
        for way, figures in one["predictions"].items():
            for name, value in figures.items():
                assert value == pytest.approx(other["predictions"][way][name], abs=1e-4), (one["map"], way, name)


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(tmp_path, data, unused_port):
    (tmp_path / "one").mkdir()
    assert discover(tmp_path / "one", data)[0] == 0
    places = {"data.path": data, "results": tmp_path / "results.jsonl", "output_dir": tmp_path / "pictures"}
    words = [f"--{name}={value}" for name, value in {**TINY, **places, "pictures": 0}.items()]
    running = [launch("discover", words, tmp_path, each) for each in environments(unused_port, 2)]
    for process in running:
        process.join(300)
    assert [process.exitcode for process in running] == [0, 0], said_of(tmp_path).read_text()
    for one, both in zip(records_of(tmp_path / "one"), records_of(tmp_path), strict=True):
        assert one["map"] == both["map"] and one.get("max_f") == pytest.approx(both.get("max_f"), abs=1e-4)
        for way, figures in one["predictions"].items():
            assert figures["iou"] == pytest.approx(both["predictions"][way]["iou"], abs=1e-4)


def test_boxes_give_corloc(tmp_path):
    images, _, boxes = squares(9)
    code, said = discover(tmp_path, as_parquet(tmp_path / "boxes.parquet", images, boxes=boxes))
    assert code == 0 and "boxes are xyxy, as the data shows" in said
    assert "CorLoc" in said and "maxF" not in said


def test_numbered_masks_give_the_table_of_scenes(tmp_path):
    images, masks, _ = squares(4)
    for mask in masks:
        mask.paste(2, (0, 0, 8, 8))
        mask.paste(1, (8, 0, 16, 8))
    data = as_parquet(tmp_path / "scenes.parquet", images, masks)
    code, said = discover(tmp_path, data, data__numbered="true", queries="[border]")
    assert code == 0, said
    assert "| foreground ARI | full ARI | purity |" in said and "rectangles" in said


def test_queries_that_need_a_class_token_are_left_out_and_said_so(tmp_path, data):
    args = '{"patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 2, "class_token": false, "global_pool": "avg"}'
    code, said = discover(tmp_path, data, args=args)
    assert code == 0, said
    assert said.count("needs a class token, which this ViT lacks") == 3
    assert {record["map"] for record in records_of(tmp_path)} >= {"norm", "border", "ncut"}
    code, said = discover(tmp_path, data, args=args, queries="[cls_out]")
    assert code == 1 and said.startswith("discover.py: query='cls_out' needs a class token")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"queries": "[bordr]"}, "query='bordr' is unknown: choose one of"),
        ({"model": "resnet18", "args": "{}", "img_size": None}, "ResNet is no plain ViT"),
        ({"model": "pixels", "args": "{}"}, "Pixels is no plain ViT"),
        ({"block": 7}, "block=7 is block 7, but the ViT has blocks 0 to 2"),
        ({"data__mask": "truth"}, "has no column 'truth'"),
        ({"checkpoints": "true"}, "holds no checkpoints"),
        ({"num_regions": 1}, "num_regions=1"),
        ({"results": "/proc/none/x.jsonl"}, "cannot be written"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, data, settings, words):
    code, said = discover(tmp_path, data, **settings)
    line = said.strip().splitlines()[-1]
    assert code == 1 and line.startswith("discover.py: ") and words in line, said
    assert "Traceback" not in said


def test_weights_that_are_not_finite_are_refused(tmp_path, data, monkeypatch):
    from common.discovering import maps

    monkeypatch.setattr(maps, "saliency_from_tokens", lambda *_: torch.full((1, 4, 4), torch.nan))
    code, said = discover(tmp_path, data)
    assert code == 1 and "the saliency cls_param is not finite" in said


def test_every_checkpoint_of_a_run_is_a_row(tmp_path, data, training_run):
    code, said = discover(
        tmp_path, data, model=training_run, random=None, args=None, checkpoints="true", queries="[border,norm]"
    )
    assert code == 0, said
    assert "| over training: maxF | border | norm |" in said
    rows = [line for line in said.splitlines() if line.startswith("| run, step-")]
    assert [row.split("|")[1].strip() for row in rows[-2:]] == ["run, step-00000003", "run, step-00000006"]


SMALL = {"queries": "[border]", "num_regions": 3}


def maps_of(said):
    """The rows of the last table."""
    return [line for line in said.splitlines() if line.startswith("|")]


def test_priors_are_those_of_the_models_own_grid_whatever_was_measured_before(tmp_path, data):
    args = '{"patch_size": %d, "depth": 3, "embed_dim": 48, "num_heads": 2}'
    first = discover(tmp_path, data, **SMALL)[1]
    other = discover(tmp_path, data, **SMALL, args=args % 16)[1]
    again = discover(tmp_path, data, **SMALL)[1]
    assert maps_of(again) == maps_of(first) != maps_of(other)


def test_what_changes_the_function_and_no_weight_is_measured_anew(tmp_path, data):
    args = '{"patch_size": 8, "depth": 3, "embed_dim": 48, "num_heads": %s'
    for changed in (args % "2}", args % '2, "act_layer": "relu"}', args % "4}", args % "2}"):
        assert discover(tmp_path, data, **SMALL, args=changed)[0] == 0
    measured = [record for record in records_of(tmp_path) if record["map"] == "border"]
    assert len(measured) == 3 and len({record["weights"] for record in measured}) == 1


def test_what_four_numbers_of_a_box_mean_is_part_of_what_was_measured(tmp_path):
    images, _, _ = squares(4)
    data = as_parquet(tmp_path / "boxes.parquet", images, boxes=[[[16, 10, 30, 12]]] * 4)  # inside in any convention
    said = {}
    for form in ("xyxy", "cxcywh", "xyxy"):
        code, said[form] = discover(tmp_path, data, **SMALL, data__box_format=form)
        assert code == 0, said
    assert maps_of(said["xyxy"]) != maps_of(said["cxcywh"])
    assert {record["boxes"] for record in records_of(tmp_path)} == {"xyxy", "cxcywh"}


def test_pictures_of_other_data_blocks_arguments_and_truths_have_names_of_their_own(tmp_path, data):
    images, masks, boxes = squares(5)
    other = as_parquet(tmp_path / "others.parquet", images, masks, boxes=boxes)
    args = '{"patch_size": 8, "depth": 3, "embed_dim": 48, "num_heads": 4}'
    runs = [(data, {}), (other, {}), (other, {"data__boxes": "boxes"}), (data, {"block": 1}), (data, {"args": args})]
    for number, (path, settings) in enumerate(runs, 1):
        code, said = discover(tmp_path, path, **SMALL, **settings, pictures=2)
        assert code == 0, said
        assert len([*(tmp_path / "pictures").iterdir()]) == number
    names = " ".join(path.name for path in (tmp_path / "pictures").iterdir())
    assert "32px.squares.parquet.masks.block2.border." in names and "others.parquet.boxes.block2.border." in names


def test_of_scenes_the_query_that_is_drawn_is_the_purest_and_not_the_one_that_cuts_largest(tmp_path):
    from common.discovering.table import score

    cuts, pure = (
        {"fg_ari": ari, "purity": purity, "random_purity": 4.0} for ari, purity in ((53.7, 5.0), (20.0, 30.0))
    )
    assert max((cuts, pure), key=lambda scene: score({"scene": scene})[1]) is pure


def test_nothing_of_a_sheet_touches_its_left_margin(tmp_path, data):
    assert discover(tmp_path, data, **SMALL, pictures=4)[0] == 0
    (path,) = (tmp_path / "pictures").iterdir()
    assert np.asarray(Image.open(path))[:, :4].min() > 240
