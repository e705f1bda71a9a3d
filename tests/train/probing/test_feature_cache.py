"""Features are computed once, are those of the model, and belong to these weights, images and this preprocessing."""

import dataclasses
import io
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from common.data.digests import digests_of, duplicates, function_digest, weights_digest
from common.data.settings import Data
from common.data.source import open_source
from common.labels.labelled import open_labelled
from common.labels.settings import Labels
from common.probing import feature_cache
from common.probing.feature_cache import cached_features
from common.probing.features import FrozenBackbone
from common.probing.settings import Cache
from PIL import Image
from timm.data import create_transform

from timm_dseq import UserError
from timm_dseq.hub.load import data_config

from ..tunings import colours
from .test_features import small

LOOSE = partial(torch.nn.LayerNorm, eps=1e-3)


@pytest.fixture
def train(tmp_path):
    return open_labelled(Labels(path=str(colours(tmp_path / "data")))).train


def cached(source, folder, model, wanted=None, dtype="float32", crop_pct=None, batch=7, workers=0):
    preprocessing = {**data_config(model), **({"crop_pct": crop_pct} if crop_pct else {})}
    backbone = FrozenBackbone(model, preprocessing["mean"], preprocessing["std"])
    cache = Cache(str(folder), dtype, batch)
    return cached_features(
        source, wanted, backbone, preprocessing, cache, function_digest(model), Accelerator(), workers
    )


@torch.no_grad()
def test_rows_are_the_features_of_timms_evaluation(train, tmp_path):
    model = small()
    found = cached(train, tmp_path / "cache", model)
    transform = create_transform(**data_config(model), is_training=False)
    backbone = FrozenBackbone(model, (0, 0, 0), (1, 1, 1))
    backbone.normalised = lambda images: images
    for row in (0, 6, 7, 63):
        features = backbone.features(transform(train.picture(row))[None])
        expected = torch.cat([features["mean"].flatten(), features["class"].flatten()]).numpy()
        np.testing.assert_allclose(found.rows[row], expected, atol=1e-5)
    assert found.labels.tolist() == [i % 3 for i in range(64)]


def count_looks(monkeypatch):
    looked, features = [], FrozenBackbone.features

    def watched(self, images):
        looked.append(len(images))
        return features(self, images)

    monkeypatch.setattr(FrozenBackbone, "features", watched)
    return lambda: sum(looked) - looked.count(1)  # the layout is found with one image


def test_no_row_is_computed_twice_and_a_resume_computes_the_rest(train, tmp_path, monkeypatch):
    model, looks = small(), count_looks(monkeypatch)
    first = cached(train, tmp_path / "cache", model, torch.tensor([3, 5, 60]))
    assert looks() == 3 and not first.rows[4].any() and first.rows[5].any()
    kept = first.rows[5].copy()
    whole = cached(train, tmp_path / "cache", model, batch=8)
    assert looks() == 3 + 61
    assert np.array_equal(whole.rows[5], kept)
    before = looks()
    cached(train, tmp_path / "cache", model)
    assert looks() == before


def test_a_stopped_extraction_keeps_what_is_done(train, tmp_path, monkeypatch):
    model = small()
    whole = cached(train, tmp_path / "whole", model)
    seen, show = [], feature_cache.Screen.show

    def stopping(self, done, text):
        seen.append(done)
        if len(seen) == 4:
            raise KeyboardInterrupt
        show(self, done, text)

    monkeypatch.setattr(feature_cache.Screen, "show", stopping)
    with pytest.raises(KeyboardInterrupt):
        cached(train, tmp_path / "cache", model)
    monkeypatch.setattr(feature_cache.Screen, "show", show)
    done = np.fromfile(next((tmp_path / "cache").glob("*/done.bin")), np.uint8)
    assert done.astype(bool).sum() == 28
    np.testing.assert_allclose(cached(train, tmp_path / "cache", model).rows, whole.rows, atol=1e-6)


def removed(file):
    file.unlink()


