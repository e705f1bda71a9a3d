"""What a run sees of its images: one random crop of each sample, or several views through windows of patches."""

from dataclasses import dataclass

import numpy as np
import torch

from timm_dseq import view_windows
from timm_dseq.engine.random import uniform

from .crops import box_draws
from .order import RandomStream, view_seeds


@dataclass(frozen=True)
class Draws:
    """The random choices for V crops of one image, or of several images side by side."""

    boxes: np.ndarray  # (V, 10, 4), by `box_draws`
    flips: torch.Tensor  # (V,) bool
    windows: torch.Tensor | None  # (V, K), the patches that each view keeps


@dataclass(frozen=True)
class Framing:
    """How samples become pixels. A run's model takes them by the same names:

    images (B, 3, S, S), uint8: the first crop of each sample, if `whole`.
    pixels (B·V, 3, K·p, p), uint8: of the patches that V views keep, those of a sample side by side, if `views`.
    """

    seed: int
    size: int  # S
    scale: tuple[float, float]  # least and greatest share of an image's area
    flip: float = 0.0  # chance
    whole: bool = True
    views: int = 0  # V
    grid: tuple[int, int] = (1, 1)  # of patches
    share: float = 0.25  # of the patches, that a view keeps

    @property
    def crops(self) -> int:
        """Of each sample."""
        return max(1, self.views)

    def seeds(self, samples: torch.Tensor) -> torch.Tensor:
        """Of each crop of samples (B, 2), those of a sample side by side: (B·crops,)."""
        return view_seeds(self.seed, samples, self.crops)

    def windows(self, seeds: torch.Tensor) -> torch.Tensor:
        """The patches that views with these seeds keep: (n, K)."""
        return view_windows(self.grid, seeds, self.share)

    def draw(self, samples: torch.Tensor) -> Draws:
        """All choices for the crops of samples (B, 2)."""
        seeds = self.seeds(samples)
        flips = uniform(seeds, 1, stream=RandomStream.COLOURS)[:, 0] < self.flip
        return Draws(box_draws(seeds, self.scale), flips, self.windows(seeds) if self.views else None)

    def draw_each(self, samples: torch.Tensor) -> list[Draws]:
        """The same for each sample by itself."""
        every = self.draw(samples)
        boxes = every.boxes.reshape(len(samples), self.crops, *every.boxes.shape[1:])
        flips = every.flips.view(len(samples), -1)
        windows = [None] * len(samples)
        if every.windows is not None:
            windows = every.windows.unflatten(0, (len(samples), -1))
        return [Draws(*own) for own in zip(boxes, flips, windows, strict=True)]
