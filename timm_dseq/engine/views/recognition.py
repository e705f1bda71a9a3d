"""The loss of views: pooled views (B·V, C) → how badly each finds the others of its image in the batch, ()."""

import torch
from torch import nn
from torch.nn import functional as F

from ...errors import UserError
from ..terms.gathering import gathered
from ..vit import full_precision

HIDDEN, OUT = 1024, 64  # of the projector


class Recognition(nn.Module):
    """InfoNCE between each view of an image and the mean of its other views; the images of all processes take part.

    The projector normalises each of the V views over the batch, so it needs at least two images.
    """

    def __init__(self, width: int, views: int, temperature: float) -> None:
        """width: C, of a pooled view. views: V."""
        super().__init__()
        self.views, self.temperature = views, temperature
        layers: list[nn.Module] = []
        for inputs in (width, HIDDEN):
            layers += [nn.Linear(inputs, HIDDEN), nn.BatchNorm1d(HIDDEN, track_running_stats=False), nn.ReLU()]
        self.projector = nn.Sequential(*layers, nn.Linear(HIDDEN, OUT))

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """pooled (B·V, C): the views of an image lie side by side. Returns the mean over views, ()."""
        views = gathered(pooled.unflatten(0, (-1, self.views)), dim=0)  # (images of all processes, V, C)
        if len(views) < 2:
            raise UserError("views need at least two images in a batch, to tell them apart")
        projected = full_precision(torch.stack([self.projector(view) for view in views.unbind(1)]))
        with torch.autocast(pooled.device.type, enabled=False):
            return info_nce(projected, self.temperature)


def info_nce(views: torch.Tensor, temperature: float) -> torch.Tensor:
    """Projected views (V, B, P): each finds the mean of the other views of its image, and is found by it."""
    views = F.normalize(views, dim=2)
    others = F.normalize(views.sum(0) - views, dim=2)
    scores = views @ others.mT / temperature  # (V, B, B)
    own = torch.arange(views.shape[1], device=views.device).repeat(len(views))
    return (F.cross_entropy(scores.flatten(0, 1), own) + F.cross_entropy(scores.mT.flatten(0, 1), own)) / 2
