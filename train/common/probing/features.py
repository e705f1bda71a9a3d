"""Images → what probes read of a frozen backbone.

Of a ViT: for each of its last blocks, through the final norm, the mean of the patch tokens and the class token. Of any
other model its pooled pre-logits.
"""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

BLOCKS = 4
Features = dict[str, torch.Tensor]  # part → (B, blocks, D)


@dataclass(frozen=True)
class Layout:
    """How the parts of an image's features lie in one row: part → (blocks, D), in this order."""

    parts: tuple[tuple[str, int, int], ...]

    @property
    def width(self) -> int:
        return sum(blocks * width for _, blocks, width in self.parts)

    def rows(self, features: Features) -> torch.Tensor:
        """(B, width)"""
        return torch.cat([features[name].flatten(1) for name, *_ in self.parts], dim=1)

    def features(self, rows: torch.Tensor) -> Features:
        """The inverse of `rows`."""
        pieces = rows.split([blocks * width for _, blocks, width in self.parts], dim=1)
        return {
            name: piece.unflatten(1, (blocks, width))
            for (name, blocks, width), piece in zip(self.parts, pieces, strict=True)
        }

    def views(self, *wanted: str) -> list[str]:
        """Of these views those that the backbone has; its pooled features where it is no ViT."""
        parts = {name for name, *_ in self.parts}
        if "pooled" in parts:
            return ["pooled"]
        return [view for view in wanted if {piece.rstrip("1234") for piece in view.split("+")} <= parts]

    def columns(self, view: str) -> list[slice]:
        """Where in a row the pieces of a view lie; `class4+mean`: the last 4 class tokens and the last mean."""
        found = []
        for piece in view.split("+"):
            name, count = piece.rstrip("1234"), int(piece[-1]) if piece[-1].isdigit() else 1
            start = 0
            for part, blocks, width in self.parts:
                if part == name:
                    found.append(slice(start + (blocks - min(count, blocks)) * width, start + blocks * width))
                start += blocks * width
        return found

    def view(self, rows: torch.Tensor, view: str, first: int = 0) -> torch.Tensor:
        """(B, width of the view), of rows that begin with column `first`."""
        pieces = [rows[:, columns.start - first : columns.stop - first] for columns in self.columns(view)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

    def span(self, views: Iterable[str]) -> slice:
        """The columns from the first to the last that these views need."""
        columns = [piece for view in views for piece in self.columns(view)]
        return slice(min(piece.start for piece in columns), max(piece.stop for piece in columns))

    def width_of(self, view: str) -> int:
        return sum(columns.stop - columns.start for columns in self.columns(view))


class Frozen(nn.Module):
    """A backbone that only looks: uint8 images (B, 3, H, W) → rows of features (B, width), or the last tokens."""

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.is_vit = is_vit(model)
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def layout(self, size: tuple[int, ...]) -> Layout:
        """size: (3, H, W)."""
        device = self.mean.device
        found = self.features(torch.zeros(1, *size, dtype=torch.uint8, device=device))
        return Layout(tuple((name, part.shape[1], part.shape[2]) for name, part in found.items()))

    def normalised(self, images: torch.Tensor) -> torch.Tensor:
        return (images.float() / 255 - self.mean) / self.std

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> Features:
        if not self.is_vit:
            pooled = self.model.forward_head(self.model.forward_features(self.normalised(images)), pre_logits=True)
            return {"pooled": pooled.flatten(1)[:, None]}
        patches, prefix = self._blocks(images, min(BLOCKS, len(self.model.blocks)))
        means = torch.stack([tokens.mean(1) for tokens in patches], dim=1)
        found = {"mean": _late_norm(self.model)(means)}
        if getattr(self.model, "cls_token", None) is not None:
            found["class"] = _late_norm(self.model)(torch.stack([tokens[:, 0] for tokens in prefix], dim=1))
        return found

    @torch.no_grad()
    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        """Patch tokens of the last block, behind the class token where there is one: (B, N, D)."""
        if not self.is_vit:
            last = self.model.forward_features(self.normalised(images))
            if last.ndim == 4:
                channels_last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"
                return last.flatten(1, 2) if channels_last else last.flatten(2).transpose(1, 2)
            return last[:, None] if last.ndim == 2 else last
        patches, prefix = self._blocks(images, 1)
        if getattr(self.model, "cls_token", None) is not None:
            patches = [torch.cat([prefix[0][:, :1], patches[0]], dim=1)]
        return _late_norm(self.model)(patches[0])

    def _blocks(self, images: torch.Tensor, count: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Patch tokens and prefix tokens of the last blocks, through the final norm."""
        found = self.model.forward_intermediates(
            self.normalised(images),
            indices=count,
            norm=True,
            output_fmt="NLC",
            intermediates_only=True,
            return_prefix_tokens=True,
        )
        pairs = [both if isinstance(both, tuple) else (both, both[:, :0]) for both in found]
        return [patches for patches, _ in pairs], [prefix for _, prefix in pairs]


def is_vit(model: nn.Module) -> bool:
    """Whether timm gives this model's blocks as tokens, with those in front apart."""
    look = getattr(model, "forward_intermediates", None)
    if look is None or not hasattr(model, "num_prefix_tokens") or not hasattr(model, "blocks"):
        return False
    return {"norm", "return_prefix_tokens", "output_fmt"} <= set(inspect.signature(look).parameters)


def _late_norm(model: nn.Module) -> nn.Module:
    """The final norm of models that pool before it."""
    late = getattr(model, "fc_norm", None)
    if late is None or not isinstance(getattr(model, "norm", None), nn.Identity):
        return nn.Identity()
    return late
