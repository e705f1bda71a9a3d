"""Which attention runs: rows under a mask, or one long row under boundaries; measured on the run's own model."""

import time

import torch

from timm_dseq import DSeqJEPA, block_masks, plan_blocks

from ..system.launch import wait
from .precision import Precision

ROUNDS = 3
TOLERANCE = 0.05  # of predictions, as a share of their size: what bf16 leaves of two ways to add


def choose_attention(model: DSeqJEPA, precision: Precision, images: int) -> str:
    """Set the model's `varlen` switches to what is fastest on this device; returns what was found, in words.

    images: in a micro-batch. Where the kernel for one long row does not exist there is nothing to choose.
    """
    if precision.device.type != "cuda" or precision.name != "bf16":
        return "rows under a mask"
    return fastest(model, precision, min(images, 64))


def fastest(model: DSeqJEPA, precision: Precision, images: int) -> str:
    """Time both ways, first for the student, then for the predictor; what differs from the mask is not taken."""
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
    said = []
    for name, part in (("encoder", model), ("predictor", model.predictor)):
        part.varlen = True
        try:
            own, predictions = run()
        except (RuntimeError, ValueError, ImportError) as error:
            part.varlen = False
            said.append(f"{name}: no long row, its kernel fails ({str(error).splitlines()[0]})")
            continue
        gap = ((predictions - expected).abs().mean() / expected.abs().mean()).item()
        if not gap <= TOLERANCE:
            part.varlen = False
            said.append(f"{name}: no long row, its kernel is wrong here (off by {gap:.1%} of the predictions)")
            continue
        part.varlen = own < seconds
        said.append(
            f"{name}: {'one' if part.varlen else 'no'} long row, with it a step takes {own / seconds:.2f} of the time"
        )
        seconds = min(seconds, own)
    return ", ".join(said)
