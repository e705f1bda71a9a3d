"""Drop path (stochastic depth) whose random numbers belong to the sample, with timm's rates and scaling.

timm draws them from one generator for a whole batch. Here a sample's branches are dropped by its own seed, so a step is
the same however its samples are dealt to processes and rounds, and after a restart.
"""

from functools import partial

import torch
from timm.layers import DropPath
from torch import nn

from timm_dseq.engine.random import uniform
from timm_dseq.host import to_device

from ..data.order import RandomStream


class PerSampleDropPath:
    """Replaces what a model's DropPath layers do. Call `draw` before each forward pass in training."""

    def __init__(self, model: nn.Module) -> None:
        layers = [module for module in model.modules() if isinstance(module, DropPath) and module.drop_prob]
        self.rates = torch.tensor([layer.drop_prob for layer in layers])  # (layers,)
        self.factors = torch.zeros(0)  # (B, layers): 0 where a branch is dropped, 1 / (1 - rate) where it is kept
        for number, layer in enumerate(layers):
            layer.drop_prob = 0.0  # the hook does its work
            layer.register_forward_hook(partial(self._apply, number))

    def draw(self, seeds: torch.Tensor) -> None:
        """Choose the branches that are dropped, by the samples' seeds (B,), on the device of the model."""
        if len(self.rates):
            self.rates = to_device(self.rates, seeds.device)
            kept = uniform(seeds, len(self.rates), RandomStream.DROP_PATH) >= self.rates
            self.factors = kept / (1 - self.rates)

    def _apply(self, number: int, layer: nn.Module, _inputs: tuple, branch: torch.Tensor) -> torch.Tensor:
        """branch: (B·k, …), the k rows (an image's windows) of each sample side by side."""
        if not layer.training:
            return branch
        factors = self.factors[:, number].to(branch.dtype)
        factors = factors[:, None].expand(-1, len(branch) // len(factors))
        return branch * factors.reshape(-1, *[1] * (branch.ndim - 1))
