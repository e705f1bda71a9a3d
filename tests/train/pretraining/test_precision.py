"""How it is computed: precision and recomputed activations in a whole run, streams in several processes."""

import json

import pytest
import torch
from accelerate import Accelerator
from common.pretraining import precision
from common.pretraining.model import build
from common.pretraining.settings import parse
from common.pretraining.training import Training
from timm.layers import Attention

from ...tiny import jepa
from ..run.test_resume import STREAM, shards
from ..runs import log_of, options, tensors_of, train, train_together

pytestmark = pytest.mark.xdist_group("runs")


def test_recomputed_activations_change_no_bit_and_bf16_little(tmp_path):
    settings = {"max_steps": 6, "watch__probe_every": 0}
    logs = {}
    for name, how in {
        "plain": {},
        "recomputed": {"system__checkpointing": "true"},
        "bf16": {"system__precision": "bf16"},
    }.items():
        code, said = train(tmp_path / name, **settings, **how)
        assert code == 0, said
        logs[name] = log_of(tmp_path / name)
    assert logs["recomputed"] == logs["plain"]
    for line, other in zip(logs["bf16"], logs["plain"], strict=True):
        assert line["loss"] != other["loss"]
        assert line["loss"] == pytest.approx(other["loss"], rel=0.05)


def test_bf16_goes_on_bit_for_bit_on_one_cpu(tmp_path):
    settings = {"system__precision": "bf16", "watch__probe_every": 0}
    for name, steps in (("whole", 12), ("parts", 5), ("parts", 12)):
        code, said = train(tmp_path / name, max_steps=steps, **settings)
        assert code == 0, said
    ours, theirs = (tensors_of(tmp_path / name) for name in ("parts", "whole"))
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
    assert not [name for name in theirs if not torch.equal(ours[name], theirs[name])]


def test_what_auto_became_stays_for_the_whole_run(tmp_path):
    """A run that goes on does not measure again: another result would change its precision in the middle."""
    settings = {"system__precision": "auto", "watch__probe_every": 0}
    code, said = train(tmp_path / "run", max_steps=3, **settings)
    assert code == 0 and "times the speed of float32 here" in said, said
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    became = json.loads((checkpoint / "state.json").read_text())["done"]["chosen"]["precision"]
    assert became in ("no", "bf16")
    code, said = train(tmp_path / "run", max_steps=4, **settings)
    assert code == 0 and f"precision {became} as the run began" in said, said


@pytest.mark.parametrize(("gain", "found"), [(1.05, "no"), (1.3, "bf16")])
def test_auto_takes_bf16_on_a_cpu_that_gains_by_it(gain, found, monkeypatch):
    monkeypatch.setattr(precision, "_gain_on_a_cpu", lambda *_: gain)
    name, why = precision.chosen("auto", jepa(), 48, torch.device("cpu"))
    assert name == found and f"{gain:.2f} times" in why
    assert precision.chosen("no", jepa(), 48, torch.device("cpu"))[0] == "no"  # what is asked for is not measured


def test_the_measurement_leaves_the_model_as_it_was():
    model, before = jepa(), jepa().state_dict()
    assert precision._gain_on_a_cpu(model, 48) > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.fused_attn for module in model.modules() if isinstance(module, Attention))


def test_bf16_on_a_cpu_has_explicit_attention_and_float32_has_not(tmp_path):
    for name, explicit in (("bf16", True), ("no", False)):
        config, _ = parse(options(tmp_path, system__precision=name))
        accelerator = Accelerator(cpu=True)
        training = Training(build(config), config, precision.Precision(name, accelerator.device), accelerator)
        attention = [module for module in training.model.modules() if isinstance(module, Attention)]
        assert attention and all(module.fused_attn is not explicit for module in attention)


@pytest.mark.slow
def test_two_processes_go_on_in_their_streams_and_no_other_number_may(tmp_path, unused_port):
    (tmp_path / "shards").mkdir()
    settings = {**STREAM, "data__path": shards(tmp_path / "shards")}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for output, steps in ((whole, 18), (parts, 7)):
        codes, said = train_together(output, unused_port, max_steps=steps, **settings)
        assert codes == [0, 0], said
    code, said = train(parts, **settings)
    assert code == 1 and "goes on with the processes it began with: take 2" in said
    codes, said = train_together(parts, unused_port, **settings)
    assert codes == [0, 0], said
    assert log_of(parts) == log_of(whole)
    assert len(log_of(parts)) == 18