def cut_short(file):
    file.write_bytes(file.read_bytes()[:-5])


def zeroed(file):
    file.write_bytes(bytes(file.stat().st_size))


@pytest.mark.parametrize("damage", [removed, cut_short, zeroed])
@pytest.mark.parametrize("name", ["rows.bin", "digests.bin", "done.bin"])
def test_a_damaged_cache_is_made_again(name, damage, train, tmp_path, monkeypatch):
    model, looks = small(), count_looks(monkeypatch)
    whole = cached(train, tmp_path / "cache", model, batch=8)
    rows, digests = whole.rows.copy(), whole.digests.copy()
    del whole
    damage(next((tmp_path / "cache").glob(f"*/{name}")))
    before = looks()
    again = cached(train, tmp_path / "cache", model, batch=8)
    assert looks() - before == 64
    assert np.array_equal(again.rows, rows) and np.array_equal(again.digests, digests)


def test_only_rows_that_are_damaged_are_computed_again_and_it_is_said(train, tmp_path, monkeypatch, capsys):
    model, looks = small(), count_looks(monkeypatch)
    whole = cached(train, tmp_path / "cache", model)
    rows = whole.rows.copy()
    (folder,) = (tmp_path / "cache").iterdir()
    spoilt = np.memmap(folder / "rows.bin", whole.rows.dtype, "r+", shape=rows.shape)
    spoilt[[3, 9]] *= 2
    np.memmap(folder / "digests.bin", np.uint8, "r+", shape=whole.digests.shape)[11, 0] ^= 1
    spoilt.flush()
    del whole
    capsys.readouterr()
    before = looks()
    np.testing.assert_allclose(cached(train, tmp_path / "cache", model).rows, rows, atol=1e-6)
    assert looks() - before == 3
    assert "3 rows in" in (said := capsys.readouterr().out) and "damaged and are computed again" in said


def test_other_weights_images_or_preprocessing_have_other_files(train, tmp_path):
    model, folder = small(), tmp_path / "cache"
    cached(train, folder, model)
    other = open_labelled(Labels(path=str(colours(tmp_path / "more", train=65)))).train
    cached(other, folder, model)
    cached(train, folder, model, crop_pct=0.5)
    cached(train, folder, model, dtype="float16")
    with torch.no_grad():
        model.norm.bias[0] += 1e-3
    cached(train, folder, model)
    for block in model.blocks:
        block.mlp.act = torch.nn.ReLU()
    cached(train, folder, model)
    assert len(list(folder.glob("*/rows.bin"))) == 6


def test_features_that_are_not_finite_end_it(train, tmp_path):
    model = small()
    with torch.no_grad():
        model.norm.bias[0] = float("nan")
    with pytest.raises(UserError, match="are not finite"):
        cached(train, tmp_path / "cache", model)
    with torch.no_grad():
        model.norm.bias[0] = 1e6
    with pytest.raises(UserError, match=r"too large for float16: give --cache.dtype float32"):
        cached(train, tmp_path / "cache", model, dtype="float16")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_named(train, tmp_path, workers):
    rows = [dict(train.rows[i]) for i in range(20)]
    rows[9]["image"] = {"bytes": rows[9]["image"]["bytes"][:50], "path": "photos/nine.png"}
    broken = dataclasses.replace(train, rows=rows, truth=train.truth[:20])
    with pytest.raises(UserError, match=r"photos/nine.png \(row 9\).*mend or remove this image") as error:
        cached(broken, tmp_path / "cache", small(), workers=workers)
    assert "\n" not in str(error.value)


def test_duplicates_are_equal_pixels_whatever_the_file(train, tmp_path):
    accelerator, cache = Accelerator(), Cache(str(tmp_path / "cache"))
    learnt = digests_of(train, 0, cache.folder, accelerator)
    assert np.array_equal(learnt, cached(train, tmp_path / "cache", small()).digests)
    rows = [{"image": train.picture(i)} for i in (4, 4, 9)]  # decoded: other bytes, the same pixels
    changed = train.picture(9)
    changed.putpixel((0, 0), (1, 2, 3))
    rows[2] = {"image": changed}
    tested = digests_of(dataclasses.replace(train, rows=rows, truth=train.truth[:3]), 0, cache.folder, accelerator)
    assert duplicates(learnt, tested) == 2
    assert duplicates(learnt[5:], tested) == 0
    assert len(np.unique(learnt, axis=0)) == 64


