"""Damaged files of weights at every door."""

import json
import os
import pickle
import struct

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save, save_file

from ..train.tunings import colours
from . import doors

pytestmark = pytest.mark.xdist_group("runs")


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    args = {"class_token": True, "no_embed_class": True, "global_pool": "avg", "fc_norm": False, "num_classes": 0}
    return timm.create_model("vit_tiny_patch16_224", patch_size=8, depth=2, img_size=48, **args).state_dict()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return colours(tmp_path_factory.mktemp("colours") / "data")


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.new("RGB", (64, 64), (200, 30, 30)).save(path)
    return path


class Bomb:
    def __reduce__(self):
        return (open, ("executed", "w"))


def torch_file(content):
    return lambda path, weights: torch.save(content(weights) if callable(content) else content, path)


def raw(content):
    return lambda path, weights: path.write_bytes(content)


def without(weights, name):
    return {key: tensor for key, tensor in weights.items() if key != name}


HEADER = struct.pack("<Q", 10)
# name → (its end, how it is made)
DAMAGES = {
    "empty": (".safetensors", raw(b"")),
    "text": (".safetensors", raw(b"hello, these are no weights")),
    "zeros": (".safetensors", raw(bytes(1000))),
    "a header without end": (".safetensors", raw(struct.pack("<Q", 2**60) + b"{}")),
    "a header that is no JSON": (".safetensors", raw(HEADER + b"{{{{{{{{{{")),
    "brackets": (".safetensors", raw(struct.pack("<Q", 50_000) + b"[" * 50_000)),
    "cut short": (".safetensors", lambda path, weights: path.write_bytes(save(weights)[:-100])),
    "offsets beyond": (
        ".safetensors",
        raw(struct.pack("<Q", 60) + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'.ljust(60)),
    ),
    "no ViT": (".safetensors", lambda path, weights: save_file({"fc.weight": torch.zeros(3, 3)}, path)),
    "no tensors": (".safetensors", lambda path, weights: save_file({}, path)),
    "a tensor too few": (".safetensors", lambda path, weights: save_file(without(weights, "norm.weight"), path)),
    "a tensor too many": (".safetensors", lambda path, weights: save_file({**weights, "x": torch.zeros(1)}, path)),
    "another shape": (".safetensors", lambda path, w: save_file({**w, "norm.weight": torch.zeros(7)}, path)),
    "a pickle that runs": (".pth", lambda path, weights: path.write_bytes(pickle.dumps(Bomb()))),
    "a torch file that runs": (".pth", torch_file(lambda weights: {"state_dict": weights, "x": Bomb()})),
    "a byte of pickle": (".pth", raw(b"\x80")),
    "half a zip": (".pth", raw(b"PK\x03\x04" + bytes(50))),
    "a list": (".pth", torch_file([1, 2])),
    "a number for a name": (".pth", torch_file({3: torch.zeros(2)})),
    "None for a name": (".pth", torch_file({None: torch.zeros(2)})),
    "words for tensors": (".pth", torch_file({"norm.weight": "no"})),
    "whole numbers": (".safetensors", lambda path, w: save_file({**w, "norm.weight": w["norm.weight"].char()}, path)),
    "a sparse tensor": (".pth", torch_file(lambda w: {**w, "norm.weight": torch.zeros(192).to_sparse()})),
}
DOORS = ["convert", "probe", *(pytest.param(door, marks=pytest.mark.slow) for door in ("explain", "init", "finetune"))]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_and_runs_nothing(damage, door, weights, data, photo, tmp_path):
    end, make = DAMAGES[damage]
    file = tmp_path / f"theirs{end}"
    make(file, {name: tensor.clone() for name, tensor in weights.items()})
    doors.refused(enter(door, file, tmp_path, data, photo), *(["theirs"] if damage not in UNNAMED else []))
    assert not (tmp_path / "executed").exists()
    left = {path.name for path in tmp_path.iterdir()} - {file.name, "said.out", "said.err"}
    assert left <= {"cache"}, left


# here the line names the tensor, and the file only if the tensor could be another one's
UNNAMED = {*DAMAGES} - {"empty", "text", "zeros", "cut short", "half a zip", "a byte of pickle"}


@pytest.mark.parametrize("door", DOORS)
def test_a_whole_file_is_taken(door, weights, data, photo, tmp_path):
    """The control case."""
    save_file({name: tensor.clone() for name, tensor in weights.items()}, tmp_path / "ours.safetensors")
    code, out, err = enter(door, tmp_path / "ours.safetensors", tmp_path, data, photo)
    assert code == 0, out + err


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("place", ["nothing", "a folder", "a pipe", "a link to nowhere", "a name of 300 letters"])
def test_a_place_without_weights_is_named(place, door, data, photo, tmp_path):
    file = tmp_path / ("x" * 300 if place == "a name of 300 letters" else "theirs.safetensors")
    if place == "a folder":
        file.mkdir()
    elif place == "a pipe":
        os.mkfifo(file)
    elif place == "a link to nowhere":
        file.symlink_to(tmp_path / "nowhere")
    doors.refused(enter(door, file, tmp_path, data, photo), "xxx" if place.startswith("a name") else "theirs")


CONFIGS = {
    "no JSON": "{",
    "a list": "[]",
    "no architecture": json.dumps({"num_classes": 0}),
    "a number for the architecture": json.dumps({"architecture": 7, "num_classes": 0, "pretrained_cfg": {}}),
    "an architecture that is none": json.dumps({"architecture": "resnet51", "num_classes": 0, "pretrained_cfg": {}}),
    "arguments that are null": json.dumps({"architecture": "vit_tiny_patch16_224", "model_args": None}),
    "arguments that are a list": json.dumps({"architecture": "vit_tiny_patch16_224", "model_args": [1]}),
    "a configuration that is text": json.dumps({"architecture": "vit_tiny_patch16_224", "pretrained_cfg": "x"}),
    "brackets without end": "[" * 200_000,
    "bytes": "\x80\x81",
}


@pytest.mark.parametrize("door", ["explain", "probe", "finetune", "verify"])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_folder_whose_config_says_nonsense_is_named(config, door, weights, data, photo, tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir()
    save_file({name: tensor.clone() for name, tensor in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_bytes(CONFIGS[config].encode("latin-1"))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    if door == "verify":
        code, _, err = doors.enter("timm_dseq.cli", ["verify", folder], tmp_path)
        assert code == 1 and "Traceback" not in err and "a fault of ours" not in err, err
    else:
        doors.refused(enter(door, folder, tmp_path, data, photo))


def enter(door, file, folder, data, photo):
    more = {"explain": [photo], "probe": [data], "finetune": [data]}.get(door, [])
    return doors.enter(*getattr(doors, door)(file, folder, *more), folder)
