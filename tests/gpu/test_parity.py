"""A GPU gives the CPU's plans, losses and gradients, for every objective, in float32 and in bf16."""

import pytest
import torch
import torch.nn.attention.varlen

from timm_dseq import block_masks, rank_regions, view_windows
from timm_dseq.engine.plans import plan_blocks, plan_regions
from timm_dseq.engine.views.windows import cut, encode_windows

from ..engine.test_attention import attend_in_turn
from ..tiny import batch, islands, jepa
from .devices import DEVICES, exact_products

OBJECTIVES = {
    "dseq": {},
    "flat": {"flat": True},
    "by step": {"loss": "step"},
    "random order": {"order": "random"},
    "uniform": {"regions": "uniform"},
    "causal": {"objective": "dseq_causal"},
    "ijepa": {"objective": "ijepa"},
    "contrastive": {"contrastive": True},
}
VIEWS = {"views": {"objective": "views", "views": 2}, "dseq and views": {"views": 2}}
# largest differences of the loss, as a share of it, and of all gradients, as a share of their norm
TOLERANCE = {"no": (1e-5, 1e-4), "bf16": (0.01, 0.05)}
WIDE = {"embed_dim": 64, "num_heads": 2}  # heads of 32 channels, as fused kernels want them
IMAGES = 6


@pytest.mark.parametrize("device", DEVICES)
def test_blocks_and_regions_of_a_map_are_the_cpus(device):
    draw = torch.Generator().manual_seed(0)
    maps = islands(64, 14, 14, draw)
    seeds = torch.randint(0, 2**62, (64,), generator=draw)
    ours, theirs = (block_masks((14, 14), s) for s in (seeds.to(device), seeds))
    assert torch.equal(ours.context.cpu(), theirs.context) and torch.equal(ours.targets.cpu(), theirs.targets)
    for order in ("saliency", "random", "spatial"):
        ours, theirs = (
            rank_regions(m, order=order, seeds=s) for m, s in ((maps.to(device), seeds.to(device)), (maps, seeds))
        )
        assert torch.equal(ours.masks.cpu(), theirs.masks) and torch.equal(ours.area.cpu(), theirs.area)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["regions", "flat", "causal", "blocks"])
def test_plans_are_the_cpus(kind, device):
    draw = torch.Generator().manual_seed(1)
    maps, seeds = islands(32, 14, 14, draw), torch.arange(32)

    def plan(where):
        if kind == "blocks":
            return plan_blocks(block_masks((14, 14), seeds.to(where)))
        return plan_regions(rank_regions(maps.to(where)), flat=kind == "flat", causal=kind == "causal")

    ours, theirs = plan(device), plan("cpu")
    assert [x.tolist() for x in ours.sizes] == [x.tolist() for x in theirs.sizes]
    for name in ("contexts", "context_image", "targets", "target_context", "step", "context_rank", "target_rank"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        assert (mine is None) == (other is None)
        assert mine is None or torch.equal(mine.cpu(), other), name


def step_of(device, precision, settings, one_row=False):
    """Loss, gradients and facts of one batch, on maps that are the same everywhere."""
    with exact_products():
        model = jepa(encoder_args=WIDE, predictor_width=64, **settings).to(device)
        model.varlen = model.predictor.varlen = one_row
        maps = islands(IMAGES, 6, 6, torch.Generator().manual_seed(3)).to(device)
        model._saliency = lambda *_: maps
        images, coins, blocks = batch(IMAGES)
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            windows = view_windows((6, 6), torch.arange(2 * IMAGES, device=device), 0.5)
            pixels = cut(images.to(device).repeat_interleave(2, 0), windows, (6, 6))
            inputs = {"pixels": pixels, "windows": windows} if model.views else {}
            if model.predicts:
                inputs |= {"images": images.to(device), "use_regions": coins.to(device), "blocks": blocks.to(device)}
            loss, count, facts = model(**inputs)
            loss = loss / count
        loss.backward()
    gradients = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients, facts


@torch.no_grad()
def encoded_views(device, precision):
    """What the student makes of two views of each image, without the mean of all: (2·B, 2·D)."""
    with exact_products():
        model = jepa("views", encoder_args=WIDE, predictor_width=64, views=2).to(device)
        windows = view_windows((6, 6), torch.arange(2 * IMAGES, device=device), 0.5)
        pixels = cut(batch(IMAGES)[0].to(device).repeat_interleave(2, 0), windows, (6, 6))
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            pooled = encode_windows(model.student, pixels, windows)
    return (pooled - pooled.mean(0)).cpu()


def check_step(device, precision, settings, one_row=False):
    loss, gradients, facts = step_of(device, precision, settings, one_row)
    wanted, expected, other = step_of("cpu", "no", settings)
    of_loss, of_gradients = TOLERANCE[precision]
    for name in ("region_counts", "region_share", "encoder_tokens", "predictor_tokens", "encoder_pairs", "view_tokens"):
        assert facts[name] == other[name], name
    assert loss == pytest.approx(wanted, rel=of_loss)
    assert gradients.keys() == expected.keys()
    gap = sum((gradients[name] - expected[name]).square().sum() for name in expected).sqrt()
    norm = sum(expected[name].square().sum() for name in expected).sqrt()
    assert gap <= of_gradients * norm, f"gradients are off by {gap / norm:.2%} of their norm"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_and_gradients_are_those_of_float32_on_the_cpu(objective, precision, device):
    check_step(device, precision, OBJECTIVES[objective])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("objective", VIEWS)
def test_views_have_the_losses_and_gradients_of_the_cpu(objective, device):
    """In float32. Two BatchNorms over six images make gradients of a tenth more or less from bf16's rounding."""
    check_step(device, "no", VIEWS[objective])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", TOLERANCE)
def test_encoded_views_are_those_of_float32_on_the_cpu(precision, device):
    ours, theirs = encoded_views(device, precision), encoded_views("cpu", "no")
    assert (ours - theirs).norm() <= TOLERANCE[precision][1] * theirs.norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("objective", ["dseq", "causal", "ijepa"])
def test_one_long_row_gives_them_too(objective, device, monkeypatch):
    if device == "cpu":  # whose torch has no such kernel
        monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", attend_in_turn)
    check_step(device, "bf16", OBJECTIVES[objective], one_row=True)
