"""Deletion and insertion against a loop over patches, and faithfulness.py from its command line."""

import json

import numpy as np
import pytest
import torch
from common.classifiers import Regression
from common.discovering.faithfulness import areas, blurred, places
from sklearn.linear_model import LogisticRegression

from ..tunings import colours
from .scenes import TINY, said_by


def slow_area(image, other, order, steps, probability, keep):
    """One image and one step at a time: keep says whether the first patches of the order stay, or go."""
    curve, patch = [], image.shape[1] // order.shape[0]
    for step in range(steps + 1):
        made = image.clone()
        for y in range(order.shape[0]):
            for x in range(order.shape[1]):
                if (order[y, x] < round(order.numel() * step / steps)) != keep:
                    cut = (slice(None), slice(y * patch, (y + 1) * patch), slice(x * patch, (x + 1) * patch))
                    made[cut] = other[cut]
        curve.append(float(probability(made[None])))
    return np.trapezoid(curve) / steps if hasattr(np, "trapezoid") else np.trapz(curve) / steps


def bright(images):
    return images[:, 0].mean((1, 2))


def test_areas_are_those_of_patches_taken_one_after_the_other():
    draw = torch.Generator().manual_seed(0)
    images, maps = torch.rand(3, 3, 24, 32, generator=draw), torch.rand(3, 3, 4, generator=draw)
    order = places(maps)
    for map_, own in zip(maps, order, strict=True):
        ranked = sorted(map_.flatten().tolist(), reverse=True)
        assert [ranked.index(value) for value in map_.flatten().tolist()] == own.flatten().tolist()
    found = areas(images, order, 5, bright)
    for i, image in enumerate(images):
        grey = image.mean((1, 2), keepdim=True).expand_as(image)
        blur = blurred(images)[i]
        assert float(found[0][i]) == pytest.approx(slow_area(image, grey, order[i], 5, bright, False), abs=1e-5)
        assert float(found[1][i]) == pytest.approx(slow_area(image, blur, order[i], 5, bright, True), abs=1e-5)


def test_the_order_that_takes_the_evidence_first_has_the_smaller_deletion_and_the_greater_insertion():
    images = torch.zeros(1, 3, 64, 64)
    images[:, 0, 8:16, 8:16] = 1  # the evidence: one patch of 64
    evidence = torch.zeros(1, 8, 8)
    evidence[0, 1, 1] = 1

    def probability(some):
        return some[:, 0, 8:16, 8:16].mean((1, 2))

    first, last = (areas(images, places(maps), 8, probability) for maps in (evidence, -evidence))
    assert first[0] < 0.2 < 0.8 < last[0] and first[1] > 0.8 > 0.4 > last[1]


def test_a_blurred_image_keeps_its_mean_and_loses_its_pattern():
    images = torch.zeros(1, 3, 32, 32)
    images[..., ::2] = 1
    assert (blurred(images) - 0.5).abs().max() < 1e-6


def test_the_program_prints_every_order_with_its_controls(tmp_path):
    data = colours(tmp_path / "colours")
    settings = {**TINY, "data__path": data, "images": 6, "steps": 3, "queries": "[border,norm]"}
    settings["results"] = tmp_path / "results.jsonl"
    code, said = said_by("faithfulness", **settings)
    assert code == 0, said
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {"border", "centre", "colour − mean", "random"} <= {record["order"] for record in records}
    assert records[0]["accuracy"] > 60  # colours are told apart by a random encoder, too
    random = next(record for record in records if record["order"] == "random")
    assert random["deletion_gain"] == random["insertion_gain"] == 0
    for record in records:
        for name in ("deletion", "insertion", "deletion_gain", "insertion_gain"):
            low, high = record[f"{name}_interval"]
            assert low <= record[name] <= high, (record["order"], name)
        assert record["deletion_gain"] == pytest.approx(random["deletion"] - record["deletion"])
        assert record["insertion_gain"] == pytest.approx(record["insertion"] - random["insertion"])
    other = TINY["args"].replace("}", ', "act_layer": "relu"}')
    assert said_by("faithfulness", **{**settings, "args": other})[0] == 0
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len({line["function"] for line in lines}) == 2 and len({line["weights"] for line in lines}) == 1
    assert lines[0]["train"]["images"] == 64 and lines[0]["train"]["digest"] != lines[0]["data_digest"]
    again = said_by("faithfulness", **{**settings, "batch_size": 3})[1]
    assert again.splitlines()[-1] == said.splitlines()[-1]  # random orders belong to images, not to batches


def test_a_mistake_is_one_line(tmp_path):
    data = colours(tmp_path / "colours")
    for settings, words in (
        ({"queries": "[bordr]"}, "query='bordr' is unknown"),
        ({"model": "resnet18", "args": "{}", "img_size": None}, "no plain ViT"),
        ({"data__path": tmp_path / "none"}, "cannot be opened"),
    ):
        code, said = said_by("faithfulness", **{**TINY, "data__path": data, **settings})
        assert code == 1 and said.strip().splitlines()[-1].startswith("faithfulness.py: ") and words in said, said


def test_probabilities_are_those_that_the_prediction_is_made_of():
    draw = torch.Generator().manual_seed(0)
    x, labels = torch.randn(60, 5, generator=draw), torch.arange(60) % 3
    head = Regression(x, labels, 3)
    head.fit(1.0)
    theirs = LogisticRegression(C=1.0, tol=1e-8, max_iter=2000).fit(x, labels)
    torch.testing.assert_close(head.probabilities(x).double(), torch.tensor(theirs.predict_proba(x)), rtol=0, atol=1e-3)
