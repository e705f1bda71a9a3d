"""One optimiser step: what it leaves out, divides and limits."""

import itertools

import pytest
import torch
from accelerate import Accelerator
from common.pretraining import schedule
from common.pretraining.model import build
from common.pretraining.precision import Precision
from common.pretraining.settings import parse
from common.pretraining.training import Training
from torch import nn

from ..runs import options


class Spoilt(nn.Module):
    """The model, whose loss is not finite in the calls that are named."""

    def __init__(self, model, value, *calls):
        super().__init__()
        self.model, self.value, self.bad, self.call = model, value, calls, itertools.count()

    def forward(self, *args, **kwargs):
        loss, count, facts = self.model(*args, **kwargs)
        return (loss * self.value if next(self.call) in self.bad else loss), count, facts


def steps(tmp_path, count, spoil=lambda model: model, **settings):
    """So many steps of a tiny run: the model, its optimiser, and the weights and moments behind each."""
    config, _ = parse(options(tmp_path, **settings))
    accelerator = Accelerator(cpu=True)
    model = build(config)
    training = Training(model, config, Precision("no", accelerator.device), accelerator)
    training.wrapped, optimizer = spoil(model), training.optimizer
    draw = torch.Generator().manual_seed(0)
    seen = []
    for step in range(count):
        rounds = config.optim.accumulation
        batches = iter(
            [
                (
                    {"images": torch.randint(0, 256, (8 // rounds, 3, 48, 48), generator=draw, dtype=torch.uint8)},
                    torch.tensor([[0, 8 * step + i] for i in range(8 // rounds)]),
                    [],
                )
                for _ in range(rounds)
            ]
        )
        now = schedule.at(config, 8 * step, 8192, 160)
        figures = training.step(batches, now)
        weights = {name: tensor.clone() for name, tensor in model.named_parameters() if not name.startswith("target.")}
        moments = [
            {key: value.clone() for key, value in optimizer.state[p].items()}
            for p in model.parameters()
            if p in optimizer.state
        ]
        seen.append((figures, weights, moments))
    return seen


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_that_is_not_finite_changes_nothing_and_the_next_one_counts(tmp_path, value, accumulation):
    calls = (accumulation,) if accumulation == 1 else (3,)  # of the second step, the last round
    seen = steps(tmp_path, 3, lambda model: Spoilt(model, value, *calls), optim__accumulation=accumulation)
    (_, before, moments_before), (bad, after, moments_after), (good, behind, moments_behind) = seen
    assert not bad.gradient_norm.isfinite() and good.gradient_norm.isfinite()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(not torch.equal(after[name], behind[name]) for name in after)
    for first, second, third in zip(moments_before, moments_after, moments_behind, strict=True):
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert third["step"] == first["step"] + 1  # it was not counted either
        assert all(tensor.isfinite().all() for tensor in third.values())


def test_gradients_are_limited_by_their_norm_over_all_parameters(tmp_path):
    """AdamW's first moment after one step is 0.1 of the gradient it was given."""

    def norm(moments):
        return torch.stack([10 * m["exp_avg"].norm() for m in moments]).norm().item()

    ((free, _, moments),) = steps(tmp_path, 1)
    whole = free.gradient_norm.item()
    assert norm(moments) == pytest.approx(whole, rel=1e-4)
    limit = whole / 3
    ((_, _, limited),) = steps(tmp_path, 1, optim__clip=limit)
    assert norm(limited) == pytest.approx(limit, rel=1e-3)
    ((_, _, far),) = steps(tmp_path, 1, optim__clip=10 * whole)
    assert norm(far) == pytest.approx(whole, rel=1e-4)
