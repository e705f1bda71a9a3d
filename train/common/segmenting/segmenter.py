"""A backbone with its head: images (B, 3, H, W) → logits of every pixel (B, K, H, W); large images through windows."""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from ..dense.backbone import DenseBackbone
from .classes import IGNORED
from .heads import resized

AT_ONCE = 4  # windows


class Segmenter(nn.Module):
    """`segmenter(images)`: a list of logits (B, K, H, W), the prediction and, in training, those of auxiliary heads."""

    def __init__(
        self, backbone: DenseBackbone, head: nn.Module, mean: Sequence[float], std: Sequence[float], frozen: bool
    ) -> None:
        """mean, std: of the colours, 0 … 1. frozen: whether the backbone stays as it is."""
        super().__init__()
        self.backbone, self.head, self.frozen = backbone, head, frozen
        if frozen:
            backbone.requires_grad_(False)
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, 255 * torch.tensor(values)[:, None, None], persistent=False)

    def train(self, mode: bool = True) -> "Segmenter":
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = self.backbone((images - self.mean) / self.std)
        (height, width), (down, across) = images.shape[-2:], self.backbone.vit.patch_embed.patch_size
        padded = (-(-height // down) * down, -(-width // across) * across)  # whole patches, as the backbone has them
        return [resized(logits.float(), padded)[..., :height, :width] for logits in self.head(maps)]


def losses(logits: Sequence[torch.Tensor], numbers: torch.Tensor) -> list[torch.Tensor]:
    """Of each head the cross entropy (), summed over images: (B, K, H, W), (B, H, W) of classes or IGNORED.

    An image's is its sum over the pixels that have a class, by the number of all its pixels, as in mmsegmentation.
    """
    targets = numbers.long()
    pixels = targets[0].numel()
    return [F.cross_entropy(each, targets, ignore_index=IGNORED, reduction="sum") / pixels for each in logits]


def sliding(
    logits_of: Callable[[torch.Tensor], torch.Tensor], image: torch.Tensor, window: int, stride: int
) -> torch.Tensor:
    """The logits (K, H, W) of an image (3, H, W): the mean over all windows that see a pixel.

    logits_of: (n, 3, h, w) → (n, K, h, w). Windows are window × window, or the image's side where that is less.
    """
    height, width = image.shape[-2:]
    size = (min(window, height), min(window, width))
    places = [(top, left) for top in starts(height, size[0], stride) for left in starts(width, size[1], stride)]
    total, seen = None, image.new_zeros(height, width, dtype=torch.float32)
    for first in range(0, len(places), AT_ONCE):
        parts = [(slice(top, top + size[0]), slice(left, left + size[1])) for top, left in places[first:][:AT_ONCE]]
        logits = logits_of(torch.stack([image[:, rows, columns] for rows, columns in parts]))
        total = logits.new_zeros(logits.shape[1], height, width) if total is None else total
        for (rows, columns), own in zip(parts, logits, strict=True):
            total[:, rows, columns] += own
            seen[rows, columns] += 1
    return total / seen


def starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side: every `stride` pixels, the last one at the end of the image."""
    return [*range(0, length - window, stride), length - window]
