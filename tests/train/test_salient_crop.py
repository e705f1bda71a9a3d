"""The view of the most salient patches: it holds them, lies in the picture, and its answers stay apart."""

import json
from typing import get_args

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from common.labels.labelled import open_labelled
from common.labels.settings import Labels
from common.probing.feature_cache import CachedFeatures
from common.probing.features import FrozenBackbone, RowLayout
from common.salient_crop import LEAST, QueryName, gain, salient_boxes, salient_views
from common.tuning import evaluation
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.data import create_transform
from torch.nn import functional as F

from timm_dseq import saliency_map
from timm_dseq.engine.saliency import QUERIES
from timm_dseq.hub.load import data_config, load_backbone

from ..tiny import encoder, islands
from .probes import TINY, probe, probe_together, results_of
from .tunings import tune


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31))
def test_a_box_holds_the_salient_patches_and_lies_in_the_picture(h, w, seed):
    maps = islands(4, h, w, torch.Generator().manual_seed(seed)) + 1e-3 * torch.rand(4, h, w)
    for saliency, (top, left, side) in zip(maps, salient_boxes(maps).tolist(), strict=True):
        assert LEAST <= side <= 1 and 0 <= top <= 1 - side + 1e-6 and 0 <= left <= 1 - side + 1e-6
        ranked = sorted(((saliency[i, j].item(), i, j) for i in range(h) for j in range(w)), reverse=True)
        chosen = ranked[: max(1, round(h * w / 16))]
        for _, i, j in chosen:  # a patch from its first to its last line
            assert top <= i / h + 1e-6 and (i + 1) / h <= top + side + 1e-6
            assert left <= j / w + 1e-6 and (j + 1) / w <= left + side + 1e-6
        high, wide = (  # and a patch around them, no more
            min(max(places) + 2, n) - max(min(places) - 1, 0)
            for places, n in zip(list(zip(*chosen, strict=True))[1:], (h, w), strict=True)
        )
        assert side == pytest.approx(max(high / h, wide / w, LEAST))


