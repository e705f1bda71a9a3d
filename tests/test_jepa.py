"""The engine equals the slow reference, and nothing flows where the plan does not let it."""

import pytest
import torch

from . import reference
from .tiny import PLANS, SHAPES, batch, jepa, plan

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
OBJECTIVES = ("dseq", "dseq_causal", "ijepa")


def gradients(model, value):
    model.zero_grad(set_to_none=True)
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same_gradients(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name in ours:
        scale = max(1.0, float(theirs[name].abs().max()))
        assert (ours[name] - theirs[name]).abs().max() <= tolerance * scale, name


def check_predictions(model, images, a_plan, tolerance):
    ours = model.predict(images, a_plan)
    theirs = reference.predict_plan(model, images, a_plan)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * max(1.0, float(theirs.abs().max()))
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=ours.dtype) / len(ours)
    assert_same_gradients(
        gradients(model, (ours * weights).sum()), gradients(model, (theirs * weights).sum()), tolerance
    )


def check_loss(model, inputs, tolerance):
    loss, facts = model(*inputs)
    theirs = reference.step(model, *inputs)
    assert abs(loss.item() - theirs.item()) <= tolerance * max(1.0, abs(theirs.item()))
    assert_same_gradients(gradients(model, loss), gradients(model, theirs), tolerance)
    return facts


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float64"])
def test_predictions_and_gradients_equal_the_reference_for_random_plans(kind, shape, dtype):
    model = jepa(img_size=SHAPES[shape], dtype=dtype)
    images, _, _ = batch(4, SHAPES[shape], dtype)
    for seed in range(3):
        check_predictions(model, images, plan(kind, 4, model.student.patch_embed.grid_size, seed), TOLERANCE[dtype])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("loss", ["token", "step"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float64"])
def test_loss_and_gradients_equal_the_reference(objective, loss, shape, dtype):
    model = jepa(objective, SHAPES[shape], dtype, loss=loss)
    facts = check_loss(model, batch(5, SHAPES[shape], dtype), TOLERANCE[dtype])
    assert (facts["region_share"] > 0) == (objective != "ijepa")  # both kinds were in the batch


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_contrastive_term_equals_the_reference(objective):
    model = jepa(objective, dtype=torch.float64, contrastive=True)
    check_loss(model, batch(5, dtype=torch.float64), 1e-10)


@pytest.mark.parametrize(
    "encoder_args",
    [{"reg_tokens": 2}, {"class_token": False}, {"no_embed_class": False}, {"pre_norm": True}, {"init_values": 0.5}],
    ids=str,
)
def test_every_plain_vit_equals_the_reference(encoder_args):
    model = jepa(encoder_args=encoder_args, dtype=torch.float64, query="norm")
    images, _, _ = batch(3, dtype=torch.float64)
    check_predictions(model, images, plan("causal", 3, (6, 6)), 1e-10)


def test_first_causal_step_equals_the_paper_form():
    model = jepa(dtype=torch.float64)
    images, _, _ = batch(4, dtype=torch.float64)
    plain, causal = plan("regions", 4, (6, 6)), plan("causal", 4, (6, 6))
    assert torch.equal(plain.targets, causal.targets)
    first = (plain.step == 1)[plain.targets.nonzero()[:, 0]]
    ours, theirs = (model.predict(images, p)[first] for p in (plain, causal))
    assert len(ours) > 0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
