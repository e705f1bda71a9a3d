"""The loss: predictions (T, D) and the target encoder's latents (B, N, D) → a sum, what it is summed over, and facts.

It is smooth L1, plus terms. Sums and counts of several batches or processes add up, so training divides only once.
"""

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional as F

from ..host import to_device
from .packing import masked_values
from .plans import Plan

MEANS = ("token", "step")
Terms = Mapping[str, tuple[float, nn.Module]]  # name → factor and module; see terms/__init__.py


def batch_loss(
    predictions: torch.Tensor, latents: torch.Tensor, plan: Plan, steps: int, mean: str, terms: Terms
) -> tuple[torch.Tensor, int, dict]:
    """The loss of predictions (T, D), in the order of `plan.targets.nonzero()`, to latents (B, N, D).

    Returns a sum, (), its count, and facts. mean: with "token" the sum is over target tokens, with "step" over
    predictions, each the mean over its tokens. steps: K, the most that an image can have. The facts' "losses" are the
    means that the loss is made of.
    """
    sizes = to_device(plan.sizes[2], latents.device)  # (P,)
    owner, targets = target_tokens(latents, plan)
    error = F.smooth_l1_loss(predictions, targets, reduction="none").mean(1)  # (T,)
    if mean == "token":
        loss, count = error.sum(), len(error)
    else:
        loss, count = (error * sizes.to(error.dtype).reciprocal().index_select(0, owner)).sum(), len(sizes)
    facts = {"target_tokens": len(error), **by_step(error.detach(), plan.step.index_select(0, owner), steps)}
    losses = {"prediction": loss.detach() / count}
    if terms:
        means = [token_means(x, owner, sizes) for x in (predictions, targets)]
    for name, (factor, term) in terms.items():
        value = factor * term(*means, plan, (steps, len(latents)))
        losses[name] = value.detach()
        loss = loss + count * value  # so the mean of the loss is that of the prediction plus the term
    return loss, count, {**facts, "losses": losses}


def target_tokens(latents: torch.Tensor, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
    """The prediction (T,) and the latent (T, D) of each target token, in the order of `plan.targets.nonzero()`."""
    patches, device = latents.shape[1], latents.device
    total = int(plan.sizes[2].sum())
    number = torch.arange(len(plan.targets), device=device)[:, None]
    row = plan.target_image()[:, None] * patches + torch.arange(patches, device=device)  # (P, N) of all latents
    rows = masked_values(plan.targets, row, total)
    return masked_values(plan.targets, number, total), latents.flatten(0, 1).index_select(0, rows)


def token_means(x: torch.Tensor, owner: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens of each prediction: x (T, D), owner (T,), sizes (P,) → (P, D)."""
    return x.new_zeros(len(sizes), x.shape[1]).index_add(0, owner, x) / sizes[:, None]


def by_step(error: torch.Tensor, step: torch.Tensor, steps: int) -> dict[str, torch.Tensor]:
    """Mean error and number of tokens of each step: error (T,), step (T,) from 1 → (K,) each, a mean of none is nan."""
    both = torch.stack([error, torch.ones_like(error)])
    sums = torch.zeros(2, steps, device=error.device, dtype=error.dtype)
    sums = sums.scatter_add(1, (step - 1).expand(2, -1), both)
    return {"loss_by_step": sums[0] / sums[1], "tokens_by_step": sums[1]}
