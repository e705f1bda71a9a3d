"""Drop path whose coins belong to the sample: timm's rates and scaling, but not one generator for a whole batch.

So a step is the same however its samples are dealt to processes and rounds, and after a restart.
"""

from functools import partial

import torch
from timm.layers import DropPath
from torch import nn

from timm_dseq.engine.random import uniform
from timm_dseq.host import to_device

from ..data.order import RandomStream


class DropPathCoins:
    """Takes over the drop-path layers of a model; `toss` before each forward pass of the training."""

    def __init__(self, model: nn.Module) -> None:
        layers = [module for module in model.modules() if isinstance(module, DropPath) and module.drop_prob]
        self.rates = torch.tensor([layer.drop_prob for layer in layers])
        self.factors = torch.zeros(0)
        for place, layer in enumerate(layers):
            layer.drop_prob = 0.0  # what follows does its work
            layer.register_forward_hook(partial(self._apply, place))

    def toss(self, seeds: torch.Tensor) -> None:
        """seeds (B,), one a sample, on the device of the model."""
        if len(self.rates):
            self.rates = to_device(self.rates, seeds.device)
            kept = uniform(seeds, len(self.rates), RandomStream.DROP_PATH) >= self.rates
            self.factors = kept / (1 - self.rates)  # (B, layers)

    def _apply(self, place: int, layer: nn.Module, _inputs: tuple, branch: torch.Tensor) -> torch.Tensor:
        if not layer.training:
            return branch
        factors = self.factors[:, place].to(branch.dtype)
        return branch * factors.reshape(-1, *[1] * (branch.ndim - 1))
