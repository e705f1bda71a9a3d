"""Schedules equal their closed forms at every step, and continue over a resume."""

import math

import pytest
from common.pretraining import schedule
from common.pretraining.settings import Config, Optim

from .. import runs

PAPER = Optim(epochs=600, batch_size=2048, lr_start=1e-4, lr=1e-3, lr_end=1e-6, warmup_epochs=15)
EPOCH, TOTAL = 1_281_167, 600 * 1_281_167


def test_the_papers_schedules_at_every_epoch():
    for epoch in range(601):
        now = schedule.at(Config(optim=PAPER), epoch * EPOCH, EPOCH, TOTAL)
        if epoch <= 15:
            lr = 1e-4 + (1e-3 - 1e-4) * epoch / 15
        else:
            lr = 1e-6 + (1e-3 - 1e-6) * 0.5 * (1 + math.cos(math.pi * (epoch - 15) / 585))
        assert now.lr == pytest.approx(lr, rel=1e-12)
        assert now.weight_decay == pytest.approx(0.4 - 0.36 * 0.5 * (1 + math.cos(math.pi * epoch / 600)), rel=1e-12)
        assert now.momentum == pytest.approx(0.996 + 0.004 * epoch / 600, rel=1e-12)
        assert now.regions == pytest.approx(epoch / 600, abs=1e-15)


def test_beyond_the_end_nothing_moves():
    end, beyond = (schedule.at(Config(optim=PAPER), samples, EPOCH, TOTAL) for samples in (TOTAL, 2 * TOTAL))
    assert end == beyond
    assert end.momentum == 1.0 and end.regions == 1.0


def test_the_log_of_a_run_follows_the_schedules(tmp_path):
    code, said = runs.train(tmp_path / "run", checkpoint__every=100, max_steps=4, optim__regions=0.0)
    assert code == 0, said
    code, said = runs.train(tmp_path / "run", checkpoint__every=100, optim__regions=0.0)
    assert code == 0, said
    lines = runs.log_of(tmp_path / "run")
    settings = Config(optim=Optim(epochs=0.02, batch_size=8, warmup_epochs=0.005, momentum=0.9))
    assert [line["step"] for line in lines] == list(range(1, 21))
    for line in lines:
        now = schedule.at(settings, (line["step"] - 1) * 8, 8192, 160)
        assert (line["lr"], line["weight_decay"]) == (now.lr, now.weight_decay)
        assert (line["momentum"], line["lambda"]) == (now.momentum, now.regions)
