"""From maps (B, D, h, w) of a ViT to levels of four sizes: ×4, ×2, ×1, ×½, strides 4, 8, 16, 32 for patches of 16.

Two kinds: `dseq` makes each level from a tap of its own, `vitdet` all of them from the last map (Li et al., 2022).
"""

from collections.abc import Sequence

import torch
from timm.layers import LayerNorm2d
from torch import nn

# Kind → shares of the depth whose blocks are tapped, one for each level; of 12 blocks these are 3, 5, 7, 11.
TAPS = {"dseq": (1 / 3, 1 / 2, 2 / 3, 1.0), "vitdet": (1.0,) * 4}
# Kind → shares of the depth whose blocks attend to the whole map, where the others do in windows.
EVERYWHERE = {"dseq": TAPS["dseq"], "vitdet": (1 / 4, 1 / 2, 3 / 4, 1.0)}


class Pyramid(nn.Module):
    """`pyramid(maps)`: the levels, the largest first. `channels`: of each level, D/4, D/2, D, D."""

    def __init__(self, dim: int, taps: Sequence[int]) -> None:
        """taps: for each level the index of the block whose map it is made from."""
        super().__init__()
        self.taps = list(taps)
        self.channels = [dim // 4, dim // 2, dim, dim]
        self.resample = nn.ModuleList(
            [
                nn.Sequential(twice(dim, dim // 2), LayerNorm2d(dim // 2), nn.GELU(), twice(dim // 2, dim // 4)),
                twice(dim, dim // 2),
                nn.Identity(),
                nn.MaxPool2d(2, ceil_mode=True),
            ]
        )

    def forward(self, maps: dict[int, torch.Tensor]) -> list[torch.Tensor]:
        return [resample(maps[tap]) for resample, tap in zip(self.resample, self.taps, strict=True)]


def twice(dim: int, out: int) -> nn.ConvTranspose2d:
    """(B, dim, h, w) → (B, out, 2h, 2w)."""
    return nn.ConvTranspose2d(dim, out, 2, stride=2)
