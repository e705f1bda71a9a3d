"""Rows of all processes, side by side in each of them, and differentiable."""

import torch
import torch.distributed as dist


def gathered(x: torch.Tensor, dim: int) -> torch.Tensor:
    """x of all processes, side by side along a dimension; its shape is the same in every process."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return x
    return _Gather.apply(x, dim)


class _Gather(torch.autograd.Function):
    """all_gather whose backward sums the gradients of all processes.

    Each process weighs a term by its own count, so the sum weighs it by the count of the whole batch. torch has no such
    function that exists in 2.10 and is not deprecated in 2.15.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, dim: int) -> torch.Tensor:
        ctx.dim = dim
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim=dim)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size(), dim=ctx.dim)[dist.get_rank()], None
