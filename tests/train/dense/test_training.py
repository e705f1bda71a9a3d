"""One training run for any dense task, tried on the smallest one: predict each patch's mean brightness."""

import json
import random
import time
from types import SimpleNamespace

import pytest
import torch
from common.dense.backbone import DenseBackbone
from common.dense.layer_decay import layer_groups
from common.dense.settings import Optim
from timm.optim import param_groups_layer_decay
from torch import nn

from ..runs import environments, launch, log_of, said_of, tensors_of
from .test_backbone import vit

pytestmark = pytest.mark.xdist_group("dense")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.neck = nn.Conv2d(192, 8, 1)
        self.body = DenseBackbone(vit(depth=4), [3])


def test_layer_decay_is_timms_for_the_vit_and_leaves_the_rest_at_full_rate():
    model = Model()
    optim = Optim(layer_decay=0.5, weight_decay=0.3)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ours = {
        names[id(parameter)]: (group["lr_scale"], group["weight_decay"])
        for group in layer_groups(model, optim)
        for parameter in group["params"]
    }
    assert ours.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    plain = vit(depth=4, num_classes=3)  # whose head stands for what is built on the ViT
    own = {id(parameter): name for name, parameter in plain.named_parameters()}
    groups = param_groups_layer_decay(plain, 0.3, plain.no_weight_decay(), layer_decay=0.5)
    timms = {
        own[id(parameter)]: (group["lr_scale"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }
    for name, wanted in ours.items():
        if name.startswith("body.vit."):
            assert wanted == timms[name.removeprefix("body.vit.")], name
        else:
            assert wanted == (1.0, 0.3 if name.endswith("weight") else 0.0)
    assert ours["body.vit.patch_embed.proj.weight"] == (0.5**5, 0.3)


def test_the_learning_rate_warms_up_and_falls_at_the_drops_along_a_cosine_or_a_line():
    step = Optim(lr=1.0, warmup_epochs=1, drops=[0.5, 0.75])
    rates = [step.learning_rate(samples, 10, 100) for samples in (0, 5, 10, 49, 50, 74, 75, 99)]
    assert rates == pytest.approx([0, 0.5, 1, 1, 0.1, 0.1, 0.01, 0.01])
    cosine = Optim(lr=1.0, warmup_epochs=1, schedule="cosine", lr_end=0.2)
    rates = [cosine.learning_rate(samples, 10, 110) for samples in (5, 10, 60, 110)]
    assert rates == pytest.approx([0.5, 1, 0.6, 0.2])
    line = Optim(lr=1.0, warmup_epochs=1, schedule="linear", lr_end=0.2)
    rates = [line.learning_rate(samples, 10, 110) for samples in (5, 10, 35, 60, 110)]
    assert rates == pytest.approx([0.5, 1, 0.8, 0.6, 0.2])


TINY = {"optim.batch_size": 8, "optim.epochs": 5, "optim.drop_path": 0.2, "checkpoint.every": 3, "workers": 0}


def options(output, **settings):
    chosen = {**TINY, "output_dir": output, **{name.replace("__", "."): value for name, value in settings.items()}}
    return [f"--{name}={value}" for name, value in chosen.items()]


def train(output, processes=1, port=0, **settings):
    places = environments(port, processes) if processes > 1 else [{}]
    runs = [launch("tests.train.dense.brightness", options(output, **settings), output, place) for place in places]
    for run in runs:
        run.join(300)
    assert [run.exitcode for run in runs] == [0] * processes, said_of(output).read_text()
    return said_of(output).read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "run"
    train(tmp_path_factory.mktemp("first") / "run", max_steps=1)  # the first one waits for imports
    begun = time.monotonic()
    said = train(output, eval_every=7)
    return SimpleNamespace(output=output, said=said, seconds=time.monotonic() - begun)


def assert_same_run(output, other):
    ours, theirs = tensors_of(output), tensors_of(other)
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert log_of(output) == log_of(other)


def test_a_run_learns_and_its_log_holds_the_parts_and_the_evaluations(whole):
    log = log_of(whole.output)
    assert [line["step"] for line in log] == list(range(1, 21))
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    assert [line["step"] for line in log if "error" in line] == [7, 14]
    assert all(line["loss"] == pytest.approx(line["squares"] + line["nothing"]) for line in log)
    assert "brightness, 20 steps of 8 images, from the start" in whole.said


def test_a_killed_run_ends_bit_for_bit_like_the_whole_one(whole, tmp_path):
    kills, draw, output = 0, random.Random(0), tmp_path / "run"
    while True:
        process = launch("tests.train.dense.brightness", options(output, eval_every=7), output)
        process.join(draw.uniform(0.3, 0.9) * whole.seconds)
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        kills += 1
    assert process.exitcode == 0 and kills
    assert_same_run(output, whole.output)


def test_a_signal_saves_and_the_same_command_goes_on(whole, tmp_path):
    output = tmp_path / "run"
    process = launch("tests.train.dense.brightness", options(output, eval_every=7), output)
    while not (output / "log.jsonl").exists() or len((output / "log.jsonl").read_text().splitlines()) < 4:
        time.sleep(0.01)
    process.terminate()
    process.join(60)
    assert process.exitcode == 75
    assert "going on after step" in train(output, eval_every=7)
    assert_same_run(output, whole.output)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["two processes", "two rounds", "checkpointing"])
def test_how_a_batch_is_dealt_changes_nothing(way, whole, tmp_path, unused_port):
    ways = {
        "two processes": {"processes": 2, "port": unused_port},
        "two rounds": {"optim__accumulation": 2},
        "checkpointing": {"system__checkpointing": "true"},
    }
    train(tmp_path / "run", eval_every=7, **ways[way])
    for line, other in zip(log_of(tmp_path / "run"), log_of(whole.output), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4), line["step"]
        assert line.get("error", 0) == pytest.approx(other.get("error", 0), rel=1e-3)
    ours, theirs = tensors_of(tmp_path / "run"), tensors_of(whole.output)
    for name in theirs:
        if name.startswith("model: "):
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-4, msg=name)


def test_a_dry_run_says_how_long_it_takes_and_writes_nothing(tmp_path):
    said = train(tmp_path / "run", dry_run="true")
    assert "the whole run of 20 steps would take about" in said
    assert not (tmp_path / "run").exists()


def test_bf16_trains(tmp_path):
    train(tmp_path / "run", system__precision="bf16", max_steps=3)
    assert json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])["loss"] < 10
