"""Whole runs on a GPU: in a group of one process, by DDP and by FSDP2, and gone on with from a checkpoint."""

import os

import pytest
import torch
from common.pretraining.model import build
from common.pretraining.settings import parse

from ..train.runs import FORKS, log_of, options, said_of, start, tensors_of
from .devices import DEVICES, one_of_one, placed

pytestmark = pytest.mark.xdist_group("runs")
RUN = {"watch__probe_every": 0, "system__compile": "false", "optim__lr": 1e-4}
STEPS = 8
# float32 with products in TF32, and gradients that are added in another order each time
SAME = {"cpu": 1e-6, "cuda": 5e-3}


def run(output, environment, steps=STEPS, **settings):
    """A run to its end: what is in its log."""
    process = start(output, environment, max_steps=steps, **{**RUN, **settings})
    process.join(120)
    assert process.exitcode == 0, said_of(output).read_text()
    assert (output / "export" / "model.safetensors").is_file()
    return log_of(output)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """An undisturbed run on a device, made once."""
    outputs = {}

    def of(device):
        if device not in outputs:
            outputs[device] = tmp_path_factory.mktemp("alone") / "run"
            run(outputs[device], placed(device))
        return outputs[device]

    return of


def check_same(ours, theirs, device):
    assert len(ours) == len(theirs) == STEPS
    for line, other in zip(ours, theirs, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=SAME[device])
        assert line["samples"] == other["samples"]


def _say_whole(arguments, environment, file):
    """What the model is wrapped in, in a group of processes."""
    os.environ |= environment
    from common.pretraining.training import wrap
    from common.system import launch

    config, _ = parse(arguments)
    file.write_text(type(wrap(build(config), config, launch.accelerator())).__name__)


@pytest.mark.parametrize(("fsdp", "kind"), [("false", "DistributedDataParallel"), ("true", "FSDPDSeqJEPA")])
def test_a_group_of_one_is_wrapped_as_any_other(fsdp, kind, tmp_path, unused_port):
    """A question of settings, not of the device."""
    arguments, file = options(tmp_path, system__fsdp=fsdp), tmp_path / "kind"
    process = FORKS.Process(target=_say_whole, args=(arguments, one_of_one("cpu", unused_port), file))
    process.start()
    process.join(60)
    assert file.read_text() == kind


@pytest.mark.parametrize("device", DEVICES)
def test_a_group_of_one_learns_what_no_group_does(device, alone, tmp_path, unused_port):
    for name, settings in {"ddp": {}, "fsdp": {"system__fsdp": "true"}}.items():
        ours = run(tmp_path / name, one_of_one(device, unused_port), **settings)
        check_same(ours, log_of(alone(device)), device)


@pytest.mark.parametrize("device", DEVICES)
def test_a_run_goes_on_where_it_was(device, alone, tmp_path):
    run(tmp_path / "parts", placed(device), steps=3)
    check_same(run(tmp_path / "parts", placed(device)), log_of(alone(device)), device)
    ours, theirs = tensors_of(tmp_path / "parts"), tensors_of(alone(device))
    assert ours.keys() == theirs.keys()
    loose = {"rtol": 0.05, "atol": 2e-3} if device == "cuda" else {"rtol": 0, "atol": 0}
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], msg=name, **loose)
