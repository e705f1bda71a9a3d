"""Heads: maps of a dense backbone {block: (B, D, h, w)} → logits of K classes, a list; the first is the prediction.

Each is a level's size. The others are auxiliary, of training alone, with the weights in `head.weights`.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from ..dense.pyramid import TAPS, Pyramid

Maps = dict[int, torch.Tensor]
POOLS = (1, 2, 3, 6)  # sides of the grids that the last level is averaged over


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm2d whose statistics are those of all processes; torch's own of that kind needs a GPU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        if not self.training or processes == 1:
            return super().forward(x)
        wide = x.float()
        mean = _Sum.apply(wide.mean((0, 2, 3))) / processes  # every process has as many images
        centred = wide - mean[:, None, None]
        var = _Sum.apply(centred.square().mean((0, 2, 3))) / processes
        with torch.no_grad():
            count = processes * x.numel() / x.shape[1]
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


class _Sum(torch.autograd.Function):
    """The sum over all processes, in both directions."""

    @staticmethod
    def forward(_, x: torch.Tensor) -> torch.Tensor:
        total = x.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(_, gradient: torch.Tensor) -> torch.Tensor:
        return _Sum.forward(_, gradient)


class Linear(nn.Module):
    """Batch norm and a 1 × 1 convolution of one map, or of several side by side (DINOv2's protocol)."""

    weights = (1.0,)

    def __init__(self, dim: int, taps: Sequence[int], classes: int) -> None:
        super().__init__()
        self.taps = list(taps)
        self.norm = BatchNorm(dim * len(self.taps))
        self.classify = classifier(dim * len(self.taps), classes)

    def forward(self, maps: Maps) -> list[torch.Tensor]:
        return [self.classify(self.norm(torch.cat([maps[tap] for tap in self.taps], dim=1)))]


class UPerNet(nn.Module):
    """UPerNet (Xiao et al., 2018) on a pyramid of four levels, and an auxiliary convolutional head on the third."""

    weights = (1.0, 0.4)

    def __init__(self, dim: int, taps: Sequence[int], classes: int, channels: int = 512) -> None:
        """taps: for each level the index of the block whose map it is made from. channels: of all its maps."""
        super().__init__()
        self.pyramid = Pyramid(dim, taps)
        *upper, last = self.pyramid.channels
        self.pooled = nn.ModuleList([nn.Sequential(nn.AdaptiveAvgPool2d(k), conv(last, channels, 1)) for k in POOLS])
        self.last = conv(last + len(POOLS) * channels, channels, 3)
        self.lateral = nn.ModuleList([conv(each, channels, 1) for each in upper])
        self.smooth = nn.ModuleList([conv(channels, channels, 3) for _ in upper])
        self.fuse = conv((1 + len(upper)) * channels, channels, 3)
        self.classify = classifier(channels, classes)
        half = max(1, channels // 2)
        self.auxiliary = nn.Sequential(conv(upper[2], half, 3), classifier(half, classes))

    def forward(self, maps: Maps) -> list[torch.Tensor]:
        *upper, last = levels = self.pyramid(maps)
        size = last.shape[-2:]
        top = self.last(torch.cat([last, *(resized(pool(last), size) for pool in self.pooled)], dim=1))
        paths = [top]  # from coarse to fine
        for level, lateral in zip(upper[::-1], self.lateral[::-1], strict=True):
            paths.append(lateral(level) + resized(paths[-1], level.shape[-2:]))
        smoothed = [smooth(path) for smooth, path in zip(self.smooth, paths[:0:-1], strict=True)]
        size = smoothed[0].shape[-2:]
        fused = self.fuse(torch.cat([resized(path, size) for path in (*smoothed, top)], dim=1))
        logits = [self.classify(fused)]
        return [*logits, self.auxiliary(levels[2])] if self.training else logits


# Name → the head, shares of the depth whose blocks are tapped, and whether their maps pass the ViT's final norm.
# None: the last 4 blocks.
HEADS = {
    "upernet": (UPerNet, TAPS["dseq"], False),
    "linear": (Linear, (1.0,), True),
    "linear4": (Linear, None, True),
}


def conv(channels: int, out: int, side: int) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    layers = nn.Conv2d(channels, out, side, padding=side // 2, bias=False), BatchNorm(out), nn.ReLU(inplace=True)
    nn.init.kaiming_normal_(layers[0].weight, nonlinearity="relu")
    return nn.Sequential(*layers)


def classifier(channels: int, classes: int) -> nn.Conv2d:
    """1 × 1 convolution to logits that start near zero."""
    layer = nn.Conv2d(channels, classes, 1)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return layer


def resized(maps: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """(B, C, h, w) → (B, C, *size), bilinear."""
    return F.interpolate(maps, tuple(size), mode="bilinear", align_corners=False)
