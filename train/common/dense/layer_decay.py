"""Layer decay of a dense model: the learning rate of each layer of its ViT, and of all that is built on it."""

from collections.abc import Callable
from typing import Any

from timm.optim import param_groups_layer_decay
from torch import nn

from .backbone import backbone_of
from .settings import Optim


def layer_groups(model: nn.Module, optim: Optim) -> list[dict[str, Any]]:
    """timm's groups with layer decay: the layers of the ViT, then at full rate all that is built on it."""
    layers = _Layers(backbone_of(model).vit, model)
    not_decayed = {f"vit.{name}" for name in layers.vit.no_weight_decay()}
    return param_groups_layer_decay(layers, optim.weight_decay, not_decayed, layer_decay=optim.layer_decay)


class _Layers(nn.Module):
    """A ViT and a model that it is part of, for timm: a parameter that is in both has the first name alone."""

    def __init__(self, vit: nn.Module, model: nn.Module) -> None:
        super().__init__()
        self.vit, self.model = vit, model

    def group_matcher(self, coarse: bool = False) -> Callable[[str], tuple[float, ...]]:
        return self._layer

    @staticmethod
    def _layer(name: str) -> tuple[float, ...]:
        """The place of a parameter's layer in the order of layers: the stem, each block, the rest."""
        part, inner, number, *_ = [*name.split("."), "", ""]
        if part == "vit" and inner == "blocks":
            return 1.0, float(number)
        return (0.0,) if part == "vit" and inner not in ("norm", "fc_norm") else (float("inf"),)