@pytest.mark.parametrize("y", [60, 196])
@pytest.mark.parametrize("x", [60, 196])
def test_an_object_in_a_corner_is_seen_whole_and_closer(y, x):
    """A red disc before a sky, and the weights of this package."""
    model, _ = load_backbone("dseq_jepa_vit_ti16")
    down, right = torch.meshgrid(torch.arange(256.0), torch.arange(256.0), indexing="ij")
    inside = (down - y) ** 2 + (right - x) ** 2 < 28**2
    sky, red = torch.tensor([[0.2, 0.5, 0.8], [0.9, 0.2, 0.1]])[:, :, None, None]
    image = torch.where(inside, red, sky + 0.1 * down / 256)
    mean, std = (torch.tensor(model.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
    view = salient_views(model.eval(), ((image - mean) / std)[None], "border")[0] * std + mean
    assert view.shape == (3, 128, 128)
    seen = view[0] > view[2]
    assert seen.float().mean() > 2 * inside.float().mean()  # closer,
    assert not any(edge.any() for edge in (seen[0], seen[-1], seen[:, 0], seen[:, -1]))  # and nothing cut off


def test_of_a_map_that_is_the_same_everywhere_the_view_is_the_whole_image():
    model, images = encoder((40, 72)).eval(), torch.full((2, 3, 80, 144), 0.5)
    assert salient_boxes(torch.zeros(2, 5, 9)).tolist() == [[0, 0, 1]] * 2
    torch.testing.assert_close(salient_views(model, images, "norm"), torch.full((2, 3, 40, 72), 0.5))


def test_a_view_is_the_box_of_the_fine_image():
    torch.manual_seed(0)
    model, images = encoder((40, 72)).eval(), torch.randn(3, 3, 80, 144)
    coarse = F.interpolate(images, size=(40, 72), mode="bilinear", antialias=True)
    views = salient_views(model, images, "border")
    for image, view, (top, left, side) in zip(
        images, views, salient_boxes(saliency_map(model, coarse, "border")).tolist(), strict=True
    ):
        y, x, high, wide = round(top * 80), round(left * 144), round(side * 80), round(side * 144)
        y, x = min(y, 80 - high), min(x, 144 - wide)
        expected = F.interpolate(
            image[None, :, y : y + high, x : x + wide], size=(40, 72), mode="bicubic", antialias=True
        )
        torch.testing.assert_close(view[None], expected)


def test_a_gain_is_counted_in_pairs():
    """Half of the images are always right: between runs they vary, between pairs they do not."""
    plain = [torch.arange(400) % 2 == 0]
    closer = [(torch.arange(400) % 2 == 0) | (torch.arange(400) % 20 == 1)]
    found = gain(closer, plain)
    assert found["points"] == pytest.approx(5)
    low, high = found["interval"]
    expected = 196 * (0.05 * 0.95 / 400) ** 0.5  # the normal interval of a share of one in twenty
    assert 5 - low == pytest.approx(expected, rel=0.2) and high - 5 == pytest.approx(expected, rel=0.2)
    assert gain(plain, plain) == {"points": 0, "interval": [0, 0]}
    assert gain(plain, closer)["points"] == pytest.approx(-5)
    assert gain([*closer, *plain], [*plain, *plain])["points"] == pytest.approx(2.5)


def test_what_is_read_is_the_mean_of_both():
    draw = np.random.default_rng(0)
    rows, crops = draw.normal(size=(2, 6, 8)).astype(np.float16)
    layout = RowLayout((("mean", 1, 5), ("class", 1, 3)))
    both = CachedFeatures(rows, np.zeros((6, 16), np.uint8), torch.zeros(6), layout, crops)
    found = both.view(np.array([4, 1]), "class+mean", torch.device("cpu"))
    mean = (rows.astype(np.float32) + crops.astype(np.float32)) / 2
    np.testing.assert_allclose(found, mean[[4, 1]][:, [5, 6, 7, 0, 1, 2, 3, 4]], atol=1e-6)
    np.testing.assert_allclose(both.read(np.array([0]), slice(2, 6)), mean[:1, 2:6], atol=1e-6)


def test_all_queries_can_be_named():
    assert set(get_args(QueryName)) == set(QUERIES)


def caches(folder):
    return {file.parent.name: file.read_bytes() for file in (folder / "features").glob("*/rows.bin")}


@pytest.mark.parametrize("protocol", ["knn", "logistic", "dseq-cached"])
def test_a_probe_reports_both_and_nothing_mixes(protocol, data, tmp_path):
    code, said = probe(tmp_path / "plain", data, protocol=protocol)
    assert code == 0, said
    plain, before = results_of(tmp_path / "plain"), caches(tmp_path / "plain")
    code, said = probe(tmp_path / "both", data, protocol=protocol, salient_crop="border")
    assert code == 0, said
    found, after = results_of(tmp_path / "both"), caches(tmp_path / "both")
    versions = {"time", "versions"}
    without = [record for record in found if "salient crop" not in record["settings"]]
    assert [{k: v for k, v in one.items() if k not in versions} for one in without] == [
        {k: v for k, v in one.items() if k not in versions} for one in plain
    ]
    assert before.items() <= after.items() and len(after) == 2 * len(before) == 4
    closer = [record for record in found if record["settings"].get("salient crop") == "border"]
    assert {record["view"] for record in closer} == {record["view"] for record in plain}
    for record in closer:
        (other,) = (one for one in plain if one["view"] == record["view"])
        assert record["gain"]["points"] == pytest.approx(record["accuracy"] - other["accuracy"])
        low, high = record["gain"]["interval"]
        assert low <= record["gain"]["points"] <= high
    assert said.count("the salient crop gains") == len(closer)


def test_crops_in_the_cache_are_those_of_the_model(data, tmp_path):
    assert probe(tmp_path, data, salient_crop="norm")[0] == 0
    stored = {}
    for about in (tmp_path / "features").glob("*/about.json"):
        known = json.loads(about.read_text())
        if known["split"] == "test":
            rows = np.fromfile(about.with_name("rows.bin"), np.float32).reshape(known["images"], -1)
            stored["salient crop" in known] = rows, known
    rows, about = stored[True]
    assert about["salient crop"][0] == "norm" and not np.allclose(rows, stored[False][0], atol=1e-3)
    model, _ = load_backbone(TINY["model"], 32, random=True, seed=0, **json.loads(TINY["args"]))
    words = {**data_config(model), "input_size": (3, 64, 64)}
    images = [
        create_transform(**words, is_training=False)(open_labelled(Labels(path=str(data))).test.picture(i))
        for i in range(3)
    ]
    backbone = FrozenBackbone(model, (0, 0, 0), (1, 1, 1))
    backbone.normalised = lambda images: images
    features = backbone.features(salient_views(model, torch.stack(images), "norm"))
    expected = torch.cat([features["mean"].flatten(1), features["class"].flatten(1)], dim=1)
    np.testing.assert_allclose(rows[:3], expected, atol=1e-4)


@pytest.mark.xdist_group("runs")
def test_two_processes_crop_as_one(data, tmp_path, unused_port):
    assert probe(tmp_path / "one", data, salient_crop="border")[0] == 0
    codes, said = probe_together(tmp_path / "two", data, unused_port, salient_crop="border")
    assert codes == [0, 0], said
    ours, theirs = results_of(tmp_path / "one"), results_of(tmp_path / "two")
    assert [(r["settings"], r["each"], r.get("gain")) for r in ours] == [
        (r["settings"], r["each"], r.get("gain")) for r in theirs
    ]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"protocol": "dseq", "salient_crop": "border"}, "salient_crop is for protocols on stored features"),
        ({"model": "resnet18", "args": None, "salient_crop": "border"}, "salient_crop: ResNet is no plain ViT"),
        ({"salient_crop": "border", "model": "pixels", "args": None}, "is no plain ViT"),
        ({"salient_crop": "cls_param", "args": '{"class_token": false, "global_pool": "avg"}'}, "needs a class token"),
    ],
)
def test_what_cannot_be_cropped_is_one_line(changed, says, data, tmp_path):
    code, said = probe(tmp_path, data, **changed)
    assert code == 1 and says in said and said.count("\n") == 1


