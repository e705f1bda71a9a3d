"""The `+ contrastive` term of C-JEPA, for any plan: mean predictions and mean targets (P, D) → one number.

VICReg: the two of a pair are alike; over the images that have a k-th prediction, for each k, features vary and are
decorrelated. The statistics are those of all processes.
"""

import torch
from torch import nn
from torch.nn import functional as F

from ..plans import Plan
from .gathering import gathered


class Contrastive(nn.Module):
    """0.001 · (25 · MSE + 25 · variance + 1 · covariance), through a projector shared by predictions and targets."""

    def __init__(self, dim: int, width: int = 3072, weight: float = 0.001) -> None:
        super().__init__()
        self.weight = weight
        layers = [nn.Linear(i, width, bias=False) for i in (dim, width, width)]
        self.projector = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])

    def forward(
        self, predicted: torch.Tensor, target: torch.Tensor, plan: Plan, shape: tuple[int, int]
    ) -> torch.Tensor:
        """predicted, target (P, D): means over the tokens of each prediction. shape (K, B): most steps, images."""
        steps, images = shape
        cell = (plan.step - 1) * images + plan.target_image()  # (P,) of a table (K, B)
        present = predicted.new_zeros(steps * images).scatter(0, cell, 1.0)
        pair = [gathered(_table(self.projector(x), cell, shape), dim=1) for x in (predicted, target)]
        present = gathered(present.view(shape), dim=1)  # (K, images of all processes)
        alike = ((pair[0] - pair[1]).square().mean(2) * present).sum() / present.sum()
        statistics = [_variance_and_covariance(z, present) for z in pair]
        variance, covariance = (sum(both) for both in zip(*statistics, strict=True))
        return self.weight * (25 * alike + 25 * variance + covariance)


def _table(rows: torch.Tensor, cell: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Rows (P, D) in their cells (P,), zero elsewhere: (K, B, D)."""
    table = rows.new_zeros(shape[0] * shape[1], rows.shape[1])
    return table.scatter(0, cell[:, None].expand_as(rows), rows).view(*shape, -1)


def _variance_and_covariance(z: torch.Tensor, present: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """VICReg's two terms of z (K, B, D), each the mean over the steps that at least two images have: (), ()."""
    count = present.sum(1)  # (K,)
    weight = present[:, :, None]
    centred = (z - (z * weight).sum(1, keepdim=True) / count.clamp(min=1)[:, None, None]) * weight
    degrees = (count - 1).clamp(min=1)
    covariance = centred.mT @ centred / degrees[:, None, None]  # (K, D, D)
    diagonal = covariance.diagonal(dim1=1, dim2=2)
    variance_term = F.relu(1 - (diagonal + 1e-4).sqrt()).mean(1)
    covariance_term = (covariance.square().sum((1, 2)) - diagonal.square().sum(1)) / z.shape[2]
    usable = (count >= 2).to(z.dtype)
    share = usable / usable.sum().clamp(min=1)
    return (variance_term * share).sum(), (covariance_term * share).sum()
