"""The share of the device's arithmetic is counted from the tokens that were computed."""

import pytest
import torch
from common.pretraining.utilisation import WORK, Utilisation, matrix_rate
from torch.utils.flop_counter import FlopCounterMode

import timm_dseq.engine.packing
from timm_dseq import block_masks, view_windows
from timm_dseq.engine.views.windows import cut

from ...tiny import jepa


def counted(model, images, blocks):
    """All products of a step as torch counts them, and as we do."""
    model.explicit_attention(True)
    with FlopCounterMode(display=False) as counter:
        loss, _, facts = model(images, None, blocks)
        loss.backward()
    ours = Utilisation(model).flops(len(images), {name: facts[name] for name in WORK})
    return ours, counter.get_total_flops(), facts


def test_without_padding_we_count_what_torch_counts(monkeypatch):
    monkeypatch.setattr(timm_dseq.engine.packing, "STRIDE", 1)
    model = jepa("ijepa")
    h, w = model.student.patch_embed.grid_size
    seeds = torch.full((6,), 3)  # the same blocks for all, so that rows are full
    blocks = block_masks((h, w), seeds, target_scale=(0.18, 0.18), target_aspect=(1.0, 1.0))
    ours, torchs, facts = counted(model, torch.randn(6, 3, 8 * h, 8 * w), blocks)
    assert facts["encoder_fill"] == facts["predictor_fill"] == 1
    assert ours == torchs


@pytest.mark.parametrize("objective", ["views", "ijepa"])
def test_views_are_counted_as_torch_counts_them(objective, monkeypatch):
    monkeypatch.setattr(timm_dseq.engine.packing, "STRIDE", 1)
    model = jepa(objective, views=2)
    model.explicit_attention(True)
    grid = model.student.patch_embed.grid_size
    windows = view_windows(grid, torch.arange(12), 0.5)
    inputs = {"pixels": cut(torch.randn(12, 3, *model.student.patch_embed.img_size), windows, grid), "windows": windows}
    if objective == "ijepa":
        inputs["images"] = torch.randn(6, 3, *model.student.patch_embed.img_size)
        seeds = torch.full((6,), 3)
        inputs["blocks"] = block_masks(grid, seeds, target_scale=(0.18, 0.18), target_aspect=(1.0, 1.0))
    with FlopCounterMode(display=False) as counter:
        loss, _, facts = model(**inputs)
        loss.backward()
    ours = Utilisation(model).flops(6, {name: facts[name] for name in WORK})
    unseen = 2 * 2 * 6**2 * 64 * 3 * 2  # FLOPs of the scores of views among images, which are none of a model's
    assert abs(ours + unseen - counter.get_total_flops()) < 0.002 * ours


@pytest.mark.parametrize("objective", ["dseq", "dseq_causal", "ijepa"])
def test_padding_is_the_devices_work_and_not_the_models(objective):
    model = jepa(objective)
    size = model.student.patch_embed.img_size
    blocks = block_masks(model.student.patch_embed.grid_size, torch.arange(6))
    ours, torchs, facts = counted(model, torch.randn(6, 3, *size), blocks)
    assert 0.7 * min(facts["encoder_fill"], facts["predictor_fill"]) * torchs < ours < torchs


def test_the_matrix_rate_is_one_of_a_computer():
    assert 1e8 < matrix_rate(torch.device("cpu"), torch.float32) < 1e14


def test_the_matrix_rate_is_taken_from_random_numbers(monkeypatch):
    drawn = []
    draw = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *args, **kwargs: drawn.append(draw(*args, **kwargs)) or drawn[-1])
    matrix_rate(torch.device("cpu"), torch.float32, tries=1)
    assert drawn[0].std() > 0.9
