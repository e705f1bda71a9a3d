"""Whatever names a backbone opens the same weights, and what names none is told in one line."""

import json
import shutil

import pytest
import timm
import torch
from common.models import data_config, load_backbone
from common.run import checkpoints
from safetensors.torch import save_file

from timm_dseq import UserError

from .. import layouts

SETTINGS = {"name": "dseq_jepa_vit_ti16", "img_size": 224, "args": {}}


def same(model, weights):
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.fixture
def run(tmp_path, roles):
    """A run of pretrain.py with two checkpoints."""
    weights = {f"{role}.{name}": tensor for role, part in roles.items() for name, tensor in part.items()}
    for step in (3, 6):
        state = {"config": {"model": SETTINGS}}
        saved = checkpoints.Saved(weights, {"a": torch.zeros(1)}, state)
        checkpoints.save(tmp_path / "run" / "checkpoints", step, saved)
    return tmp_path / "run"


def test_a_folder_ready_for_the_hub(exported, roles):
    for name in (str(exported), f"local-dir:{exported}"):
        model, _ = load_backbone(name)
        same(model, roles["target"])
        assert not model.training
    assert load_backbone(str(exported))[1] == "dseq_jepa_vit_ti16.in1k"
    assert data_config(model)["crop_pct"] == 0.875 and data_config(model)["input_size"] == (3, 224, 224)


def test_a_repository_of_the_hub(exported, roles, hub):
    hub.add_repo("org/name", {path.name: path.read_bytes() for path in exported.iterdir()})
    model, name = load_backbone("hf-hub:org/name")
    same(model, roles["target"])
    assert name == "org/name"
    with pytest.raises(UserError, match="no such repository"):
        load_backbone("hf-hub:org/other")


def test_a_run_gives_the_target_encoder_of_its_newest_whole_checkpoint(run, roles):
    model, name = load_backbone(str(run))
    same(model, roles["target"])
    assert name == "run, step-00000006"
    (run / "checkpoints" / "step-00000006" / "model.safetensors").write_bytes(b"cut off")
    assert load_backbone(str(run))[1] == "run, step-00000003"
    assert load_backbone(str(run / "checkpoints" / "step-00000003"))[1] == "run, step-00000003"
    with pytest.raises(UserError, match=r"step-00000006: model\.safetensors has 7 bytes"):
        load_backbone(str(run / "checkpoints" / "step-00000006"))


def test_a_file_of_weights(tmp_path, roles):
    path = layouts.save_training(tmp_path / "weights.safetensors", **roles)
    same(load_backbone(str(path))[0], roles["target"])
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    same(load_backbone(str(tmp_path / "plain.safetensors"))[0], plain.state_dict())


def test_another_size_resamples_the_positions(run, roles):
    model, _ = load_backbone(str(run), 96)
    assert data_config(model)["input_size"] == (3, 96, 96)
    assert torch.equal(model.blocks[0].attn.qkv.weight, roles["target"]["blocks.0.attn.qkv.weight"])
    assert model(torch.zeros(1, 3, 96, 96)).shape == (1, 192)
    assert data_config(load_backbone("resnet18", 96, random=True)[0])["input_size"] == (3, 96, 96)


def test_a_head_is_there_only_when_it_is_asked_for(run, exported):
    for name in (str(run), str(exported)):
        assert load_backbone(name)[0].num_classes == 0
        assert load_backbone(name, num_classes=7)[0](torch.zeros(1, 3, 224, 224)).shape == (1, 7)


def test_random_weights_are_those_of_the_seed(run, roles):
    for name in ("vit_tiny_patch16_224", str(run)):
        first, shown = load_backbone(name, random=True, seed=1)
        again, other = (load_backbone(name, random=True, seed=seed)[0] for seed in (1, 2))
        same(first, again.state_dict())
        key = "blocks.0.attn.qkv.weight"
        assert not torch.equal(first.state_dict()[key], other.state_dict()[key])
        assert not torch.equal(first.state_dict()[key], roles["target"][key]) and shown.endswith("random")


def test_what_names_no_backbone(tmp_path, hub):
    (tmp_path / "empty").mkdir()
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong" / "config.json").write_text(json.dumps({"architecture": "no_such_model"}))
    for name, says in {
        "vit_tniy_patch16_224": "neither a model of timm nor a path that exists, maybe vit_tiny_patch16_224",
        "dseq_jepa_vit_ti16": "has no published weights.* --random true for fresh ones",
        str(tmp_path / "empty"): "holds no backbone",
        str(tmp_path / "wrong"): "cannot be made",
    }.items():
        with pytest.raises(UserError, match=says) as error:
            load_backbone(name)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="cannot be made"):
        load_backbone("vit_tiny_patch16_224", 33, random=True, no_such=1)


def test_weights_inside_a_folder_are_opened_with_what_the_folder_says(run, exported, roles, tmp_path):
    for folder in (exported, run / "checkpoints" / "step-00000006"):
        whole, name = load_backbone(str(folder))
        model, same_name = load_backbone(str(folder / "model.safetensors"))
        same(model, roles["target"])
        assert (data_config(model), same_name) == (data_config(whole), name)
    (tmp_path / "alone").mkdir()
    save_file(roles["target"], tmp_path / "alone" / "model.safetensors")
    model, name = load_backbone(str(tmp_path / "alone" / "model.safetensors"))
    assert data_config(model) == data_config(whole) and name == "alone/model.safetensors"


def test_a_folder_of_checkpoints_is_its_run(run):
    assert load_backbone(str(run / "checkpoints"))[1] == "run, step-00000006"


def test_a_damaged_export_is_told_in_one_line(exported, tmp_path):
    folder = tmp_path / "run" / "export"
    shutil.copytree(exported, folder)
    assert load_backbone(str(folder))[1] == "run/export"
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:100000])
    with pytest.raises(UserError, match=r"the weights of .*export cannot be read .*copy or export them again"):
        load_backbone(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is no JSON"):
        load_backbone(str(folder))


def test_fresh_weights_have_no_licence_of_others():
    model, _ = load_backbone("test_vit", random=True)
    assert timm.get_pretrained_cfg("test_vit").license and "license" not in model.pretrained_cfg


def test_weights_of_a_run_have_no_licence_of_published_ones(run, exported):
    stated = load_backbone(str(exported))[0].pretrained_cfg.get("license")
    assert load_backbone(str(exported / "model.safetensors"))[0].pretrained_cfg.get("license") == stated
    assert "license" not in load_backbone(str(run))[0].pretrained_cfg
