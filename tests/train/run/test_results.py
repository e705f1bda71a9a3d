"""The file of results: what is added is whole, whatever happened before."""

import json

import pytest
import table
from common.run import results

from timm_dseq import UserError


def test_a_line_that_a_kill_cut_off_is_removed_and_takes_nothing_with_it(tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    results.append(path, [{"accuracy": 1.0}])
    with path.open("a", encoding="utf-8") as file:
        file.write('{"accuracy": 2.0, "name": "ä')
    results.append(path, [{"accuracy": 3.0}])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["accuracy"] for line in lines] == [1.0, 3.0]
    assert "cut off" in capsys.readouterr().out


def test_the_same_result_is_added_once(tmp_path):
    path = tmp_path / "results.jsonl"
    for _ in range(2):
        results.append(path, [{"accuracy": 1.0}, {"accuracy": 2.0}])
    assert len(path.read_text().splitlines()) == 2


RECORD = {
    "model": "vit_x",
    "parameters": 5e6,
    "img_size": [1024, 1024],
    "weights": "0",
    "data": "coco",
    "label": "boxes",
    "train": {"split": "train2017", "images": 118287, "subset": None},
    "test": {"split": "val2017", "images": 5000},
    "classes": 80,
    "protocol": "mask-rcnn",
    "precision": "no",
    "seeds": [0],
    "duplicates": None,
    "view": "dseq",
    "settings": {"epochs": 25},
}


def test_records_of_several_metrics_have_tables_of_their_own_beside_the_papers(tmp_path):
    path = tmp_path / "results.jsonl"
    old = {"accuracy": 71.5, "std": None, "interval": [70.0, 73.0], "each": [71.5]}  # as earlier versions wrote it
    figures = [results.figure("box AP", 41.25), results.figure("mask AP", 38.0)]
    accuracy = {**RECORD, **old, "data": "imagenet", "protocol": "dseq"}
    results.append(path, [*({**RECORD, **one} for one in figures), accuracy])
    parts = table.tables(results.read([path])).split("### ")
    boxes, masks, top1 = (
        next(part for part in parts if f"| {name} |" in part) for name in ("box AP", "mask AP", "top-1 %")
    )
    assert "| vit_x (5.0 M) | 1024 | dseq | 41.25 |  | 1 | epochs 25 |" in boxes
    assert "| DSeq-JEPA, vit_b16 (paper) | 1024 |  | 50.5 |" in boxes and "45.0" not in boxes
    assert "| 38.00 |" in masks and "| DSeq-JEPA, vit_b16 (paper) | 1024 |  | 45.0 |" in masks
    assert "| 71.50 | 70.00–73.00 |" in top1 and "| 73.5 |" in top1
    assert results.line({**RECORD, **figures[0]}).startswith("mask-rcnn      dseq         41.25 box AP  epochs 25")


def test_a_result_of_the_salient_crop_shows_what_it_gains(tmp_path):
    path = tmp_path / "results.jsonl"
    known = {**RECORD, "data": "imagenet", "protocol": "knn"}
    plain = {"accuracy": 51.3, "std": None, "interval": [50.0, 53.0], "each": [51.3]}
    closer = {"accuracy": 52.5, "std": None, "interval": [51.0, 54.0], "each": [52.5]}
    closer |= {"settings": {"epochs": 25, "salient crop": "border"}, "gain": {"points": 1.2, "interval": [-0.25, 2.3]}}
    results.append(path, [{**known, **plain}, {**known, **closer}, {**known, **plain, "protocol": "logistic"}])
    knn, logistic = table.tables(results.read([path])).split("### ")[1:]
    row = "| vit_x (5.0 M) | 1024 | dseq |"
    assert "| top-1 % | 95 % interval | gain of the crop | seeds |" in knn
    assert f"{row} 52.50 | 51.00–54.00 | +1.20 [-0.25, +2.30] | 1 | epochs 25, salient crop border |" in knn
    assert f"{row} 51.30 | 50.00–53.00 |  | 1 | epochs 25 |" in knn
    assert f"{row} 51.30 | 50.00–53.00 | 1 | epochs 25 |" in logistic and "gain" not in logistic


def test_a_gain_stands_beside_the_papers_rows_and_one_that_is_none_is_no_result(tmp_path):
    path = tmp_path / "results.jsonl"
    plain = {"accuracy": 71.5, "std": None, "interval": [70.0, 73.0], "each": [71.5], "protocol": "finetune-mae"}
    record = {**RECORD, **plain, "data": "imagenet", "gain": {"points": -0.5, "interval": [-1, 0]}}
    results.append(path, [record])
    lines = [line for line in table.tables(results.read([path])).splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1 and any("(paper)" in line for line in lines)
    results.append(path, [{**record, "gain": 0.5}])
    with pytest.raises(UserError, match="line 2, is no result"):
        results.read([path])


def test_a_record_whose_metric_has_no_value_is_no_result(tmp_path):
    path = tmp_path / "results.jsonl"
    results.append(
        path, [{**RECORD, "metric": "box AP", "accuracy": 1.0, "interval": None, "std": None, "each": [1.0]}]
    )
    with pytest.raises(UserError, match="line 1, is no result"):
        results.read([path])
