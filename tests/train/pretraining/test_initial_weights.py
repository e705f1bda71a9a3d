"""Weights that a run starts from: all that an earlier run exported, the heads of its losses too."""

import torch
from common.pretraining.model import build
from common.pretraining.settings import parse
from safetensors.torch import save_file

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
