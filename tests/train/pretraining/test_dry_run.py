"""A dry run measures what a run will take: warmed up, at both ends, and at its largest."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from common.pretraining import dry_run as module
from common.pretraining.dry_run import dry_run, equal_regions
from common.pretraining.schedule import at
from common.pretraining.settings import Config
from common.run.length import TIMED, WARM, Length, duration

from timm_dseq import plan_regions

from ..runs import assert_same_run, start, train, train_together, wait_for_steps

# Of a run of 12 s, whatever optim.epochs says.
MINUTES = {"minutes": 0.2, "optim.epochs": 600, "optim.warmup_epochs": 600, "watch.probe_every": 0}


class Clock:
    """Time passes in steps only: long ones while it warms up."""

    def __init__(self):
        self.now, self.steps, self.lambdas = 0.0, 0, []

    def step(self, _, now):
        self.steps += 1
        self.lambdas.append(now.regions)
        warming = (self.steps - 1) % (WARM + TIMED) < WARM
        self.now += 100.0 if warming else (2.0 if now.regions < 0.5 else 4.0)


def dry_run_of(monkeypatch, with_regions):
    """A dry run in which nothing is computed: its clock, and what it said."""
    clock, said = Clock(), []
    optim = SimpleNamespace(
        **{"warmup_epochs": 1, "lr_start": 0.1, "lr": 1.0, "lr_end": 0.0, "weight_decay": 0, "weight_decay_end": 0},
        **{"momentum": 0.9, "momentum_end": 1.0, "regions": 0.0, "regions_end": 1.0},
    )
    training = SimpleNamespace(
        config=SimpleNamespace(optim=optim, minutes=None),
        accelerator=SimpleNamespace(device=torch.device("cpu")),
        model=SimpleNamespace(region_options={"num_regions": 5}, with_regions=with_regions),
        step=clock.step,
    )
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(module, "largest", lambda *_: 3 * 2**10)
    dry_run(training, None, 800, Length(1200, 8, 8), SimpleNamespace(say=said.append))
    return clock, said


def test_warming_up_is_not_counted_and_both_ends_are_measured(monkeypatch):
    clock, said = dry_run_of(monkeypatch, True)
    assert clock.lambdas[0] == 0 and clock.lambdas[-1] > 0.99
    assert "start of the run (lambda 0.00): 2 s a step, 4 images/s" in said[0]
    assert "end of the run (lambda 1.00): 4 s a step, 2 images/s" in said[1]
    assert "3.0 GiB" in said[2] and "1200 steps would take about 60 min" in said[2]


def test_without_regions_nothing_is_said_of_them(monkeypatch):
    _, said = dry_run_of(monkeypatch, False)
    assert not any(word in line for line in said for word in ("lambda", "region"))
    assert "start of the run: 2 s a step" in said[0] and "1200 steps would take about" in said[-1]


def test_the_largest_plan_has_every_region_in_every_image():
    regions = equal_regions((6, 9), 5, 3, torch.device("cpu"))
    assert (regions.masks.sum(1) == 1).all() and regions.area.max() - regions.area.min() <= 1
    plan = plan_regions(regions)
    assert len(plan.targets) == 3 * 4
    assert plan.sizes[0].tolist() == regions.area[:, :4].cumsum(1).flatten().tolist()


@pytest.mark.xdist_group("runs")
def test_a_dry_run_tells_speed_memory_and_time_and_writes_nothing(tmp_path):
    code, said = train(tmp_path / "run", dry_run="true")
    assert code == 0, said
    assert (
        len(re.findall(r"dry run, (?:start|end) of the run .* s a step, \d+ images/s, [\d.]+ GiB at most", said)) == 2
    )
    assert "equal regions in all images it would take" in said and "the whole run of 20 steps would take about" in said
    assert not (tmp_path / "run").exists()


def test_a_duration_is_told_in_the_unit_of_a_person():
    assert [duration(s) for s in (42, 99, 100, 5999, 6000, 360_000)] == [
        "42 s",
        "99 s",
        "2 min",
        "100 min",
        "1.7 h",
        "100.0 h",
    ]


@pytest.mark.xdist_group("runs")
def test_minutes_are_steps_that_are_chosen_once_and_a_killed_run_keeps_them(tmp_path):
    process = start(tmp_path / "run", checkpoint__keep=100, **MINUTES)
    wait_for_steps(process, tmp_path / "run", 4)
    process.kill()
    process.join()
    first = tmp_path / "run" / "checkpoints" / "step-00000003"
    steps = json.loads((first / "state.json").read_text())["done"]["chosen"]["steps"]
    assert steps > 4
    shutil.copytree(tmp_path / "run", tmp_path / "copy")  # which nothing disturbs any more
    process = start(tmp_path / "run", checkpoint__keep=100, **MINUTES)
    wait_for_steps(process, tmp_path / "run", min(9, steps))
    process.kill()
    process.join()
    for name in ("run", "copy"):
        code, said = train(tmp_path / name, checkpoint__keep=100, **MINUTES)
        assert code == 0 and f"0.2 minutes are {steps} steps, {8 * steps / 8192:.3g} epochs: as the run began" in said
        assert json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[-1])["step"] == steps
    assert_same_run(tmp_path / "run", tmp_path / "copy")
    code, said = train(tmp_path / "run", **{**MINUTES, "minutes": 0.3})
    assert code == 1 and "minutes was 0.2 in" in said and "and is 0.3 now" in said


@pytest.mark.slow
@pytest.mark.xdist_group("runs")
def test_minutes_are_the_same_steps_for_all_processes(tmp_path):
    codes, said = train_together(tmp_path / "run", 29517, **MINUTES)
    assert codes == [0, 0], said
    assert said.count("0.2 minutes are ") == 1


def test_the_warm_up_of_some_minutes_is_a_tenth_of_them_at_most():
    config = Config(minutes=3.0)
    config.optim.warmup_epochs = 15
    assert at(config, 100, 1000, 1000).lr == pytest.approx(config.optim.lr)
    assert at(config, 50, 1000, 1000).lr == pytest.approx((config.optim.lr + config.optim.lr_start) / 2)
    config.minutes = None
    assert at(config, 100, 1000, 100_000).lr < config.optim.lr / 2


@pytest.mark.xdist_group("runs")
def test_minutes_that_are_over_before_the_first_step_are_refused(tmp_path):
    code, said = train(tmp_path / "run", **{**MINUTES, "minutes": 0.001})
    assert code == 1 and "minutes=0.001 is over before the first step (" in said
    assert not (tmp_path / "run" / "checkpoints").exists()
