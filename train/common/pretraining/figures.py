"""The figures of one optimiser step, summed over its accumulation rounds in this process."""

from dataclasses import dataclass, field
from typing import Any

import torch

from .utilisation import WORK


@dataclass
class Figures:
    """Sums over rounds. What the device computes stays there, as tensors; the rest is on the host."""

    loss: torch.Tensor | float = 0.0  # (), the sum over `count` target tokens, or predictions
    count: int = 0
    total: torch.Tensor | None = None  # (), the counts of all processes, summed
    losses: dict[str, torch.Tensor] = field(default_factory=dict)  # (), what it is made of
    by_step: torch.Tensor | float = 0.0  # (2, K): sum of losses and number of tokens of each step in a sequence
    regions: list[int] = field(default_factory=list)  # images with 0, 1, … regions
    on_regions: float = 0.0  # images that were trained on their regions
    images: int = 0
    work: dict[str, int] = field(default_factory=lambda: dict.fromkeys(WORK, 0))
    fill: list[tuple[float, float]] = field(default_factory=list)  # of the encoder's rows, and of the predictor's
    samples: list[torch.Tensor] = field(default_factory=list)  # (B, 2) each: (epoch, index)
    broken: list[str] = field(default_factory=list)  # a message for each image that cannot be read
    gradient_norm: torch.Tensor | None = None
    fetched: torch.Tensor | None = None  # what the step's copy from the device brought along

    def add(
        self, loss: torch.Tensor, count: int, facts: dict[str, Any], samples: torch.Tensor, broken: list[str]
    ) -> None:
        """Add one round: what the model returned for it, and its batch."""
        tokens = facts["tokens_by_step"]
        self.loss = self.loss + loss.detach()
        self.count += count
        self.losses = {name: self.losses.get(name, 0.0) + count * mean for name, mean in facts["losses"].items()}
        self.by_step = self.by_step + torch.stack([facts["loss_by_step"].nan_to_num(0.0) * tokens, tokens])
        regions = facts["region_counts"]
        self.regions = [a + b for a, b in zip(self.regions or [0] * len(regions), regions, strict=True)]
        self.on_regions += facts["region_share"] * len(samples)
        self.images += len(samples)
        self.work = {name: done + facts[name] for name, done in self.work.items()}
        self.fill.append((facts["encoder_fill"], facts["predictor_fill"]))
        self.samples.append(samples)
        self.broken += broken
        self.fetched = self.fetched if facts["fetched"] is None else facts["fetched"]
