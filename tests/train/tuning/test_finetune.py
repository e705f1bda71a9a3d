"""Fine-tuning runs: killed ones, dealt ones and repeated ones end alike, and what the user can mend is one line."""

import json
import random
import time
from functools import partial

import pytest
import torch

from ..runs import assert_same_export, assert_same_run, killed_until_it_ends, log_of, tensors_of, wait_for_steps
from ..tunings import colours, start, tune, tune_together

pytestmark = pytest.mark.xdist_group("tunings")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run that nobody disturbed, with everything on, and how long it took."""
    tune(tmp_path_factory.mktemp("first") / "run", data, max_steps=1)  # the first one waits for imports
    output = tmp_path_factory.mktemp("whole") / "run"
    begun = time.monotonic()
    code, said = tune(output, data, optim__ema=0.9)
    assert code == 0, said
    return output, time.monotonic() - begun


def test_the_run_is_the_size_the_kills_need_and_it_learns(whole):
    log = log_of(whole[0] / "seed-0")
    assert [line["step"] for line in log] == list(range(1, 21))
    assert log[-1]["loss"] < log[0]["loss"]
    assert any(name.startswith("model: ema.") for name in tensors_of(whole[0] / "seed-0"))


@pytest.mark.slow
def test_labels_that_say_nothing_give_chance_and_true_ones_more(tmp_path):
    accuracy = {}
    for shuffled in (False, True):
        data = colours(tmp_path / f"{shuffled}", test=150, shuffled=shuffled)
        code, said = tune(tmp_path / f"{shuffled}-run" / "run", data, augment__rand_augment="null", optim__epochs=5)
        assert code == 0, said
        (line,) = (tmp_path / f"{shuffled}-run" / "results.jsonl").read_text().splitlines()
        accuracy[shuffled] = json.loads(line)["accuracy"]
    four_deviations = 4 * 100 * (1 / 3 * 2 / 3 / 150) ** 0.5
    assert abs(accuracy[True] - 100 / 3) < four_deviations < accuracy[False] - 100 / 3, accuracy


def test_killed_runs_end_bit_for_bit_like_the_whole_one(whole, data, tmp_path):
    kills = 0
    for seed in range(2):
        output, draw = tmp_path / f"run{seed}", random.Random(seed)
        begin = partial(start, output, data, optim__ema=0.9)
        kills += killed_until_it_ends(begin, draw, 0.2 * whole[1], whole[1])
        assert_same_run(output / "seed-0", whole[0] / "seed-0")
        assert_same_export(output, whole[0])
    assert kills


def test_a_signal_ends_behind_a_step_saves_and_exits_with_75(whole, data, tmp_path):
    output = tmp_path / "run"
    process = start(output, data, optim__ema=0.9)
    wait_for_steps(process, output / "seed-0", 4)
    process.terminate()
    process.join(60)
    assert process.exitcode == 75
    code, said = tune(output, data, optim__ema=0.9)
    assert code == 0, said
    assert "going on after step" in said
    assert_same_run(output / "seed-0", whole[0] / "seed-0")
    assert_same_export(output, whole[0])


WAYS = {
    "two processes": {"together": 2},
    "two rounds": {"optim__accumulation": 2},
    "two processes, two rounds": {"together": 2, "optim__accumulation": 2},
    "activations computed again": {"system__checkpointing": "true"},
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_how_a_batch_is_dealt_changes_nothing(way, whole, data, tmp_path, unused_port):
    settings = {"optim__ema": 0.9, **WAYS[way]}
    output = tmp_path / "run"
    if settings.pop("together", 0):
        codes, said = tune_together(output, data, unused_port, **settings)
        assert codes == [0, 0], said
    else:
        code, said = tune(output, data, **settings)
        assert code == 0, said
    for line, other in zip(log_of(output / "seed-0"), log_of(whole[0] / "seed-0"), strict=True):
        assert (line["step"], line["samples"], line["lr"]) == (other["step"], other["samples"], other["lr"])
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert line["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-4)
    ours, theirs = tensors_of(output / "seed-0"), tensors_of(whole[0] / "seed-0")
    for name in theirs:
        if name.startswith("model: "):
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-5, msg=name)
