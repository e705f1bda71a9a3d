"""The tensors of a run, out of the model and its optimiser and back, whole on the host whoever holds which part."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from .checkpoints import Tensors


def collect(model: nn.Module, optimizer: torch.optim.Optimizer, keep: bool) -> tuple[Tensors, Tensors]:
    """Weights and optimiser state by name. All processes have to ask; those that do not keep get empty ones."""
    weights = {
        name: whole for name, tensor in model.state_dict().items() if (whole := _whole(tensor, keep)) is not None
    }
    moments = {}
    for name, parameter in model.named_parameters():
        for key, tensor in optimizer.state.get(parameter, {}).items():
            if (whole := _whole(tensor, keep)) is not None:
                moments[f"{key}.{name}"] = whole
    return weights, moments


@torch.no_grad()
def restore(model: nn.Module, optimizer: torch.optim.Optimizer, weights: Tensors, moments: Tensors) -> None:
    """The inverse of `collect`, with the whole tensors, which may be mapped files, at hand in every process."""
    for name, tensor in model.state_dict().items():
        tensor.copy_(_part(weights[name], tensor))
    parameters = dict(model.named_parameters())
    for entry, tensor in moments.items():
        key, _, name = entry.partition(".")
        parameter = parameters[name]
        # the count of steps is a plain number everywhere, all else lies as the parameter does
        part = tensor.to(parameter.device) if tensor.ndim == 0 else _part(tensor, parameter)
        optimizer.state[parameter][key] = part.clone()


def _whole(tensor: torch.Tensor, keep: bool) -> torch.Tensor | None:
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.detach().cpu().contiguous() if keep else None


def _part(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's part of a whole tensor, laid out as `like`; all have the whole, so none is sent."""
    whole = whole.to(like.device)
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
