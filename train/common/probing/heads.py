"""Heads that are trained together on the features of one frozen backbone, and the published recipes for them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np
import torch
from timm.layers import AttentionPoolLatent
from timm.optim import Lars
from torch import nn

from ..run.schedules import cosine

TOKENS = "tokens"  # the view of heads that read every token of the last block


@dataclass(frozen=True)
class HeadSpec:
    """One head of a grid. lr: at batch 256 where the recipe scales it with the batch."""

    view: str
    lr: float
    weight_decay: float
    batch_norm: bool

    def build(self, width: int, classes: int) -> nn.Module:
        """The head with fresh weights: features (B, width), or tokens (B, N, width), → logits (B, classes)."""
        if self.view == TOKENS:
            return AttentiveHead(width, classes)
        linear = nn.Linear(width, classes)
        nn.init.normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)
        return nn.Sequential(nn.BatchNorm1d(width), linear) if self.batch_norm else linear


class AttentiveHead(nn.Module):
    """Tokens (B, N, D) → logits (B, classes): one learned query, one block of cross-attention, linear."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        heads = next(count for count in (width // 64, 8, 4, 2, 1) if count and width % count == 0)
        self.norm = nn.LayerNorm(width)
        self.pool = AttentionPoolLatent(width, num_heads=heads, norm_layer=nn.LayerNorm)
        self.linear = nn.Linear(width, classes)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.linear(self.pool(self.norm(tokens)))


@dataclass(frozen=True)
class Recipe:
    """How the heads of a protocol are trained. A grid has one head for each view × learning rate × weight decay.

    lr_factor: share of the run that is done (0 to 1) → factor of the learning rates.
    """

    views: tuple[str, ...]
    lrs: tuple[float, ...]
    weight_decays: tuple[float, ...]
    batch_norm: bool  # in front of the linear layer
    batch_size: int
    epochs: float | None  # None: `steps` of them, whatever the data set's length
    lr_factor: Callable[[float], float]
    optimizer: Callable[[list[dict]], torch.optim.Optimizer]
    steps: int | None = None
    lr_scales: bool = True  # whether learning rates are for batch 256 and scale linearly with the batch

    def heads(self, views: list[str]) -> list[HeadSpec]:
        """The grid's heads on these views."""
        return [
            HeadSpec(view, lr, decay, self.batch_norm)
            for view, lr, decay in product(views, self.lrs, self.weight_decays)
        ]

    def length(self, images: int, batch: int, epochs: float | None) -> int:
        """Steps of the run. epochs: of the settings; None: as published."""
        if epochs is None and self.epochs is None:
            return self.steps
        return max(1, round((epochs or self.epochs) * images / batch))


@dataclass(frozen=True)
class HeadTraining:
    """The training of one seed's heads: on which images, on which the best head is chosen, and how long."""

    recipe: Recipe
    views: list[str]
    seed: int
    rows: np.ndarray  # of the training split, ascending
    validation: np.ndarray | None  # rows of the training split to choose on; None: the choice is made on the test split
    batch: int
    steps: int

    @property
    def heads(self) -> list[HeadSpec]:
        return self.recipe.heads(self.views)


def stepped(epochs: int, *milestones: int) -> Callable[[float], float]:
    """Divided by 10 at each of these epochs, of so many."""
    return lambda done: 0.1 ** sum(done * epochs >= milestone - 1e-9 for milestone in milestones)


def _sgd(**options) -> Callable[[list[dict]], torch.optim.Optimizer]:
    return lambda groups: torch.optim.SGD(groups, momentum=0.9, **options)


_COSINE = partial(cosine, start=1.0, end=0.0)
_DINOV2_LRS = (*(a * 10.0**b for b in range(-5, -1) for a in (1, 2, 5)), 0.1)

RECIPES = {
    "dseq": Recipe(("mean", "mean4"), (0.01,), (5e-4,), True, 256, 28, stepped(28, 8, 16, 24), _sgd(nesterov=True)),
    "ijepa": Recipe(
        ("mean", "mean4"),
        (0.01, 0.05, 0.001),
        (5e-4, 0.0),
        True,
        16384,
        50,
        stepped(50, 15, 30, 45),
        lambda groups: Lars(groups, momentum=0.9, always_adapt=True),  # the heads without weight decay too
    ),
    "dinov2": Recipe(
        ("class", "class4", "class+mean", "class4+mean"),
        _DINOV2_LRS,
        (0.0,),
        False,
        1024,
        None,
        _COSINE,
        _sgd(),
        steps=12_500,
    ),
    # not published: our choice
    "attentive": Recipe((TOKENS,), (1e-3,), (0.05,), False, 256, 20, _COSINE, torch.optim.AdamW, lr_scales=False),
    "vtab": Recipe(("mean", "mean4"), (1e-3,), (0.05,), False, 256, 100, _COSINE, torch.optim.AdamW, lr_scales=False),
}


class Grid(nn.Module):
    """All heads of a run and their one optimiser."""

    def __init__(self, recipe: Recipe, specs: list[HeadSpec], widths: list[int], classes: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.recipe, self.specs = recipe, specs
        self.heads = nn.ModuleList(spec.build(width, classes) for spec, width in zip(specs, widths, strict=True))
        groups = [
            {"params": list(head.parameters()), "lr": spec.lr, "weight_decay": spec.weight_decay}
            for spec, head in zip(specs, self.heads, strict=True)
        ]
        self.optimizer = recipe.optimizer(groups)

    def step(self, views: dict[str, torch.Tensor], labels: torch.Tensor, done: float) -> torch.Tensor:
        """One step of every head on a batch's features by view, each (B, width), and labels (B,): losses (H,).

        done: the share of the run behind this step. The heads take turns, so that memory holds the logits of one.
        """
        self.train()
        self.optimizer.zero_grad(set_to_none=True)
        factor = self.recipe.lr_factor(done) * (len(labels) / 256 if self.recipe.lr_scales else 1)
        losses = []
        for spec, head, group in zip(self.specs, self.heads, self.optimizer.param_groups, strict=True):
            group["lr"] = spec.lr * factor
            loss = nn.functional.cross_entropy(head(views[spec.view]), labels)
            loss.backward()
            losses.append(loss.detach())
        self.optimizer.step()
        return torch.stack(losses)

    @torch.no_grad()
    def correct(self, views: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        """Whether each head's most likely class is the label: (H, B) bool."""
        self.eval()
        classes = [head(views[spec.view]).argmax(1) for spec, head in zip(self.specs, self.heads, strict=True)]
        return torch.stack(classes) == labels
