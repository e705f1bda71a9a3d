"""What functions of the engine are given: each is checked once, and the message names the argument.

Nothing here waits for a device: numbers of a tensor are looked at only where they are on the CPU.
"""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch

from .errors import UserError


def check_tensor(name: str, value: Any, shape: Sequence[int | None], letters: str, kind: str = "float") -> torch.Tensor:
    """A tensor of this shape (None: any size from 1) and kind: float, bool or int. letters: the shape as read."""
    if not isinstance(value, torch.Tensor):
        raise UserError(f"{name} is a {type(value).__name__}: give a tensor {letters}")
    found = tuple(value.shape)
    fits = len(found) == len(shape) and all(
        size == wanted if wanted is not None else size > 0 for size, wanted in zip(found, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise UserError(f"{name} has the shape {found}: give {letters}, here ({wanted})")
    whole = not (value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool)
    if not {"float": value.dtype.is_floating_point, "bool": value.dtype == torch.bool, "int": whole}[kind]:
        words = {"float": "fractions", "bool": "truth values", "int": "whole numbers"}[kind]
        raise UserError(f"{name} is of type {value.dtype}: give {words}")
    return value


def check_images(model: torch.nn.Module, images: Any, name: str = "images") -> None:
    """Images (B, C, H, W) as this ViT takes them: of its channels, size, type and device; finite, on the CPU."""
    patches = model.patch_embed
    weight = patches.proj.weight
    size = (None, None) if patches.img_size is None or not patches.strict_img_size else tuple(patches.img_size)
    check_tensor(name, images, (None, weight.shape[1], *size), "(B, C, H, W)")
    if images.device != weight.device:
        raise UserError(f"{name} are on {images.device} and the model is on {weight.device}: move one of them")
    if images.dtype != weight.dtype and not torch.is_autocast_enabled(images.device.type):
        raise UserError(f"{name} are of type {images.dtype} and the model of {weight.dtype}: convert one of them")
    if images.device.type == "cpu" and not images.isfinite().all():
        raise UserError(f"{name} hold numbers that are not finite")


def check_seeds(seeds: Any, count: int | None = None) -> None:
    """Seeds (B,), whole numbers: one for each image."""
    check_tensor("seeds", seeds, (count,), "(B,), one for each image", "int")


def check_grid(grid: Any) -> None:
    """(h, w), whole numbers from 1."""
    if not isinstance(grid, (tuple, list)) or len(grid) != 2 or not all(_whole(side, 1) for side in grid):
        raise UserError(f"grid={grid!r} is none: give (rows, columns) of patches")


def check_span(name: str, span: Any, most: float) -> None:
    """(least, greatest), numbers above 0."""
    numbers = isinstance(span, (tuple, list)) and len(span) == 2 and all(isinstance(x, Real) for x in span)
    if not numbers or not 0 < span[0] <= span[1] <= most:
        until = "" if most == float("inf") else f", up to {most:g}"
        raise UserError(f"{name}={span!r} is none: give (least, greatest), numbers above 0{until}")


def check_share(name: str, value: Any) -> None:
    """A number from 0 to 1."""
    if not isinstance(value, Real) or not 0 <= value <= 1:
        raise UserError(f"{name}={value!r} is no share: give a number from 0 to 1")


def check_positive(name: str, value: Any) -> None:
    """A finite number above 0."""
    if not isinstance(value, Real) or not 0 < value < float("inf"):
        raise UserError(f"{name}={value!r}: give a number above 0")


def check_whole(name: str, value: Any, least: int) -> None:
    """A whole number from `least` on."""
    if not _whole(value, least):
        raise UserError(f"{name}={value!r}: give a whole number from {least} on")


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= least
