"""How much of the device's arithmetic the model uses: FLOPs of the tokens that were computed, and what the device can.

Only products with weights count, forward and backward. Attention's own products (4 % of a ViT-B/16 at 224 px), padding
and recomputed activations are left out, so the share is a lower bound of what the device is busy with.
"""

import time

import torch
from torch import nn

from timm_dseq import DSeqJEPA


class Utilisation:
    """FLOPs of one model's steps."""

    def __init__(self, model: DSeqJEPA) -> None:
        patches = model.student.patch_embed
        self.length = patches.num_patches + model.target.num_prefix_tokens
        self.encoder, self.predictor = _weights(model.student.blocks), _weights(model.predictor.blocks)
        self.embedding = _weights(patches) * patches.num_patches

    def flops(self, images: float, encoder_tokens: float, predictor_tokens: float) -> float:
        """Of a step: one pass of the target over whole images; forward and backward of student and predictor."""
        target = images * (self.embedding + self.encoder * self.length)
        student = images * self.embedding + self.encoder * encoder_tokens + self.predictor * predictor_tokens
        return 2 * target + 6 * student


def matrix_rate(device: torch.device, dtype: torch.dtype, tries: int = 5) -> float:
    """FLOPs a second of a large matrix product on this device: the best of some tries."""
    side = 8192 if device.type == "cuda" else 768
    a = torch.ones(side, side, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(tries + 1):
        _wait(device)
        begun = time.perf_counter()
        a @ a
        _wait(device)
        best = min(best, time.perf_counter() - begun)
    return 2 * side**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _weights(module: nn.Module) -> int:
    """Elements that every token is multiplied with."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim > 1)
