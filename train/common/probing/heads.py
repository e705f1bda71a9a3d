"""Heads that are trained together on one frozen backbone, and the published recipes that say how."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from timm.layers import AttentionPoolLatent
from timm.optim import Lars
from torch import nn

TOKENS = "tokens"  # the view of heads that see every token of the last block


@dataclass(frozen=True)
class Head:
    """One head of a grid. lr: for a batch of 256, to which it is proportional."""

    view: str
    lr: float
    weight_decay: float
    batch_norm: bool

    def build(self, width: int, classes: int) -> nn.Module:
        if self.view == TOKENS:
            return Attentive(width, classes)
        linear = nn.Linear(width, classes)
        nn.init.normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)
        return nn.Sequential(nn.BatchNorm1d(width), linear) if self.batch_norm else linear


class Attentive(nn.Module):
    """Tokens (B, N, D) → logits: one learned query, one block of cross-attention, linear."""

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
    """views: of which a head is made each, times lrs × weight_decays; share: of the lr after this share of the run."""

    views: tuple[str, ...]
    lrs: tuple[float, ...]
    weight_decays: tuple[float, ...]
    batch_norm: bool
    batch_size: int
    epochs: float | None  # None: `steps` of them, whatever the data set's length
    share: Callable[[float], float]
    optimizer: Callable[[list[dict]], torch.optim.Optimizer]
    steps: int | None = None
    scaled: bool = True  # whether the lr is for a batch of 256

    def heads(self, views: list[str]) -> list[Head]:
        return [
            Head(view, lr, decay, self.batch_norm) for view, lr, decay in product(views, self.lrs, self.weight_decays)
        ]

    def length(self, images: int, batch: int, epochs: float | None) -> int:
        """Steps of the run; epochs: where the settings say so."""
        if epochs is None and self.epochs is None:
            return self.steps
        return max(1, round((epochs or self.epochs) * images / batch))


def stepped(epochs: int, *milestones: int) -> Callable[[float], float]:
    """A tenth at each of these epochs."""
    return lambda progress: 0.1 ** sum(progress * epochs >= milestone - 1e-9 for milestone in milestones)


def cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


def _sgd(**options) -> Callable[[list[dict]], torch.optim.Optimizer]:
    return lambda groups: torch.optim.SGD(groups, momentum=0.9, **options)


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
        cosine,
        _sgd(),
        steps=12_500,
    ),
    # not published: our choice
    "attentive": Recipe((TOKENS,), (1e-3,), (0.05,), False, 256, 20, cosine, torch.optim.AdamW, scaled=False),
    "vtab": Recipe(("mean", "mean4"), (1e-3,), (0.05,), False, 256, 100, cosine, torch.optim.AdamW, scaled=False),
}


class Grid(nn.Module):
    """All heads of a run, their optimiser, and one step of all of them."""

    def __init__(self, recipe: Recipe, heads: list[Head], widths: list[int], classes: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.recipe, self.specs = recipe, heads
        self.heads = nn.ModuleList(head.build(width, classes) for head, width in zip(heads, widths, strict=True))
        groups = [
            {"params": list(module.parameters()), "lr": head.lr, "weight_decay": head.weight_decay}
            for head, module in zip(heads, self.heads, strict=True)
        ]
        self.optimizer = recipe.optimizer(groups)

    def step(self, views: dict[str, torch.Tensor], labels: torch.Tensor, progress: float) -> torch.Tensor:
        """One step on features by view → the heads' losses (H,). One by one, so that memory holds one head's logits."""
        self.train()
        self.optimizer.zero_grad(set_to_none=True)
        factor = self.recipe.share(progress) * (len(labels) / 256 if self.recipe.scaled else 1)
        losses = []
        for spec, head, group in zip(self.specs, self.heads, self.optimizer.param_groups, strict=True):
            group["lr"] = spec.lr * factor
            loss = nn.functional.cross_entropy(head(views[spec.view]), labels)
            loss.backward()
            losses.append(loss.detach())
        self.optimizer.step()
        return torch.stack(losses)

    @torch.no_grad()
    def right(self, views: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        """(H, B) bool"""
        self.eval()
        said = [head(views[spec.view]).argmax(1) for spec, head in zip(self.specs, self.heads, strict=True)]
        return torch.stack(said) == labels
