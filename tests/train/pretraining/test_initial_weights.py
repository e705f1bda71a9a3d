"""Weights that a run starts from: all that an earlier run exported, the heads of its losses too."""

import pytest
import timm
import torch
from common.pretraining.model import build
from common.pretraining.settings import parse
from safetensors.torch import save_file

from timm_dseq import UserError
from timm_dseq.hub.convert import convert

from ..runs import options

TERMS = {"model__contrastive": "true", "model__views": 2}


def model_of(tmp_path, seed, **settings):
    return build(parse(options(tmp_path, seed=seed, **settings))[0])


def exported(model, folder):
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    convert(folder / "model.safetensors", folder / "export", with_pretraining_state=True)
    return folder / "export"


def test_an_export_holds_every_part_that_a_run_goes_on_from(tmp_path):
    first = model_of(tmp_path, 1, **TERMS)
    folder = exported(first, tmp_path)
    second = model_of(tmp_path, 2, model__init=folder, **TERMS).state_dict()
    for name, tensor in first.state_dict().items():
        assert torch.equal(second[name], tensor), name
    assert any(name.startswith("recognition.") for name in second) and any("contrastive." in name for name in second)


def test_heads_that_the_new_run_has_no_use_for_are_left_out_and_others_stay_new(tmp_path):
    folder = exported(model_of(tmp_path, 1, model__views=2), tmp_path)
    fresh = model_of(tmp_path, 2, model__contrastive="true").state_dict()
    ours = model_of(tmp_path, 2, model__init=folder, model__contrastive="true").state_dict()
    assert ours.keys() == fresh.keys()
    heads = [name for name in ours if name.startswith("contrastive.")]
    assert heads and all(torch.equal(ours[name], fresh[name]) for name in heads)


def test_a_run_starts_from_whatever_a_command_takes_by_name(tmp_path):
    """Of weights in this package; the run's own randomness is that of a run without them."""
    settings = {"model__name": "dseq_jepa_vit_ti16", "model__args": "{}", "model__img_size": 128}
    fresh = model_of(tmp_path, 1, **settings)
    after = torch.rand(3)
    model = model_of(tmp_path, 1, **settings, model__init="dseq_jepa_vit_ti16.photos65k")
    assert torch.equal(torch.rand(3), after)
    theirs = timm.create_model("dseq_jepa_vit_ti16.photos65k", pretrained=True).state_dict()
    for part in (model.student, model.target):
        for name, tensor in part.state_dict().items():
            assert torch.equal(tensor, fresh.target.pos_embed if name == "pos_embed" else theirs[name]), name
    parts = model.predictor.state_dict(), fresh.predictor.state_dict()
    assert all(torch.equal(parts[0][name], tensor) for name, tensor in parts[1].items())


def test_a_name_that_is_none_is_one_line(tmp_path):
    for name, says in {
        "dseq_jepa_vit_b16": "has no published weights: .*timm-dseq get dseq_jepa_vit_b16.in1k_official",
        "nowhere.pth": "neither a model of timm nor a path that exists",
        "dseq_jepa_vit_ti16.photos65k": r"model.init=dseq_jepa_vit_ti16.photos65k does not fit model.name: ",
    }.items():
        with pytest.raises(UserError, match=says) as error:
            model_of(tmp_path, 1, model__init=name)
        assert "\n" not in str(error.value)