def test_a_classifier_answers_by_the_mean_of_both_logits(data):
    source = open_labelled(Labels(path=str(data))).test
    words = {"input_size": (3, 48, 48), "interpolation": "bicubic", "crop_pct": 0.9}
    words |= {"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_mode": "center"}
    torch.manual_seed(0)
    model = encoder(num_classes=3).eval()
    fine = {**words, "input_size": (3, 96, 96)}
    pictures = [source.picture(i) for i in range(len(source))]
    small, large = (
        torch.stack([create_transform(**size, is_training=False)(p) for p in pictures]) for size in (words, fine)
    )
    with torch.no_grad():
        logits = [model(small), model(salient_views(model, large, "border"))]
    truth = source.truth
    for query, expected in ((None, logits[0]), ("border", logits[0] + logits[1])):
        found = evaluation.correct_answers(model, source, words, Accelerator(), 0, query)
        assert torch.equal(found, expected.argmax(1) == truth)


@pytest.mark.xdist_group("tunings")
def test_a_finished_run_is_tested_with_crops_without_another_step(data, tmp_path):
    """And the record without crops stays what it was."""
    output, results = tmp_path / "run", tmp_path / "results.jsonl"
    code, said = tune(output, data, optim__epochs=1)
    assert code == 0, said
    log = (output / "seed-0" / "log.jsonl").read_bytes()
    (first,) = map(json.loads, results.read_text().splitlines())
    code, said = tune(output, data, optim__epochs=1, salient_crop="border")
    assert code == 0, said
    assert (output / "seed-0" / "log.jsonl").read_bytes() == log
    plain, closer = map(json.loads, results.read_text().splitlines())
    assert plain == first and "gain" not in plain
    assert closer["settings"] == {**plain["settings"], "salient crop": "border"}
    assert closer["gain"]["points"] == pytest.approx(closer["accuracy"] - plain["accuracy"])
    assert "the salient crop gains" in said
