"""The tensors of a run: out of the model and its optimiser as full tensors on the host, and back, however sharded."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from .checkpoints import Tensors


def collect(model: nn.Module, optimizer: torch.optim.Optimizer, keep: bool) -> tuple[Tensors, Tensors]:
    """Weights and optimiser state by name. All processes have to call it; those that do not keep get empty ones."""
    weights = {name: full for name, tensor in model.state_dict().items() if (full := _full(tensor, keep)) is not None}
    moments = {}
    for name, parameter in model.named_parameters():
        for key, tensor in optimizer.state.get(parameter, {}).items():
            if (full := _full(tensor, keep)) is not None:
                moments[f"{key}.{name}"] = full
    return weights, moments


def misfit(model: nn.Module, optimizer: torch.optim.Optimizer, weights: Tensors, moments: Tensors) -> str | None:
    """What keeps full tensors from being those of this model and optimiser, in words."""
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if fault := _differ(weights, expected):
        return fault
    trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    named = {name: parameter for name, parameter in model.named_parameters() if parameter in trained}
    keys = {"step": False, "exp_avg": True, "exp_avg_sq": True}  # of AdamW, and whether each has the parameter's shape
    begun = {entry.partition(".")[2] for entry in moments}  # one without a gradient so far has none
    shapes = {
        f"{key}.{name}": parameter.shape if like else torch.Size()
        for name, parameter in named.items()
        if name in begun
        for key, like in keys.items()
    }
    return _differ(moments, shapes)


def _differ(tensors: Tensors, shapes: dict[str, torch.Size]) -> str | None:
    """The first tensor that is missing, unknown, of another shape, or not finite."""
    if lacking := sorted(shapes.keys() - tensors.keys()):
        return f"{lacking[0]} is missing"
    if unknown := sorted(tensors.keys() - shapes.keys()):
        return f"{unknown[0]} is unknown"
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name]:
            return f"{name} is {tuple(tensor.shape)} instead of {tuple(shapes[name])}"
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return f"{name} is not finite"
    return None


@torch.no_grad()
def restore(model: nn.Module, optimizer: torch.optim.Optimizer, weights: Tensors, moments: Tensors) -> None:
    """The inverse of `collect`. Every process gives the full tensors, which may be mapped files."""
    for name, tensor in model.state_dict().items():
        tensor.copy_(_shard(weights[name], tensor))
    parameters = dict(model.named_parameters())
    for entry, tensor in moments.items():
        key, _, name = entry.partition(".")
        parameter = parameters[name]
        # the count of steps is one number, which is not sharded; all else is laid out as the parameter is
        shard = tensor.to(parameter.device) if tensor.ndim == 0 else _shard(tensor, parameter)
        optimizer.state[parameter][key] = shard.clone()


def _full(tensor: torch.Tensor, keep: bool) -> torch.Tensor | None:
    """A tensor on the host, gathered from its shards; None where it is not kept."""
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.detach().cpu().contiguous() if keep else None


def _shard(full: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's shard of a full tensor, laid out as `like`. Every process has all of it, so nothing is sent."""
    full = full.to(like.device)
    if not isinstance(like, DTensor):
        return full
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)
