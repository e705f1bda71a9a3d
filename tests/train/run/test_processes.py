"""How a batch is dealt to processes, shards and accumulation rounds does not change what is learned."""

import pytest
import torch

from ..runs import log_of, tensors_of, train, train_together

SETTINGS = {
    "dseq": {},
    "causal, by step": {"model__objective": "dseq_causal", "model__loss": "step", "optim__clip": 0.5},
}
PLAIN = {"system__precision": "float64", "watch__probe_every": 0}
WAYS = {
    "two processes": {"together": 2},
    "two processes, FSDP2": {"together": 2, "system__fsdp": "true"},
    "four rounds": {"optim__accumulation": 4},
    "two processes, two rounds": {"together": 2, "optim__accumulation": 2},
    "two processes, two rounds, FSDP2": {"together": 2, "optim__accumulation": 2, "system__fsdp": "true"},
}
SAME = ("step", "samples", "lr", "weight_decay", "momentum", "lambda", "region_counts", "region_share", "broken")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Each setting by one process in one round."""
    outputs = {}
    for name, settings in SETTINGS.items():
        outputs[name] = tmp_path_factory.mktemp("alone") / "run"
        code, said = train(outputs[name], **PLAIN, **settings)
        assert code == 0, said
    return outputs


# One that holds most of them; the rest takes two minutes more.
EVERY = [(setting, way) for setting in SETTINGS for way in WAYS]
LONGER = [pair for pair in EVERY if pair != ("dseq", "two processes, two rounds")]


@pytest.mark.xdist_group("runs")
@pytest.mark.parametrize(
    ("setting", "way"),
    [pytest.param(*pair, marks=[pytest.mark.slow] * (pair in LONGER)) for pair in EVERY],
)
def test_how_a_batch_is_dealt_changes_nothing(setting, way, alone, tmp_path, unused_port):
    settings = {**PLAIN, **SETTINGS[setting], **WAYS[way]}
    output = tmp_path / "run"
    if processes := settings.pop("together", 0):
        codes, said = train_together(output, unused_port, processes, **settings)
        assert codes == [0] * processes, said
    else:
        code, said = train(output, **settings)
        assert code == 0, said
    ours, theirs = log_of(output), log_of(alone[setting])
    assert len(ours) == len(theirs) == 20
    for line, other in zip(ours, theirs, strict=True):
        assert {name: line[name] for name in SAME} == {name: other[name] for name in SAME}
        assert abs(line["loss"] - other["loss"]) <= 1e-9 * abs(other["loss"])
    ours, theirs = tensors_of(output), tensors_of(alone[setting])
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.xdist_group("runs")
@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        # the term couples images, so rounds of a step are apart; processes are not
        pytest.param(
            {"model__contrastive": "true", "system__precision": "float64", "max_steps": 4},
            1e-9,
            marks=pytest.mark.slow,  # the projector is 3072 wide: tests/test_distributed.py has a narrow one
        ),
        pytest.param(
            {"model__objective": "views", "model__views": 3, "system__precision": "float64"},
            1e-9,
            marks=pytest.mark.slow,
        ),
        ({"optim__regions": 0.0, "optim__regions_end": 0.0}, 1e-5),
        ({}, 1e-5),
    ],
    ids=["contrastive", "views", "float32, blocks", "float32, regions"],
)
def test_two_processes_have_the_losses_of_one(settings, tolerance, tmp_path, unused_port):
    settings = {"watch__probe_every": 0, **settings}
    code, said = train(tmp_path / "alone", **settings)
    assert code == 0, said
    codes, said = train_together(tmp_path / "together", unused_port, **settings)
    assert codes == [0, 0], said
    ours, theirs = log_of(tmp_path / "together"), log_of(tmp_path / "alone")
    assert len(ours) == len(theirs) == settings.get("max_steps", 20)
    for line, other in zip(ours, theirs, strict=True):
        assert line["region_counts"] == other["region_counts"]
        assert line["loss"] == pytest.approx(other["loss"], rel=tolerance)
