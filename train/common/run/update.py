"""One optimiser step on gradients that are sums over a batch, without waiting for the device."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def update(
    parameters: Iterable[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    divisor: torch.Tensor | float,
    clip: float | None,
) -> torch.Tensor:
    """Divide the gradients by `divisor`, clip, step. Returns their norm, (), before the clipping.

    divisor: what the batch's loss was summed over (tokens, images), divided by the number of processes, since these
    have averaged their gradients. A step whose gradient is not finite is left out.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    torch._foreach_div_(local, divisor)
    norm = torch.nn.utils.get_total_norm(gradients)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if clip:
        torch._foreach_mul_(local, (clip / (norm + 1e-6)).clamp(max=1.0))
    optimizer.found_inf = (~norm.isfinite()).float()  # AdamW reads it on the device, and leaves the step out
    optimizer.grad_scale = None
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
