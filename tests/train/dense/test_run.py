"""One training run for any dense task, tried on the smallest one: predict each patch's mean brightness."""

import json
import random
import time
from types import SimpleNamespace

import pytest
import torch

from ..runs import (
    assert_same_run,
    environments,
    finished,
    killed_until_it_ends,
    launch,
    log_of,
    tensors_of,
    wait_for_steps,
    words,
)

pytestmark = pytest.mark.xdist_group("dense")


TINY = {"optim.batch_size": 8, "optim.epochs": 5, "optim.drop_path": 0.2, "checkpoint.every": 3, "workers": 0}


def start(output, environment=None, **settings):
    arguments = words({**TINY, "output_dir": output}, settings)
    return launch("tests.train.dense.brightness", arguments, output, environment)


def train(output, processes=1, port=0, **settings):
    places = environments(port, processes) if processes > 1 else [{}]
    codes, said = finished([start(output, place, **settings) for place in places], output)
    assert codes == [0] * processes, said
    return said


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "run"
    train(tmp_path_factory.mktemp("first") / "run", max_steps=1)  # the first one waits for imports
    begun = time.monotonic()
    said = train(output, eval_every=7)
    return SimpleNamespace(output=output, said=said, seconds=time.monotonic() - begun)


def test_a_run_learns_and_its_log_holds_the_parts_and_the_evaluations(whole):
    log = log_of(whole.output)
    assert [line["step"] for line in log] == list(range(1, 21))
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    assert [line["step"] for line in log if "error" in line] == [7, 14]
    assert all(line["loss"] == pytest.approx(line["squares"] + line["nothing"]) for line in log)
    assert "brightness, 20 steps of 8 images, from the start" in whole.said


def test_a_killed_run_ends_bit_for_bit_like_the_whole_one(whole, tmp_path):
    output = tmp_path / "run"
    least, most = 0.3 * whole.seconds, 0.9 * whole.seconds
    assert killed_until_it_ends(lambda: start(output, eval_every=7), random.Random(0), least, most)
    assert_same_run(output, whole.output)


def test_a_signal_saves_and_the_same_command_goes_on(whole, tmp_path):
    output = tmp_path / "run"
    process = start(output, eval_every=7)
    wait_for_steps(process, output, 4)
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
