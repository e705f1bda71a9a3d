"""The figures of one step: summed over its rounds in this process, then over processes."""

from dataclasses import dataclass, field
from typing import Any

import torch

from .utilisation import WORK


@dataclass
class Figures:
    """Sums over the rounds of one step, in this process; tensors stay on the device."""

    loss: torch.Tensor | float = 0.0  # (), summed over `count` target tokens, or predictions
    count: int = 0
    total: torch.Tensor | None = None  # (), the count of all processes
    by_step: torch.Tensor | float = 0.0  # (2, K): sum of losses, and tokens
    regions: list[int] = field(default_factory=list)  # images with 0, 1, … regions
    on_regions: float = 0.0  # images that were trained on them
    images: int = 0
    work: dict[str, int] = field(default_factory=lambda: dict.fromkeys(WORK, 0))
    fill: list[tuple[float, float]] = field(default_factory=list)  # of the encoder's rows, and of the predictor's
    samples: list[torch.Tensor] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    gradient_norm: torch.Tensor | None = None
    fetched: torch.Tensor | None = None  # what came to the host with this step's one copy

    def add(
        self, loss: torch.Tensor, count: int, facts: dict[str, Any], samples: torch.Tensor, broken: list[str]
    ) -> None:
        """Take in one round."""
        tokens = facts["tokens_by_step"]
        self.loss = self.loss + loss.detach()
        self.count += count
        self.by_step = self.by_step + torch.stack([facts["loss_by_step"].nan_to_num(0.0) * tokens, tokens])
        counts = facts["region_counts"]
        self.regions = [a + b for a, b in zip(self.regions or [0] * len(counts), counts, strict=True)]
        self.on_regions += facts["region_share"] * len(samples)
        self.images += len(samples)
        self.work = {name: count + facts[name] for name, count in self.work.items()}
        self.fill.append((facts["encoder_fill"], facts["predictor_fill"]))
        self.samples.append(samples)
        self.broken += broken
        self.fetched = self.fetched if facts["fetched"] is None else facts["fetched"]
