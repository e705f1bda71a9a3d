"""How good an encoder is by its features (n, D): kNN and linear accuracy, RankMe, feature std, signs of a collapse."""

import torch
from torch.nn import functional as F

from ...classifiers import Regression, vote

_NEIGHBOURS, _TEMPERATURE = 20, 0.07
_PENALTY = 1e-3  # on the squared weights of the logistic regression


def probe(train: torch.Tensor, labels: torch.Tensor, test: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    """All figures of features (n, D) float32 with classes (n,), computed on CUDA or else on the CPU."""
    device = train.device if train.is_cuda else torch.device("cpu")
    train, labels, test, truth = (tensor.to(device) for tensor in (train, labels, test, truth))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # TF32 would stop the line search early
    try:
        near, far = whitened(train, test)
        return {
            "knn": knn(near, labels, far, truth),
            "linear": linear(train, labels, test, truth),
            "rank_me": rank_me(train),
            "feature_std": feature_std(train),
        }
    finally:
        torch.set_float32_matmul_precision(before)


def knn(train: torch.Tensor, labels: torch.Tensor, test: torch.Tensor, truth: torch.Tensor) -> float:
    """Accuracy of the vote of the nearest by cosine."""
    similarity = F.normalize(test, dim=1) @ F.normalize(train, dim=1).T
    nearest, which = similarity.topk(min(_NEIGHBOURS, len(train)), dim=1)
    predicted = vote(nearest, labels[which], _NEIGHBOURS, _TEMPERATURE, int(labels.max()) + 1)
    return (predicted == truth).float().mean().item()


def whitened(train: torch.Tensor, test: torch.Tensor, dims: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """Both (n, D) along the leading directions of the first, each of unit variance: (n, dims), or fewer.

    Early in a run a few directions, mean colours above all, dominate the features: a plain kNN would see nothing else.
    """
    mean = train.mean(0)
    _, values, directions = torch.linalg.svd(train - mean, full_matrices=False)
    count = min(dims, int((values > 1e-5 * values[0]).sum()))
    basis = directions[:count].T / values[:count]
    return (train - mean) @ basis, (test - mean) @ basis


def linear(train: torch.Tensor, labels: torch.Tensor, test: torch.Tensor, truth: torch.Tensor) -> float:
    """Accuracy of logistic regression on standardised features."""
    mean, std = train.mean(0), train.std(0).clamp(min=1e-6)
    regression = Regression((train - mean) / std, labels, int(labels.max()) + 1)
    regression.fit(c=1 / (2 * _PENALTY * len(train)), max_iter=60)
    return (regression.predict((test - mean) / std) == truth).float().mean().item()


def rank_me(features: torch.Tensor) -> float:
    """Effective number of dimensions: exp of the entropy of the normalised singular values (Garrido et al., 2023)."""
    values = torch.linalg.svdvals(features.double())
    share = values / values.sum().clamp(min=1e-12)
    return torch.special.entr(share).sum().exp().item()


def feature_std(features: torch.Tensor) -> float:
    """Standard deviation of the features over images, as a share of their length; 0 when all images look alike."""
    centred = features - features.mean(0)
    return (centred.square().sum(1).mean() / features.square().sum(1).mean().clamp(min=1e-12)).sqrt().item()


def collapse(figures: dict[str, float]) -> str | None:
    """A sign that the features no longer distinguish images, in words, or None."""
    if not figures["feature_std"] > 0.01:
        return f"all images look alike (feature std {figures['feature_std']:.4f})"
    if figures["rank_me"] < 2:
        return f"they use {figures['rank_me']:.1f} dimensions"
    return None
