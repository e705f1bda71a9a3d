"""How much of the device's peak the model uses (MFU): FLOPs of the tokens that were computed, and the device's FLOP/s.

Products with weights and those of attention count, forward and backward. Padding, pairs of tokens that a mask keeps
apart and recomputed activations do not count: the device computes them, but the model does not need them.
"""

import time

import torch
from torch import nn

from timm_dseq import DSeqJEPA

from ..system.launch import wait

# the facts of a batch that FLOPs follow from: tokens computed, and pairs of tokens that may attend to each other
WORK = (
    *("encoder_tokens", "predictor_tokens", "target_tokens", "view_tokens"),
    *("encoder_pairs", "predictor_pairs", "view_pairs"),
)


class Utilisation:
    """FLOPs of a model's optimiser steps."""

    def __init__(self, model: DSeqJEPA) -> None:
        patches = model.student.patch_embed
        self.patches, self.prefix = patches.num_patches, model.target.num_prefix_tokens
        self.embedding = 2 * _weights(patches)  # FLOPs of a patch
        self.encoder, self.predictor = _of_a_token(model.student.blocks), _of_a_token(model.predictor.blocks)
        self.predicts, self.views = model.predicts, model.views
        self.projection = 2 * _weights(model.recognition.projector) if model.views else 0  # of a view
        self.narrowing, self.widening = (2 * _weights(m) for m in (model.predictor.embed, model.predictor.project))

    def flops(self, images: float, work: dict[str, float]) -> float:
        """FLOPs of a step on so many images: one pass of the target over all patches, where something is predicted;
        forward and backward of student, predictor and projector."""
        token, pair = self.encoder
        length, views = self.patches + self.prefix, images * self.views
        embedded = images * self.predicts * self.patches
        target = self.embedding * embedded + images * self.predicts * (token * length + pair * length**2)
        embedded += work["view_tokens"] - views * self.prefix
        student = token * (work["encoder_tokens"] + work["view_tokens"])
        student += pair * (work["encoder_pairs"] + work["view_pairs"]) + views * self.projection
        token, pair = self.predictor
        predictor = token * work["predictor_tokens"] + pair * work["predictor_pairs"]
        predictor += self.narrowing * work["encoder_tokens"] + self.widening * work["target_tokens"]
        # images have no gradient, so the backward of the patch embedding is one product
        return target + 2 * self.embedding * embedded + 3 * (student + predictor)


def matrix_rate(device: torch.device, dtype: torch.dtype, tries: int = 5) -> float:
    """FLOP/s of a large matrix product on this device: the best of `tries`, after as many for warming up.

    The numbers are random: with constants a GPU draws less power and runs faster than it does in training.
    """
    side = 8192 if device.type == "cuda" else 768
    a, b = torch.randn(2, side, side, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    best = float("inf")
    for attempt in range(2 * tries):
        wait(device)
        begun = time.perf_counter()
        a @ b
        wait(device)
        if attempt >= tries:
            best = min(best, time.perf_counter() - begun)
    return 2 * side**3 / best


def _of_a_token(blocks: nn.ModuleList) -> tuple[int, int]:
    """Forward FLOPs of one token in these transformer blocks, and of one pair of tokens: score and weighted value."""
    return 2 * _weights(blocks), sum(4 * block.attn.attn_dim for block in blocks)


def _weights(module: nn.Module) -> int:
    """Elements that every token is multiplied with."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim > 1)
