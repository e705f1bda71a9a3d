"""Images → the features of a frozen backbone that probes read.

Of a ViT: for each of its last four blocks, through the final norm, the mean of the patch tokens (`mean`) and the class
token (`class`). Of any other model: its pooled pre-logits (`pooled`).

A view names what a head reads of them: `mean` is the last block's mean, `class4+mean` the last four class tokens and
the last mean.
"""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from ..salient_crop import salient_views

BLOCKS = 4  # whose features are read
Features = dict[str, torch.Tensor]  # part → (B, blocks, D)


@dataclass(frozen=True)
class RowLayout:
    """Where the features of an image lie in one row of numbers. parts: (name, blocks, D), in the order of the row."""

    parts: tuple[tuple[str, int, int], ...]

    @property
    def width(self) -> int:
        """Numbers in a row."""
        return sum(blocks * width for _, blocks, width in self.parts)

    def rows(self, features: Features) -> torch.Tensor:
        """Features, each (B, blocks, D) → rows (B, width)."""
        return torch.cat([features[name].flatten(1) for name, *_ in self.parts], dim=1)

    def features(self, rows: torch.Tensor) -> Features:
        """Rows (B, width) → features: the inverse of `rows`."""
        pieces = rows.split([blocks * width for _, blocks, width in self.parts], dim=1)
        return {
            name: piece.unflatten(1, (blocks, width))
            for (name, blocks, width), piece in zip(self.parts, pieces, strict=True)
        }

    def available(self, *views: str) -> list[str]:
        """Those of these views that the backbone has; of a backbone that is no ViT, its pooled features instead."""
        parts = {name for name, *_ in self.parts}
        if "pooled" in parts:
            return ["pooled"]
        return [view for view in views if {piece.rstrip("1234") for piece in view.split("+")} <= parts]

    def columns(self, view: str) -> list[slice]:
        """The columns of a row that a view reads, one slice for each of its pieces."""
        slices = []
        for piece in view.split("+"):
            name, count = piece.rstrip("1234"), int(piece[-1]) if piece[-1].isdigit() else 1
            start = 0
            for part, blocks, width in self.parts:
                if part == name:
                    slices.append(slice(start + (blocks - min(count, blocks)) * width, start + blocks * width))
                start += blocks * width
        return slices

    def view(self, rows: torch.Tensor, view: str, first: int = 0) -> torch.Tensor:
        """A view (B, width of the view) of rows (B, columns) whose first column is the layout's column `first`."""
        pieces = [rows[:, columns.start - first : columns.stop - first] for columns in self.columns(view)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

    def span(self, views: Iterable[str]) -> slice:
        """The columns from the first to the last that these views read."""
        columns = [piece for view in views for piece in self.columns(view)]
        return slice(min(piece.start for piece in columns), max(piece.stop for piece in columns))

    def width_of(self, view: str) -> int:
        """Numbers in a view."""
        return sum(columns.stop - columns.start for columns in self.columns(view))


class FrozenBackbone(nn.Module):
    """A backbone in evaluation mode, without gradients: uint8 images (B, 3, H, W) → features, or the last tokens."""

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.is_vit = is_vit(model)
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def layout(self, size: tuple[int, ...]) -> RowLayout:
        """Where the features of an image of this size (3, H, W) lie in a row, found with a black image."""
        features = self.features(self.black_image(size))
        return RowLayout(tuple((name, part.shape[1], part.shape[2]) for name, part in features.items()))

    def token_width(self, size: tuple[int, ...]) -> int:
        """D of `tokens`, of images of this size (3, H, W)."""
        return self.tokens(self.black_image(size)).shape[-1]

    def black_image(self, size: tuple[int, ...]) -> torch.Tensor:
        """(1, 3, H, W) uint8, on the backbone's device."""
        return torch.zeros(1, *size, dtype=torch.uint8, device=self.mean.device)

    def normalised(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, H, W) → float32, as the backbone expects it."""
        return (images.float() / 255 - self.mean) / self.std

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> Features:
        """uint8 (B, 3, H, W) → each part (B, blocks, D)."""
        return self._features(self.normalised(images))

    @torch.no_grad()
    def salient_features(self, images: torch.Tensor, query: str) -> Features:
        """The same of the views of the most salient regions: uint8 (B, 3, 2H, 2W) → each part (B, blocks, D)."""
        return self._features(salient_views(self.model, self.normalised(images), query))

    def _features(self, images: torch.Tensor) -> Features:
        """Normalised (B, 3, H, W) → each part (B, blocks, D)."""
        if not self.is_vit:
            pooled = self.model.forward_head(self.model.forward_features(images), pre_logits=True)
            return {"pooled": pooled.flatten(1)[:, None]}
        patches, prefix = self._last_blocks(images, min(BLOCKS, len(self.model.blocks)))
        means = torch.stack([tokens.mean(1) for tokens in patches], dim=1)
        features = {"mean": _late_norm(self.model)(means)}
        if getattr(self.model, "cls_token", None) is not None:
            features["class"] = _late_norm(self.model)(torch.stack([tokens[:, 0] for tokens in prefix], dim=1))
        return features

    @torch.no_grad()
    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        """Patch tokens of the last block, behind the class token where there is one: (B, N, D)."""
        if not self.is_vit:
            last = self.model.forward_features(self.normalised(images))
            if last.ndim == 4:
                channels_last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"
                return last.flatten(1, 2) if channels_last else last.flatten(2).transpose(1, 2)
            return last[:, None] if last.ndim == 2 else last
        patches, prefix = self._last_blocks(self.normalised(images), 1)
        if getattr(self.model, "cls_token", None) is not None:
            patches = [torch.cat([prefix[0][:, :1], patches[0]], dim=1)]
        return _late_norm(self.model)(patches[0])

    def _last_blocks(self, images: torch.Tensor, count: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Patch tokens (B, N, D) and prefix tokens (B, prefix, D) of the last blocks, through the final norm."""
        blocks = self.model.forward_intermediates(
            images,
            indices=count,
            norm=True,
            output_fmt="NLC",
            intermediates_only=True,
            return_prefix_tokens=True,
        )
        pairs = [both if isinstance(both, tuple) else (both, both[:, :0]) for both in blocks]
        return [patches for patches, _ in pairs], [prefix for _, prefix in pairs]


def is_vit(model: nn.Module) -> bool:
    """Whether timm can return the tokens of this model's blocks, patch tokens and prefix tokens apart."""
    intermediates = getattr(model, "forward_intermediates", None)
    if intermediates is None or not hasattr(model, "num_prefix_tokens") or not hasattr(model, "blocks"):
        return False
    return {"norm", "return_prefix_tokens", "output_fmt"} <= set(inspect.signature(intermediates).parameters)


def _late_norm(model: nn.Module) -> nn.Module:
    """The final norm of models that pool first and normalise then; else nothing."""
    late = getattr(model, "fc_norm", None)
    if late is None or not isinstance(getattr(model, "norm", None), nn.Identity):
        return nn.Identity()
    return late
