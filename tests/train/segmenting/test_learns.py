"""Segmentation learns: eight scenes by heart, and photos with COCO's ids where they are at hand."""

import json
from pathlib import Path

import pytest

from ..segmentings import segment

COCO = next(
    (folder for up in (3, 4, 5) if (folder := Path(__file__).parents[up] / "shared/data/coco200").is_dir()), None
)
BY_HEART = {
    "data__test": "train",
    "augment__scale": "[1,1]",
    "augment__flip": 0,
    "augment__distort": 0,
    "optim__batch_size": 8,
    "optim__weight_decay": 0,
    "optim__drop_path": 0,
}


def result(output):
    (line,) = (output.parent / "results.jsonl").read_text().splitlines()
    return json.loads(line)


@pytest.mark.slow
def test_eight_scenes_are_learnt_by_heart(tmp_path):
    settings = {
        "model": "dseq_jepa_vit_ti16",
        "args": '{"depth": 3}',
        "data__limit": 8,
        "img_size": 128,
        "channels": 64,
        "optim__epochs": 120,
        "optim__warmup_epochs": 5,
        "optim__lr": 3e-3,
        "checkpoint__every": 1000,
    }
    codes, said = segment(tmp_path / "run", "scenes", **BY_HEART, **settings)
    assert codes == [0], said
    record = result(tmp_path / "run")
    assert record["value"] > 90, record["iou"]
    assert record["duplicates"]["train_test"] == 8


@pytest.mark.slow
@pytest.mark.skipif(COCO is None, reason="needs ../shared/data/coco200")
def test_photos_with_gaps_in_the_ids_of_their_masks_are_trained_on_and_tested(tmp_path):
    settings = {"head": "linear", "channels": None, "data__ignore": "[0]", "data__limit": 8, "img_size": 64}
    codes, said = segment(tmp_path / "run", COCO, **settings)
    assert codes == [0], said
    record = result(tmp_path / "run")
    assert record["classes"] == 133 and (record["test"]["split"], record["test"]["images"]) == ("val", 8)
    assert set(record["iou"]) > {"person", "sky-other-merged"} and record["value"] > 0
