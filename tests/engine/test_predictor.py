"""The predictor by itself: its shape, its start, and that each prediction is a set by itself."""

import pytest
import torch

from timm_dseq.engine.jepa import DSeqJEPA
from timm_dseq.engine.plans import Plan
from timm_dseq.engine.predictor import Predictor
from timm_dseq.errors import UserError
from timm_dseq.positions import sincos_positions

from ..tiny import encoder


def inputs(seed=0):
    """Two contexts of one image each, three predictions, and the encoded tokens where the slots say."""
    generator = torch.Generator().manual_seed(seed)
    contexts = torch.zeros(2, 12, dtype=torch.bool)
    contexts[0, :4] = contexts[1, 2:9] = True
    targets = torch.zeros(3, 12, dtype=torch.bool)
    targets[0, 4:6] = targets[1, 8:] = targets[2, :2] = True
    plan = Plan(contexts, torch.arange(2), targets, torch.tensor([0, 0, 1]), torch.tensor([1, 2, 1]))
    slots = torch.arange(24).view(2, 12)
    return torch.randn(24, 16, generator=generator), slots, plan


def predictor(**kwargs):
    torch.manual_seed(0)
    model = Predictor((3, 4), 16, 2, **{"width": 8, "depth": 2, **kwargs})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_predictions_come_in_the_order_of_the_targets():
    model = predictor()
    tokens, slots, plan = inputs()
    out, layout = model(tokens, slots, plan)
    assert out.shape == (8, 16) and 0 < layout.fill <= 1 and layout.sizes.tolist() == [4 + 2, 4 + 4, 7 + 2]
    for p, rows in enumerate(([0, 1], [2, 3, 4, 5], [6, 7])):
        context = plan.target_context[p : p + 1]
        alone = Plan(plan.contexts[context], plan.context_image[context], plan.targets[p : p + 1], context * 0, context)
        torch.testing.assert_close(model(tokens, slots[context], alone)[0], out[rows], rtol=1e-4, atol=1e-5)


def test_moving_the_encoded_tokens_changes_nothing():
    model = predictor()
    tokens, slots, plan = inputs()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    moved, where = torch.empty_like(tokens), order[slots]
    moved[order] = tokens
    torch.testing.assert_close(model(moved, where, plan)[0], model(tokens, slots, plan)[0])


def test_positions_are_fixed_and_not_in_the_weights():
    model = predictor()
    assert torch.equal(model.positions, sincos_positions((3, 4), 8))
    assert not any("positions" in name for name in [*model.state_dict(), *dict(model.named_parameters())])


@pytest.mark.parametrize(("depth", "expected"), [(12, 6), (24, 12), (32, 12)])
def test_depth_and_heads_follow_the_encoder(depth, expected):
    vit = encoder(depth=depth, embed_dim=24, num_heads=3)
    model = DSeqJEPA(vit).predictor
    assert len(model.blocks) == expected and model.width == 384
    assert all(block.attn.num_heads == 3 for block in model.blocks)


def test_a_width_the_heads_do_not_divide_is_named():
    with pytest.raises(UserError, match="predictor_width=20"):
        Predictor((3, 4), 16, 3, width=20)
