"""Nonsense among the arguments of timm.create_model, at the three programs that take them: refused before any work."""

import json
import os

import pytest

from ..train.runs import TINY
from ..train.tunings import colours
from . import doors

pytestmark = pytest.mark.xdist_group("faults")

# What makes no model at all, wherever it is given.
NONSENSE = {
    "no patch": {"patch_size": 0},
    "a patch below 0": {"patch_size": -8},
    "a patch larger than the image": {"patch_size": 4096},
    "a patch of an infinite size": {"patch_size": 1e300},
    "a patch beyond 64 bits": {"patch_size": 10**23},
    "a patch that is a word": {"patch_size": "eight"},
    "a patch that is a list": {"patch_size": [8, 8, 8]},
    "no list of patches": {"patch_size": []},
    "no heads": {"num_heads": 0},
    "heads below 0": {"num_heads": -3},
    "heads that do not divide the width": {"num_heads": 5},
    "half a head": {"num_heads": 1.5},
    "no blocks": {"depth": 0},
    "blocks below 0": {"depth": -1},
    "blocks without end": {"depth": 10**7},
    "blocks that are a word": {"depth": "deep"},
    "no width": {"embed_dim": 0},
    "a width below 0": {"embed_dim": -1},
    "a width beyond all memory": {"embed_dim": 3 * 2**40},
    "a width that is a word": {"embed_dim": "wide"},
    "an MLP below 0": {"mlp_ratio": -4},
    "an MLP that is a word": {"mlp_ratio": "x"},
    "a norm that is none": {"norm_layer": "nope"},
    "a norm that is a number": {"norm_layer": 7},
    "an activation that is none": {"act_layer": "nope"},
    "a pooling that is none": {"global_pool": "nope"},
    "an argument that is none": {"moons": 3},
    "a drop rate of 2": {"drop_rate": 2},
    "a drop rate below 0": {"proj_drop_rate": -1},
    "a path drop rate of a word": {"drop_path_rate": "x"},
    "a checkpoint that is not there": {"checkpoint_path": "nowhere.pth"},
    "a checkpoint that is a folder": {"checkpoint_path": "."},
    "a configuration that is text": {"pretrained_cfg": "x"},
    "a configuration that is a list": {"pretrained_cfg": [1]},
    "an overlay that is text": {"pretrained_cfg_overlay": "x"},
    "weights in the model's arguments": {"pretrained": True},
    "registers below 0": {"reg_tokens": -4},
    "no channels": {"in_chans": 0},
    "channels below 0": {"in_chans": -3},
    "one channel": {"in_chans": 1},
    "an image without pixels": {"img_size": 0},
    "a name in the model's arguments": {"model_name": "resnet18"},
    "an initialisation that is none": {"weight_init": "nope"},
    "positions that are none": {"pos_embed": "nope"},
    "a class that runs something": {"norm_layer": {"class_path": "subprocess.Popen", "init_args": {"args": "touch x"}}},
    "a name that is none in Python": {"a b": 1},
    "an empty name": {"": 1},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return colours(tmp_path_factory.mktemp("colours") / "data", train=12, test=6)


def pretrain(args, folder, data):
    own = json.loads(TINY["model.args"])
    return doors.pretrain(folder, model__args=json.dumps({**own, **args}))


def probe(args, folder, data):
    return doors.probe("vit_tiny_patch16_224", folder, data, random="true", args=json.dumps({"depth": 2, **args}))


def finetune(args, folder, data):
    return doors.finetune("vit_tiny_patch16_224", folder, data, random="true", args=json.dumps({"depth": 2, **args}))


@pytest.mark.parametrize(
    "door", [pretrain, *(pytest.param(door, marks=pytest.mark.slow) for door in (probe, finetune))]
)
@pytest.mark.parametrize("case", NONSENSE)
def test_nonsense_in_the_models_arguments_is_refused(case, door, data, tmp_path):
    before = {*os.listdir(tmp_path)}
    found = doors.enter(*door(NONSENSE[case], tmp_path, data), tmp_path)
    doors.refused(found)
    argument = next(iter(NONSENSE[case])).partition("_")[0]
    assert "model" in found[2] or argument in found[2], found[2]
    assert {*os.listdir(tmp_path)} - before <= {"said.out", "said.err"}


@pytest.mark.parametrize("door", [pretrain, probe, finetune])
def test_sense_is_taken(door, data, tmp_path):
    """The control case."""
    code, out, err = doors.enter(*door({"patch_size": 8, "num_heads": 6}, tmp_path, data), tmp_path)
    assert code == 0, out + err
