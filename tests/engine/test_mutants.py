"""Each defect of the released code that could live here is brought back, and the checks that guard against it fail."""

import pytest
import torch

import timm_dseq.engine.curriculum
import timm_dseq.engine.predictor
from timm_dseq.engine.plans import Plan, plan_blocks
from timm_dseq.engine.predictor import Predictor
from timm_dseq.engine.target_blocks import Blocks

from ..tiny import batch, jepa, plan
from .test_jepa import check_flow, check_loss, check_mask_token_learns, check_one_region_trains_the_encoder
from .test_plans import check_blocks_plan, check_sequence


def fails(check, *args):
    with pytest.raises(AssertionError):
        check(*args)


def test_inverted_predictor_mask_is_caught(monkeypatch):
    model, inputs = jepa(), batch(5)
    check_loss(model, inputs, 1e-5)
    right = timm_dseq.engine.predictor.attention_rule
    monkeypatch.setattr(timm_dseq.engine.predictor, "attention_rule", lambda *args: ~right(*args))
    fails(check_flow, model, inputs[0], plan("regions", 5, (6, 6)))
    fails(check_loss, model, inputs, 1e-5)


def test_predictor_blind_to_its_context_is_caught(monkeypatch):
    model, images = jepa(), batch(3)[0]
    check_one_region_trains_the_encoder(model, images)
    forward = Predictor.forward

    def blind(self, tokens, slots, a_plan):
        return forward(self, torch.zeros_like(tokens) * tokens, slots, a_plan)

    monkeypatch.setattr(Predictor, "forward", blind)
    fails(check_one_region_trains_the_encoder, model, images)


def lagging(regions, *args, **kwargs):
    """R1, R1, R1 ∪ R2, … where R1, R1 ∪ R2, … belong."""
    right = plan(*regions) if isinstance(regions, tuple) else RIGHT(regions, *args, **kwargs)
    rows = list(range(len(right.contexts)))
    lagged = [
        max(i - 1, 0) if int(right.context_image[max(i - 1, 0)]) == int(right.context_image[i]) else i for i in rows
    ]
    return Plan(right.contexts[lagged], right.context_image, right.targets, right.target_context, right.step)


RIGHT = timm_dseq.engine.curriculum.plan_regions


def test_lagging_context_is_caught(monkeypatch):
    model, inputs = jepa(), batch(5)
    check_loss(model, inputs, 1e-5)
    check_sequence(plan("regions", 5, (6, 6)))
    fails(check_sequence, lagging(("regions", 5, (6, 6))))
    monkeypatch.setattr(timm_dseq.engine.curriculum, "plan_regions", lagging)
    fails(check_loss, model, inputs, 1e-5)


def test_transposed_block_masks_are_caught(monkeypatch):
    model, inputs = jepa("ijepa"), batch(5)
    check_loss(model, inputs, 1e-5)
    blocks = inputs[2]
    check_blocks_plan(plan_blocks(blocks), blocks)

    def transposed(masks, *args):
        return plan_blocks(Blocks(masks.context, masks.targets.mT, masks.seeds), *args)

    fails(check_blocks_plan, transposed(blocks), blocks)
    monkeypatch.setattr(timm_dseq.engine.curriculum, "plan_blocks", transposed)
    fails(check_loss, model, inputs, 1e-5)


def test_unused_mask_token_is_caught(monkeypatch):
    model, inputs = jepa(), batch(3)
    check_mask_token_learns(model, inputs)
    table = Predictor._table
    monkeypatch.setattr(
        Predictor,
        "_table",
        lambda self, tokens: table(self, tokens) * torch.cat([torch.ones(len(tokens), 1), torch.zeros(1, 1)]),
    )
    fails(check_mask_token_learns, model, inputs)
    fails(check_loss, model, inputs, 1e-5)
