"""A backbone and how it looks at pictures: the whole picture, squashed to the model's size → maps of its patches."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.models import VisionTransformer

from timm_dseq import UserError
from timm_dseq.engine.saliency import QUERIES, check_query
from timm_dseq.engine.vit import check_plain, grid_of
from timm_dseq.hub.load import data_config, load_backbone

from ..data.digests import function_digest
from .maps import Maps, prior_maps, query_maps


@dataclass(frozen=True)
class Looking:
    """A plain ViT, and the queries that it can answer."""

    model: VisionTransformer
    name: str
    queries: list[str]
    left_out: list[str]  # one line for each query that it cannot answer
    block: int | float
    size: tuple[int, int]  # of images, height and width
    mean: torch.Tensor
    std: torch.Tensor

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return grid_of(self.model, torch.empty(1, 3, *self.size))

    def digest(self) -> str:
        """Of all that a map of a query comes from but images: weights, what the model does with them, its colours."""
        about = function_digest(self.model), self.mean.flatten().tolist(), self.std.flatten().tolist()
        return hashlib.blake2b(repr(about).encode(), digest_size=8).hexdigest()

    def show(self, picture: Image.Image) -> np.ndarray:
        """A picture → uint8 (3, H, W)."""
        return np.array(picture.resize(self.size[::-1])).transpose(2, 0, 1)

    def normalised(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [0, 1] → as the model takes them, on its device."""
        return (images.to(self.mean.device) - self.mean) / self.std

    def maps(self, images: torch.Tensor, priors: bool = True) -> Maps:
        """Of images (B, 3, H, W) in [0, 1], with those of priors; on the host."""
        maps = query_maps(self.model, self.normalised(images), self.queries, self.block)
        maps |= prior_maps(images, grid_of(self.model, images)) if priors else {}
        return {name: each.cpu() for name, each in maps.items()}


def look_with(config: Any, name: str, device: torch.device) -> Looking:
    """The model of this name, with the settings' queries, block, img_size, random, args and seed; checked with a black
    image. A query that is asked for and cannot be answered ends in UserError."""
    model, shown = load_backbone(name, config.img_size, random=config.random, seed=config.seed, **config.args)
    check_plain(model)
    about = data_config(model)
    black = torch.zeros(1, *about["input_size"], device=device)
    queries, left_out = _answerable(model.to(device), black, config.queries, config.block)
    mean, std = (torch.tensor(about[key], device=device)[:, None, None] for key in ("mean", "std"))
    return Looking(model, shown, queries, left_out, config.block, tuple(about["input_size"][1:]), mean, std)


def _answerable(
    model: VisionTransformer, black: torch.Tensor, asked: Sequence[str], block: int | float
) -> tuple[list[str], list[str]]:
    """Of the queries asked for, or of all: those that the model can answer, and a line for each of the others."""
    found, left_out = [], []
    for query in asked or QUERIES:
        try:
            check_query(model, query)
            query_maps(model, black, [query], block)
            found.append(query)
        except UserError as error:
            if asked or not str(error).startswith("query="):  # nothing is wrong with the query
                raise
            left_out.append(f"left out: {str(error).partition(':')[0]}")
    return found, left_out
