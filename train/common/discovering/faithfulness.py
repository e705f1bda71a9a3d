"""Does a classifier need the patches that saliency puts first? Images and an order of their patches → two curves.

deletion: the patches are replaced by the image's mean colour, the first of the order first: the sooner the true class
is lost, the better the order, and the smaller the area. insertion: they are put into the blurred image: the sooner it
is known, the greater. An area is the mean of the true class's probability over the share of patches, in [0, 1].
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F

Probability = Callable[[torch.Tensor], torch.Tensor]  # images (B, 3, H, W) → that of each one's true class (B,)
BLUR = 4  # rows and columns of mean colours that are left of a blurred image


def places(maps: torch.Tensor) -> torch.Tensor:
    """The place of each patch in the order of maps (B, h, w), the most salient first: (B, h, w), 0 to h·w − 1."""
    order = maps.flatten(1).argsort(dim=1, descending=True, stable=True)
    return order.argsort(dim=1).view_as(maps)


def mixed(images: torch.Tensor, others: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
    """Patches of images where ours (B, h, w) is True, else those of the others: (B, 3, H, W)."""
    pixels = F.interpolate(ours[:, None].float(), images.shape[-2:], mode="nearest-exact")
    return torch.where(pixels > 0, images, others)


def mean_colour(images: torch.Tensor) -> torch.Tensor:
    """Each image's own, everywhere: (B, 3, H, W)."""
    return images.mean((2, 3), keepdim=True).expand_as(images)


def blurred(images: torch.Tensor) -> torch.Tensor:
    """So that shapes are gone and colours stay: (B, 3, H, W)."""
    few = F.adaptive_avg_pool2d(images, BLUR)
    return F.interpolate(few, images.shape[-2:], mode="bilinear", align_corners=False)


def areas(
    images: torch.Tensor, order: torch.Tensor, steps: int, probability: Probability
) -> tuple[torch.Tensor, torch.Tensor]:
    """The areas under the deletion and the insertion curve of each image (B,), for images (B, 3, H, W) in [0, 1] and
    the places of their patches (B, h, w)."""
    grey, blur, patches = mean_colour(images), blurred(images), order[0].numel()
    deletion, insertion = [], []
    for step in range(steps + 1):
        first = order < round(patches * step / steps)
        deletion.append(probability(mixed(images, grey, ~first)))
        insertion.append(probability(mixed(images, blur, first)))
    return tuple(torch.trapezoid(torch.stack(curve, dim=1), dim=1) / steps for curve in (deletion, insertion))
