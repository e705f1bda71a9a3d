"""The `+ contrastive` term of C-JEPA, for any plan: predictions and their targets (T, D) → one number.

VICReg on the mean of each prediction and of its target: alike in pairs, varied and decorrelated over the images that
have a k-th prediction, for each k. The statistics are those of all processes.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F


class Contrastive(nn.Module):
    """0.001 · (25 · MSE + 25 · variance + 1 · covariance), through a projector shared by predictions and targets."""

    def __init__(self, dim: int, width: int = 3072, weight: float = 0.001) -> None:
        super().__init__()
        self.weight = weight
        layers = [nn.Linear(i, width, bias=False) for i in (dim, width, width)]
        self.projector = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])

    def forward(
        self,
        predicted: torch.Tensor,
        target: torch.Tensor,
        step: torch.Tensor,
        image: torch.Tensor,
        shape: tuple[int, int],
    ) -> torch.Tensor:
        """predicted, target (P, D): means over tokens. step (P,) from 1, image (P,). shape: most steps, images."""
        steps, images = shape
        slot = (step - 1) * images + image
        there = predicted.new_zeros(steps * images).scatter(0, slot, 1.0)
        pair = [everywhere(self._table(self.projector(x), slot, steps, images)) for x in (predicted, target)]
        there = everywhere(there.view(steps, images))  # (K, images of all processes)
        alike = ((pair[0] - pair[1]).square().mean(2) * there).sum() / there.sum()
        spread = [_spread(z, there) for z in pair]
        variance, covariance = (sum(both) for both in zip(*spread, strict=True))
        return self.weight * (25 * alike + 25 * variance + covariance)

    @staticmethod
    def _table(z: torch.Tensor, slot: torch.Tensor, steps: int, images: int) -> torch.Tensor:
        """Rows (P, D) put at their step and image, zero elsewhere: (K, B, D)."""
        table = z.new_zeros(steps * images, z.shape[1])
        return table.scatter(0, slot[:, None].expand_as(z), z).view(steps, images, -1)


def _spread(z: torch.Tensor, there: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Variance and covariance terms of z (K, B, D), mean over the steps that at least two images have."""
    count = there.sum(1)  # (K,)
    weight = there[:, :, None]
    centred = (z - (z * weight).sum(1, keepdim=True) / count.clamp(min=1)[:, None, None]) * weight
    degrees = (count - 1).clamp(min=1)
    covariance = centred.mT @ centred / degrees[:, None, None]  # (K, D, D)
    diagonal = covariance.diagonal(dim1=1, dim2=2)
    variance_term = F.relu(1 - (diagonal + 1e-4).sqrt()).mean(1)
    covariance_term = (covariance.square().sum((1, 2)) - diagonal.square().sum(1)) / z.shape[2]
    usable = (count >= 2).to(z.dtype)
    share = usable / usable.sum().clamp(min=1)
    return (variance_term * share).sum(), (covariance_term * share).sum()


def everywhere(x: torch.Tensor) -> torch.Tensor:
    """x (K, B, …) of every process, side by side along B, differentiable; all processes hold tensors of one shape."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return x
    return _Gather.apply(x)


class _Gather(torch.autograd.Function):
    """all_gather whose backward sums the gradients of all processes.

    Each process weighs the same number by its own count; the sum weighs it by the count of the batch. torch has such a
    function under a name that is not the same, or warns, from 2.10 to 2.15.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size(), dim=1)[dist.get_rank()]
