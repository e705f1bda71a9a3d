"""Every kind of name opens the same weights, and what names no model is refused in one line."""

import io
import json
import os
import shutil
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from timm_dseq import UserError
from timm_dseq.hub.load import NAMES, data_config, load_backbone
from timm_dseq.hub.weights import sha256

from .. import layouts
from ..train import TRAIN


def same(model, weights):
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


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


def files_of(folder, **model_args):
    """The files of a folder ready for the Hub, its description changed."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    config = json.loads(files["config.json"])
    config["model_args"].update(model_args)
    return {**files, "config.json": json.dumps(config).encode()}


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"depth": 10**9}, "depth=1000000000: give a whole number from 1 to 1000"),
        ({"img_size": [160_000, 160_000]}, r"img_size=\[160000, 160000\]: give a whole number"),
        ({"img_size": 16_000}, r"config.json describes 19[\d,]+ weights, and model.safetensors has 2[\d,]+ bytes only"),
        ({"mlp_ratio": 1e6}, "config.json describes .* weights, and model.safetensors has"),
        ({"reg_tokens": 10**12}, "reg_tokens=1000000000000: give a whole number"),
        ({"checkpoint_path": "foreign.pth"}, "checkpoint_path is no argument of a model"),
        ({"pretrained": True}, "pretrained is no argument of a model"),
        ({"cache_dir": "/tmp"}, "cache_dir is no argument of a model"),
    ],
)
def test_a_model_far_larger_than_its_weights_is_refused_before_memory_is_taken(exported, hub, tmp_path, args, says):
    files = files_of(exported, **args)
    hub.add_repo("org/name", files)
    (tmp_path / "folder").mkdir()
    for name, content in files.items():
        (tmp_path / "folder" / name).write_bytes(content)
    for name in ("hf-hub:org/name", str(tmp_path / "folder")):
        with pytest.raises(UserError, match=says):
            load_backbone(name)


def test_of_a_repository_only_safetensors_are_read(exported, hub):
    files = files_of(exported)
    weights = load_file(exported / "model.safetensors")
    file = io.BytesIO()
    torch.save(weights, file)
    del files["model.safetensors"]
    hub.add_repo("org/pickled", {**files, "pytorch_model.bin": file.getvalue()})
    with pytest.raises(UserError, match=r"model\.safetensors of org/pickled: the repository has no such file"):
        load_backbone("hf-hub:org/pickled")
    assert not any("pytorch_model.bin" in path for _, path in hub.requests)
    assert load_backbone("hf-hub:org/pickled", random=True)


def test_other_architectures_of_a_repository_load_as_before(hub, tmp_path):
    model = timm.create_model("test_resnet", num_classes=7)
    timm.models.save_for_hf(model, tmp_path, model_config={"num_classes": 7}, safe_serialization=True)
    hub.add_repo("org/resnet", {path.name: path.read_bytes() for path in tmp_path.iterdir()})
    same(load_backbone("hf-hub:org/resnet", num_classes=7)[0], model.state_dict())


def test_a_run_gives_the_target_encoder_of_its_newest_whole_checkpoint(training_run, roles):
    model, name = load_backbone(str(training_run))
    same(model, roles["target"])
    assert name == "run, step-00000006"
    (training_run / "checkpoints" / "step-00000006" / "model.safetensors").write_bytes(b"cut off")
    assert load_backbone(str(training_run))[1] == "run, step-00000003"
    assert load_backbone(str(training_run / "checkpoints" / "step-00000003"))[1] == "run, step-00000003"
    with pytest.raises(UserError, match=r"step-00000006: model\.safetensors has 7 bytes"):
        load_backbone(str(training_run / "checkpoints" / "step-00000006"))


def test_a_file_of_weights(tmp_path, roles):
    path = layouts.save_training(tmp_path / "weights.safetensors", **roles)
    same(load_backbone(str(path))[0], roles["target"])
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    same(load_backbone(str(tmp_path / "plain.safetensors"))[0], plain.state_dict())


def test_another_size_resamples_the_positions(training_run, roles):
    model, _ = load_backbone(str(training_run), 96)
    assert data_config(model)["input_size"] == (3, 96, 96)
    assert torch.equal(model.blocks[0].attn.qkv.weight, roles["target"]["blocks.0.attn.qkv.weight"])
    assert model(torch.zeros(1, 3, 96, 96)).shape == (1, 192)
    assert data_config(load_backbone("resnet18", 96, random=True)[0])["input_size"] == (3, 96, 96)


def test_a_head_is_there_only_when_it_is_asked_for(training_run, exported):
    for name in (str(training_run), str(exported)):
        assert load_backbone(name)[0].num_classes == 0
        assert load_backbone(name, num_classes=7)[0](torch.zeros(1, 3, 224, 224)).shape == (1, 7)


def test_random_weights_are_those_of_the_seed(training_run, roles):
    for name in ("vit_tiny_patch16_224", str(training_run)):
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
        "vit_smal_patch16_224.augreg_in1k": "neither a model .*, maybe vit_small_patch16_224 or ",
        "vit_small_patch16_224.dino_": "has no published weights, maybe vit_small_patch16_224.dino",
        "lab/x": "neither a model .*; a repository of the Hub is named hf-hub:lab/x",
        "local-dir:nowhere": "nowhere is no folder: name one that timm-dseq convert has written",
        "hf-hub:alone/a/b": "hf-hub:alone/a/b is no repository of the Hub: write ORGANISATION/NAME",
        "dseq_jepa_vit_s16": "has no published weights.* --random true for fresh ones",
        str(tmp_path / "empty"): "holds no backbone",
        str(tmp_path / "wrong"): "cannot be made",
    }.items():
        with pytest.raises(UserError, match=says) as error:
            load_backbone(name)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="cannot be made"):
        load_backbone("vit_tiny_patch16_224", 33, random=True, no_such=1)


def test_weights_inside_a_folder_are_opened_with_what_the_folder_says(training_run, exported, roles, tmp_path):
    for folder in (exported, training_run / "checkpoints" / "step-00000006"):
        whole, name = load_backbone(str(folder))
        model, same_name = load_backbone(str(folder / "model.safetensors"))
        same(model, roles["target"])
        assert (data_config(model), same_name) == (data_config(whole), name)
    (tmp_path / "alone").mkdir()
    save_file(roles["target"], tmp_path / "alone" / "model.safetensors")
    model, name = load_backbone(str(tmp_path / "alone" / "model.safetensors"))
    assert data_config(model) == data_config(whole) and name == "alone/model.safetensors (3 heads assumed)"


def test_a_checkpoint_of_another_program_is_refused(training_run):
    step = training_run / "checkpoints" / "step-00000006"
    state, manifest = (json.loads((step / name).read_text()) for name in ("state.json", "manifest.json"))
    state["config"]["model"] = "vit_tiny_patch16_224"  # as finetune.py writes it
    (step / "state.json").write_text(json.dumps(state))
    manifest["state.json"] = {"size": (step / "state.json").stat().st_size, "sha256": sha256(step / "state.json")}
    (step / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"step-00000006 is no checkpoint of pretrain\.py: .*export"):
        load_backbone(str(step))


@pytest.mark.slow  # a process each
@pytest.mark.parametrize("program", ["timm_dseq.cli explain", "probe", "finetune"])
def test_every_command_names_what_it_takes_in_the_same_words(program):
    command = [sys.executable, "-m", *program.split(), "--help"]
    said = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(TRAIN)}).stdout
    assert NAMES in " ".join(said.split()), said


def test_a_folder_of_checkpoints_is_its_run(training_run):
    assert load_backbone(str(training_run / "checkpoints"))[1] == "run, step-00000006"


def test_a_damaged_export_is_told_in_one_line(exported, tmp_path):
    folder = tmp_path / "run" / "export"
    shutil.copytree(exported, folder)
    assert load_backbone(str(folder))[1] == "run/export"
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:100000])
    with pytest.raises(UserError, match=r"export/model\.safetensors"):
        load_backbone(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is no config of timm"):
        load_backbone(str(folder))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_before_any_work(value, exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "folder")
    weights = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    weights["blocks.1.mlp.fc1.bias"][3] = value
    save_file(weights, folder / "model.safetensors")
    save_file(weights, tmp_path / "weights.safetensors")
    for name in (folder, tmp_path / "weights.safetensors"):
        with pytest.raises(UserError, match=rf"{name} holds numbers that are not finite, in blocks.1.mlp.fc1.bias"):
            load_backbone(str(name))
        load_backbone(str(name), random=True)


def test_fresh_weights_have_no_licence_of_others():
    model, _ = load_backbone("test_vit", random=True)
    assert timm.get_pretrained_cfg("test_vit").license and "license" not in model.pretrained_cfg


def test_weights_of_a_run_have_no_licence_of_published_ones(training_run, exported):
    stated = load_backbone(str(exported))[0].pretrained_cfg.get("license")
    assert load_backbone(str(exported / "model.safetensors"))[0].pretrained_cfg.get("license") == stated
    assert "license" not in load_backbone(str(training_run))[0].pretrained_cfg


def test_a_file_in_a_home_folder_is_named_without_whose_it_is(roles, tmp_path, monkeypatch):
    home = tmp_path / "alice"
    (home / "weights").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    for file, name in [
        (home / "mine.safetensors", "mine.safetensors"),
        (home / "weights" / "w.safetensors", "weights/w.safetensors"),
    ]:
        save_file(roles["target"], file)
        assert load_backbone(str(file))[1] == f"{name} (3 heads assumed)"
