"""Which attention a run uses: rows under a mask, or one long row with boundaries. Both are timed on its model."""

import time

import torch

from timm_dseq import DSeqJEPA, block_masks, plan_blocks

from ..system.launch import wait
from .precision import Precision

ROUNDS = 3
TOLERANCE = 0.05  # relative difference of predictions: in bf16 two orders of summation differ by less


def choose_attention(model: DSeqJEPA, precision: Precision, images: int) -> str:
    """Set the model's `varlen` switches to what is fastest on this device; returns the measurements in words.

    images: in a micro-batch. The kernel for one long row exists on CUDA in bf16 only.
    """
    if precision.device.type != "cuda" or precision.name != "bf16":
        return "rows under a mask"
    return fastest(model, precision, min(images, 64))


def fastest(model: DSeqJEPA, precision: Precision, images: int) -> str:
    """Time both ways, first for the encoder, then for the predictor. A way whose predictions differ is not used."""
    size = model.student.patch_embed.img_size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(images, 3, *size, generator=generator).to(precision.device)
    seeds = torch.arange(images, device=precision.device)
    plan = plan_blocks(block_masks(model.student.patch_embed.grid_size, seeds))

    def run() -> tuple[float, torch.Tensor]:
        least = float("inf")
        for _ in range(ROUNDS):
            wait(precision.device)
            begun = time.perf_counter()
            with precision.autocast():
                predictions = model.predict(pixels, plan)
            predictions.float().square().mean().backward()
            wait(precision.device)
            least = min(least, time.perf_counter() - begun)
        model.zero_grad(set_to_none=True)
        return least, predictions.detach().float()

    seconds, expected = run()
    words = []
    for name, part in (("encoder", model), ("predictor", model.predictor)):
        part.varlen = True
        try:
            with_row, predictions = run()
        except (RuntimeError, ValueError, ImportError) as error:
            part.varlen = False
            words.append(f"{name}: no long row, its kernel fails ({str(error).splitlines()[0]})")
            continue
        gap = ((predictions - expected).abs().mean() / expected.abs().mean()).item()
        if not gap <= TOLERANCE:
            part.varlen = False
            words.append(f"{name}: no long row, its kernel is wrong here (off by {gap:.1%} of the predictions)")
            continue
        part.varlen = with_row < seconds
        number, share = "one" if part.varlen else "no", with_row / seconds
        words.append(f"{name}: {number} long row, with it a step takes {share:.2f} of the time")
        seconds = min(seconds, with_row)
    return ", ".join(words)
