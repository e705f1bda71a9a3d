"""How good predictions are: confusion matrices, one bincount an image → IoU of each class, its mean, its interval."""

from dataclasses import dataclass
from functools import cached_property

import torch

from ..run.results import RESAMPLES
from .classes import IGNORED


def confusion(numbers: torch.Tensor, predicted: torch.Tensor, classes: int) -> torch.Tensor:
    """(K, K): pixels of class i that were called j. numbers, of classes or IGNORED, and predicted have one shape."""
    counted = numbers != IGNORED
    pairs = numbers[counted].long() * classes + predicted[counted]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def tally(matrix: torch.Tensor) -> torch.Tensor:
    """What IoU needs of a matrix (K, K): pixels called rightly, that are of the class, that were called it: (3, K)."""
    return torch.stack([matrix.diagonal(), matrix.sum(1), matrix.sum(0)])


@dataclass(frozen=True)
class Scores:
    """The figures of a test, in per cent."""

    tallies: torch.Tensor  # (n, 3, K) int64, of each image

    @cached_property
    def iou(self) -> torch.Tensor:
        """(K,) of all images' pixels together; NaN for a class that is neither there nor predicted."""
        return 100 * iou(self.tallies.sum(0).double())

    @property
    def mean_iou(self) -> float:
        return self.iou.nanmean().item()

    @property
    def accuracy(self) -> float:
        """Of the pixels that have a class, how many were called it."""
        right, there, _ = self.tallies.sum(dim=(0, 2)).double().tolist()
        return 100 * right / there

    def interval(self, seed: int = 0) -> list[float]:
        """The middle 95 % of the mean IoU under resampling of the images."""
        generator, n = torch.Generator().manual_seed(seed), len(self.tallies)
        drawn = torch.randint(n, (RESAMPLES, n), generator=generator)
        weights = torch.zeros(RESAMPLES, n, dtype=torch.float64)
        weights.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
        sums = (weights @ self.tallies.double().flatten(1)).unflatten(1, self.tallies.shape[1:])
        means = 100 * iou(sums).nanmean(-1)
        return means[means.isfinite()].quantile(torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()


def iou(sums: torch.Tensor) -> torch.Tensor:
    """(…, 3, K) → (…, K), NaN where there is no such pixel."""
    right, there, called = sums.unbind(-2)
    return right / (there + called - right)
