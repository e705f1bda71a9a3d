"""Small encoders, models, batches and random plans for the tests of the engine."""

import sys
from functools import partial
from pathlib import Path

import torch
from timm.models import VisionTransformer
from torch import nn

from timm_dseq.engine.jepa import DSeqJEPA
from timm_dseq.engine.plans import Plan, plan_blocks, plan_regions
from timm_dseq.engine.regions import rank_regions
from timm_dseq.engine.target_blocks import block_masks

SHAPES = {"square": (48, 48), "wide": (40, 72)}  # images of 6×6 and 5×9 patches


def lines_run(work) -> int:
    """How many lines of this project's Python are run by `work()`."""
    counted = 0
    root = Path(__file__).parents[1]  # whose folder may have any name
    ours = tuple(str(root / part) for part in ("timm_dseq", "train"))

    def line(frame, event, _):
        nonlocal counted
        counted += event == "line"
        return line

    def call(frame, _event, _):
        return line if frame.f_code.co_filename.startswith(ours) else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        work()
    finally:
        sys.settrace(before)
    return counted


def encoder(img_size=(48, 48), **kwargs) -> VisionTransformer:
    settings = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 0, "class_token": True}
    settings |= {
        "no_embed_class": True,
        "global_pool": "avg",
        "fc_norm": False,
        "norm_layer": partial(nn.LayerNorm, eps=1e-6),
    }
    return VisionTransformer(img_size=img_size, **{**settings, **kwargs})


def jepa(objective="dseq", img_size=(48, 48), dtype=torch.float32, seed=0, encoder_args=None, **kwargs) -> DSeqJEPA:
    """A model whose weights are all large enough to matter: gradients that should not vanish are far from 0."""
    torch.manual_seed(seed)
    settings = {"predictor_width": 24, "predictor_depth": 2}
    model = DSeqJEPA(encoder(img_size, **(encoder_args or {})), objective, **{**settings, **kwargs})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "pos_embed" not in name and not name.startswith("target."):
                parameter.add_(torch.randn_like(parameter) * 0.15)
        for name, parameter in model.target.named_parameters():
            if "pos_embed" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.to(dtype)


def batch(count=3, img_size=(48, 48), dtype=torch.float32, seed=0, patch=8):
    """Images (B, 3, H, W), the curriculum's coins (B,), some True and some False, and target blocks."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, *img_size, generator=generator, dtype=dtype)
    coins = torch.arange(count) % 3 != 2
    seeds = torch.randint(0, 2**40, (count,), generator=generator)
    return images, coins, block_masks((img_size[0] // patch, img_size[1] // patch), seeds)


def mean_loss(model, *inputs) -> torch.Tensor:
    """What one batch is trained on: its loss, divided by what it was summed over."""
    loss, count, _ = model(*inputs)
    return loss / count


def islands(count, h, w, generator) -> torch.Tensor:
    """Random maps with several regions each: patches that stand out, most of them alone."""
    standing, height = torch.rand(2, count, h, w, generator=generator)
    return (standing < 0.2) * (0.6 + 0.4 * height)


def plan(kind: str, count: int, grid: tuple[int, int], seed: int = 0) -> Plan:
    """A random plan of one kind over the images of a batch."""
    generator = torch.Generator().manual_seed(seed)
    maps = islands(count, *grid, generator)
    regions = rank_regions(maps, num_regions=5, min_area=0.01)
    blocks = block_masks(grid, torch.randint(0, 2**40, (count,), generator=generator))
    if kind == "mixed":
        return Plan.cat(
            [plan_regions(regions, images=torch.arange(0, count, 2)), plan_blocks(blocks, torch.arange(1, count, 2))]
        )
    if kind == "mixed_causal":
        first = plan_regions(regions, causal=True, images=torch.arange(0, count, 2))
        return Plan.cat([first, plan_blocks(blocks, torch.arange(1, count, 2))])
    if kind == "blocks":
        return plan_blocks(blocks)
    return plan_regions(regions, flat=kind == "flat", causal=kind == "causal")


PLANS = ("regions", "flat", "causal", "blocks", "mixed", "mixed_causal")
