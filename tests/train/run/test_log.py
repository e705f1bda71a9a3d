"""The log has one line a step, in order, whatever was repeated or cut off, and ends a run that learns nothing."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from common.run.log import StepLog, records
from common.run.resume import Progress
from common.system.screen import Screen

from timm_dseq import UserError


class Log(StepLog):
    """A log of losses and of a fact."""

    shown = {"fact": "fact {:d}"}  # noqa: RUF012

    def line(self, step, sums, counts):
        return {"loss": sums[0] / counts["images"], "fact": step.facts}

    def advice(self, step):
        return f"look at step {step.number}"


@pytest.fixture
def log(tmp_path):
    def make(progress=None, **settings):
        optim = SimpleNamespace(max_skipped=2)
        config = SimpleNamespace(**{"output_dir": tmp_path / "run", "dry_run": False, "optim": optim, **settings})
        return Log(config, Accelerator(cpu=True), progress or Progress(), Screen(9, 0, shown=True, seconds=0))

    return make


def step(log, fact=0, loss=8.0, norm=1.0, stop=False):
    log.progress.step += 1
    log.progress.samples += 4
    log.push(fact, torch.tensor([loss]), {"images": 4}, torch.tensor(norm), stop)


def lines(tmp_path):
    return records(tmp_path / "run" / "log.jsonl")


def test_a_line_is_written_when_the_next_step_has_been_taken_or_when_it_is_asked_for(log, tmp_path, capsys):
    log = log()
    step(log, 7)
    assert lines(tmp_path) == [] and log.numbers.tolist() == [1.0, 8.0]
    step(log, 8)
    assert [line["fact"] for line in lines(tmp_path)] == [7]
    log.flush({"more": 1})
    log.flush({"more": 2})  # no step is pending
    first, second = lines(tmp_path)
    assert (first["step"], first["samples"], first["loss"], first["gradient_norm"]) == (1, 4, 2.0, 1.0)
    assert (second["step"], second["fact"], second["more"]) == (2, 8, 1) and "more" not in first
    assert "step 1/9  loss 2.0000  fact 7  " in capsys.readouterr().out


def test_steps_that_are_repeated_have_one_line_each(log, tmp_path):
    first = log()
    for fact in range(4):
        step(first, fact)
    first.flush()
    with (tmp_path / "run" / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "fa')  # cut off by a kill
    again = log(Progress(step=2, samples=8))
    for fact in (12, 13):
        step(again, fact)
    again.flush()
    assert [(line["step"], line["fact"]) for line in lines(tmp_path)] == [(1, 0), (2, 1), (3, 12), (4, 13)]


def test_steps_that_are_not_finite_are_counted_in_a_row_and_end_the_run(log, tmp_path):
    log, nan = log(), float("nan")
    for norm in (nan, 1.0, nan):
        step(log, loss=nan if norm is nan else 8.0, norm=norm)
    log.flush()
    assert [line["skipped"] for line in lines(tmp_path)] == [True, False, True] and log.progress.skipped == 1
    assert [line["loss"] for line in lines(tmp_path)] == [None, 2.0, None]
    step(log, norm=nan)
    with pytest.raises(UserError, match="not finite for 2 steps in a row: look at step 4, or go on from an earlier"):
        log.flush()
    json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])


def test_a_run_of_fewer_steps_none_of_which_was_finite_is_no_success(log):
    log, nan = log(optim=SimpleNamespace(max_skipped=20)), float("nan")
    with pytest.raises(UserError, match="not finite for 9 steps in a row"):
        for _ in range(9):
            step(log, norm=nan)
        log.flush()
    assert log.progress.step == 9


def test_a_stop_is_seen_with_the_line_of_its_step(log):
    log = log()
    step(log, stop=True)
    assert not log.stopping
    log.flush()
    assert log.stopping


def test_a_dry_run_leaves_no_log(log, tmp_path):
    log = log(dry_run=True)
    step(log)
    log.flush()
    assert not (tmp_path / "run").exists()
