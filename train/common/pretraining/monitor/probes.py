"""How good an encoder is by its features: kNN and linear accuracy, RankMe, what they vary with, signs of a collapse."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from ...classifiers import Regression, vote

_NEIGHBOURS, _TEMPERATURE = 20, 0.07
FALLEN = 0.6  # of the dimensions before the first step: fewer are a fall
FALL_ENDS = 8000  # steps by which runs had climbed out of it
NAMES = ("knn", "linear", "rank_me", "rank_me_tokens", "feature_std", "share_image", "share_place")
_PENALTY = 1e-3  # on the squared weights of the logistic regression


def probe(
    train: torch.Tensor,
    labels: torch.Tensor,
    test: torch.Tensor,
    truth: torch.Tensor,
    tokens: torch.Tensor,
    sums: torch.Tensor,
) -> dict[str, float | None]:
    """All figures of mean features (n, D) float32 with classes (n,), computed on CUDA or else on the CPU; None each
    where a feature is not finite.

    tokens (n, D): one of each image. sums: the `moments` of all tokens.
    """
    if not train.isfinite().all():
        return dict.fromkeys(NAMES)
    device = train.device if train.is_cuda else torch.device("cpu")
    train, labels, test, truth, tokens = (tensor.to(device) for tensor in (train, labels, test, truth, tokens))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # TF32 would stop the line search early
    try:
        near, far = whitened(train, test)
        return {
            "knn": knn(near, labels, far, truth),
            "linear": linear(train, labels, test, truth),
            "rank_me": rank_me(train),
            "rank_me_tokens": rank_me(tokens),
            "feature_std": feature_std(train),
            **variance_shares(sums, train.shape[1]),
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


def moments(tokens: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Sums over tokens (n, N, D), each layer-normed as a target is, that those of other images can be added to:
    (3 + N·D,). counted (n,) bool: the images that are."""
    weight = counted.to(tokens.dtype)[:, None, None]
    tokens = F.layer_norm(tokens, tokens.shape[-1:]) * weight
    numbers = torch.stack([weight.sum(), tokens.square().sum(), tokens.mean(1).square().sum()])
    return torch.cat([numbers, tokens.sum(0).flatten()])


def variance_shares(sums: torch.Tensor, dims: int) -> dict[str, float]:
    """Of the variance of all tokens, the shares that are the mean of their image and the mean of their place.

    The rest is what tells the patches of an image apart. sums: `moments`. dims: D.
    """
    count, squares, of_images = sums[:3].double().tolist()
    of_places = sums[3:].view(-1, dims).double() / count  # (N, D)
    centre = of_places.mean(0).square().sum().item()
    total = max(squares / count / len(of_places) - centre, 1e-12)
    place = of_places.square().sum(1).mean().item() - centre
    return {"share_image": (of_images / count - centre) / total, "share_place": place / total}


@dataclass(frozen=True)
class Phase:
    """What figures say of a run beyond themselves, and what to do."""

    sign: str
    advice: str
    collapse: bool  # it does not end by itself


def phase(figures: dict[str, Any], before: dict[str, Any] | None, step: int) -> Phase | None:
    """A collapse, or the fall that latent prediction begins with and climbs out of; None where all is well.

    figures: by `probe`. before: those before the first step, if they are known.
    """
    if figures["knn"] is None:
        return Phase("the features are not finite", "See docs/pretraining.md.", collapse=True)
    sign = None
    if not figures["feature_std"] > 0.01:
        sign = f"all images look alike (feature std {figures['feature_std']:.4f})"
    elif figures["rank_me"] < 2:
        sign = f"the features use {figures['rank_me']:.1f} dimensions"
    if sign:
        return Phase(f"{sign}: a collapse", "See docs/pretraining.md.", collapse=True)
    if not before or not before.get("rank_me") or figures["rank_me"] > FALLEN * before["rank_me"]:
        return None
    sign = f"the features use {figures['rank_me']:.1f} dimensions, {before['rank_me']:.1f} before the first step"
    if step < FALL_ENDS:
        return Phase(sign, "Normal: latent prediction begins with a fall, for some thousand steps.", collapse=False)
    return Phase(sign, "They should have climbed by now: train views beside it (--model.views=4).", collapse=True)