@pytest.mark.parametrize("damage", [b"", b"no numbers", None], ids=["empty", "text", "of fewer images"])
def test_a_damaged_file_of_digests_is_made_again(train, tmp_path, damage):
    digests = digests_of(train, 0, str(tmp_path), Accelerator())
    (path,) = tmp_path.glob("digests-*.npy")
    if damage is None:
        np.save(path, digests[:9])
    else:
        path.write_bytes(damage)
    assert np.array_equal(digests_of(train, 0, str(tmp_path), Accelerator()), digests)
    assert np.array_equal(np.load(path), digests)


def test_the_digest_of_weights_tells_every_bit():
    model = small()
    before = weights_digest(model)
    assert before == weights_digest(small())
    with torch.no_grad():
        model.blocks[3].mlp.fc1.weight[5, 7] += 1e-7
    assert weights_digest(model) != before
    assert weights_digest(timm.create_model("resnet18").half()) != weights_digest(timm.create_model("resnet18"))


def test_the_digest_of_a_function_tells_what_no_weight_does():
    def made(**args):
        torch.manual_seed(0)
        return timm.create_model("vit_tiny_patch16_224", **{"depth": 2, "embed_dim": 48, "num_heads": 2, **args})

    others = {"num_heads": 4}, {"act_layer": "relu"}, {"global_pool": "avg", "fc_norm": False}, {"norm_layer": LOOSE}
    models = [made(**args) for args in ({}, *others)]
    assert len({weights_digest(model) for model in models}) == 1
    before = function_digest(models[0])
    assert len({before, *map(function_digest, models)}) == 5
    models[0].train().set_grad_checkpointing()
    assert function_digest(models[0]) == before == function_digest(made().eval())


def test_a_full_disk_is_one_line_and_not_the_end_of_the_process(train, tmp_path, monkeypatch):
    """A page that is written through a map, and that the disk has no room for, is a SIGBUS."""
    folder, wrote = tmp_path / "cache", []

    class Full(io.FileIO):
        def write(self, content):
            wrote.append(len(content))
            return super().write(content) if len(wrote) < 40 else 0

    opened = Path.open
    monkeypatch.setattr(
        Path,
        "open",
        lambda path, mode="r", *args, **kwargs: (
            Full(path, "r+") if mode == "r+b" else opened(path, mode, *args, **kwargs)
        ),
    )
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\): make room"):
        cached(train, folder, small())
    monkeypatch.undo()
    whole = cached(train, tmp_path / "other", small())
    np.testing.assert_allclose(cached(train, folder, small()).rows, whole.rows, atol=1e-6)


def test_images_that_changed_and_kept_their_times_have_other_features(tmp_path):
    """As tar, rsync -t and cp -p leave them: `datasets` looks at times alone, and 16 images were read of 40."""
    places = [tmp_path / "photos" / "train" / name for name in "ab"]
    draw = np.random.default_rng(0)
    for place in places:
        place.mkdir(parents=True)
        for number in range(20):
            noise = draw.integers(0, 256, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(noise).save(place / f"{place.name}{number}.png")
            os.utime(place / f"{place.name}{number}.png", (10**9, 10**9))

    def rows():
        source = open_source(Data(path=str(tmp_path / "photos")))
        return cached(replace(source, truth=source.all_labels()), tmp_path / "cache", small()).rows

    before = rows()
    changed = places[0] / "a1.png"
    Image.new("RGB", (12, 12)).save(changed)
    os.utime(changed, (10**9, 10**9))
    assert (np.abs(rows() - before).max(1) > 1e-3).sum() == 1
