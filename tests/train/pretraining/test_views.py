"""Runs that train views: they resume, say what they are made of, and export an encoder like all others."""

import timm
import torch

from ..runs import log_of, tensors_of, train

COLOURS = {"data__flip": 0.5, "data__color_jitter": 0.5, "data__hue": 0.1, "data__gray": 0.2, "data__solarize": 0.1}
VIEWS = {"model__views": 3, "model__view_share": 0.25, "watch__probe_every": 0, **COLOURS}


def test_a_run_of_views_alone_resumes_bit_for_bit_and_exports(tmp_path):
    settings = {**VIEWS, "model__objective": "views"}
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert train(whole, **settings)[0] == 0
    assert train(halves, max_steps=10, **settings)[0] == 0
    code, said = train(halves, **settings)
    assert code == 0 and "step 10" in said, said
    assert log_of(whole) == log_of(halves)
    ours, theirs = tensors_of(halves), tensors_of(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    lines = log_of(whole)
    assert all(line["losses"]["views"] == line["loss"] for line in lines)
    assert all(line[name] is None for line in lines for name in ("lambda", "predictor_fill", "encoder_fill"))
    model = timm.create_model(f"local-dir:{whole / 'export'}", pretrained=True)
    assert torch.equal(
        model.blocks[0].mlp.fc1.weight,
        next(x for name, x in theirs.items() if name.endswith("target.blocks.0.mlp.fc1.weight")),
    )
    assert "views (3 of an image, 25% of the patches" in (whole / "export" / "README.md").read_text()


def test_views_beside_regions_are_logged_apart(tmp_path):
    code, said = train(tmp_path / "run", **VIEWS, model__views_factor=0.5, max_steps=4)
    assert code == 0, said
    for line in log_of(tmp_path / "run"):
        assert abs(line["losses"]["prediction"] + line["losses"]["views"] - line["loss"]) < 1e-6
        assert line["region_share"] is not None


def test_the_number_of_views_is_part_of_the_run(tmp_path):
    settings = {**VIEWS, "model__objective": "views", "max_steps": 3}
    assert train(tmp_path / "run", **settings)[0] == 0
    code, said = train(tmp_path / "run", **{**settings, "model__views": 2, "max_steps": 5})
    assert code == 1 and "model.views" in said
