"""Attention is chosen by a measurement, and never where it computes something else."""

import time

import pytest
import torch
import torch.nn.attention.varlen
from common.pretraining import attention
from common.pretraining.attention import choose_attention, fastest
from common.pretraining.precision import Precision

from ...engine.test_attention import attend_in_turn
from ...tiny import jepa

CPU = torch.device("cpu")


def slow(*args):
    time.sleep(0.05)
    return attend_in_turn(*args)


def broken(*_):
    raise RuntimeError("no kernel image is available\nand more")


def chosen(monkeypatch, kernel, clock=None):
    """What is chosen with this kernel on a CPU, where the clock, if given, decides."""
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", kernel)
    if clock:
        monkeypatch.setattr(attention.time, "perf_counter", clock)
    model = jepa()
    said = fastest(model, Precision("bf16", CPU), 4)
    return model.varlen, model.predictor.varlen, said


def test_the_faster_one_is_taken(monkeypatch):
    assert chosen(monkeypatch, slow)[:2] == (False, False)
    # by this clock each measurement takes half as long as the one before
    moments = iter([t for run in range(3) for _ in range(attention.ROUNDS) for t in (0.0, 0.5**run)])
    assert chosen(monkeypatch, attend_in_turn, lambda: next(moments))[:2] == (True, True)


def test_a_kernel_that_fails_is_not_taken(monkeypatch):
    encoder, predictor, said = chosen(monkeypatch, broken)
    assert not encoder and not predictor
    assert "no kernel image is available" in said and "\n" not in said


@pytest.mark.parametrize("wrong", [lambda v: v * 2, lambda v: v * float("nan")], ids=["twice", "nan"])
def test_a_kernel_that_computes_something_else_is_not_taken_and_said(wrong, monkeypatch):
    encoder, predictor, said = chosen(monkeypatch, lambda q, k, v, *_: wrong(v))
    assert not encoder and not predictor and said.count("its kernel is wrong here") == 2


def test_on_a_cpu_and_in_float32_there_is_nothing_to_choose(monkeypatch):
    monkeypatch.setattr(attention, "fastest", broken)
    for precision in (Precision("bf16", CPU), Precision("no", torch.device("cuda"))):
        assert choose_attention(jepa(), precision, 4) == "rows under a mask"
