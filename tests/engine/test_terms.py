"""Terms that are added to the prediction's loss: by name, with a factor, from one dict."""

from functools import partial

import pytest
import torch
from torch import nn

from timm_dseq import UserError
from timm_dseq.engine.terms import TERMS
from timm_dseq.engine.terms.vicreg import Contrastive

from ..tiny import batch, jepa, mean_loss
from .test_jepa import OBJECTIVES, check_loss, gradients

INPUTS = batch(5, dtype=torch.float64)


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """The published projector is 3072 wide."""
    monkeypatch.setitem(TERMS, "contrastive", partial(Contrastive, width=16))


class Length(nn.Module):
    """A term as short as one can be."""

    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, predicted, target, plan, shape):
        return (self.scale * (predicted - target)).square().mean()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_contrastive_term_equals_the_reference(objective):
    check_loss(jepa(objective, dtype=torch.float64, contrastive=True), INPUTS, 1e-10)


def test_contrastive_is_short_for_the_term_with_factor_1():
    short, long, twice = (
        jepa(dtype=torch.float64, **kwargs)
        for kwargs in ({"contrastive": True}, {"terms": {"contrastive": 1.0}}, {"terms": {"contrastive": 2.0}})
    )
    assert torch.equal(mean_loss(short, *INPUTS), mean_loss(long, *INPUTS))
    check_loss(twice, INPUTS, 1e-10)
    losses = [model(*INPUTS)[2]["losses"] for model in (short, twice)]
    assert losses[1]["contrastive"] == 2 * losses[0]["contrastive"] > 0
    assert losses[1]["prediction"] == losses[0]["prediction"]


def test_checkpoints_hold_a_term_under_its_name():
    names = {name for name in jepa(contrastive=True).state_dict() if not name.startswith(("student", "target", "pred"))}
    assert names == {f"contrastive.projector.{i}.weight" for i in (0, 2, 4)}


def test_a_new_term_is_a_class_and_a_line_in_the_dict(monkeypatch):
    monkeypatch.setitem(TERMS, "length", Length)
    plain, model = jepa(dtype=torch.float64), jepa(dtype=torch.float64, terms={"length": 0.3})
    plain.load_state_dict(model.state_dict(), strict=False)
    loss, count, facts = model(*INPUTS)
    before = mean_loss(plain, *INPUTS)
    assert facts["losses"]["length"] > 0 and facts["losses"]["prediction"].item() == pytest.approx(before.item())
    assert (loss / count).item() == pytest.approx((before + facts["losses"]["length"]).item())
    ours, theirs = gradients(model, loss), gradients(plain, before * count)
    assert ours["length.scale"].abs().max() > 0
    assert all((ours[name] - theirs[name]).abs().max() > 0 for name in theirs if "predictor.project" in name)


def test_a_loss_of_ones_own_is_a_pair_of_its_factor_and_a_function():
    plain, ours = jepa(), jepa(terms={"small": (0.5, lambda predicted, target, plan, shape: predicted.square().mean())})
    images, _, blocks = batch()
    before, count, _ = plain(images, None, blocks)
    loss, _, facts = ours(images, None, blocks)
    added = facts["losses"]["small"]
    assert added > 0
    torch.testing.assert_close(loss, before + count * added)
    loss.backward()
    assert all(p.grad is not None for p in ours.predictor.parameters())


def test_a_module_of_ones_own_is_trained_and_saved_with_the_model():
    class Head(torch.nn.Module):
        def __init__(self, width):
            super().__init__()
            self.linear = torch.nn.Linear(width, 1)

        def forward(self, predicted, target, plan, shape):
            return self.linear(predicted - target).square().mean()

    model = jepa(terms={"head": (1.0, Head(jepa().student.embed_dim))})
    images, _, blocks = batch()
    model(images, None, blocks)[0].backward()
    assert model.head.linear.weight.grad.abs().sum() > 0 and "head.linear.weight" in model.state_dict()


@pytest.mark.parametrize(
    ("terms", "says"),
    [
        ({"mine": 1.0}, "'mine' is unknown: choose from contrastive, or give"),
        ({"mine": (1.0,)}, "give its factor and a function"),
        ({"mine": ("x", len)}, "the factor of 'mine'='x': give a number above 0"),
        ({"contrastive": float("nan")}, "the factor of 'contrastive'=nan: give a number above 0"),
        ("contrastive", "terms='contrastive': give a mapping"),
        (["contrastive"], "give a mapping"),
        ({"student": (1.0, len)}, "'student' is no free name"),
        ({"a b": (1.0, len)}, "'a b' is no free name"),
    ],
)
def test_terms_that_are_none(terms, says):
    with pytest.raises(UserError, match=says):
        jepa(terms=terms)
