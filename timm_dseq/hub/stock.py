"""What a set of encoder weights is in stock timm: the architecture, the arguments, and the Hub's config.json."""

import math
import re
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import VisionTransformer

from ..dseq_jepa import ARCHITECTURES, BACKBONE, STOCK, is_size
from ..errors import UserError
from .weights import Weights, misfits

# Width of a plain ViT → its timm name and the heads that no shape shows. 1408 is I-JEPA's ViT-g.
_STOCK_BY_WIDTH = {ARCHITECTURES[ours]["embed_dim"]: stock for ours, stock in STOCK.items() if ours[-3:] != "448"}
_STOCK_BY_WIDTH[1408] = "vit_giant_patch16_gap_224"


@dataclass(frozen=True)
class Backbone:
    """An encoder as timm builds it, without this package."""

    stock: str  # the architecture's name in timm
    img_size: tuple[int, int]
    model_args: dict[str, Any] = field(default_factory=dict)  # what differs from it
    in_chans: int = 3
    num_classes: int = 0

    @property
    def dseq_name(self) -> str | None:
        """Our name for it, if it is a DSeq-JEPA backbone."""
        return next((ours for ours, stock in STOCK.items() if (stock, BACKBONE) == (self.stock, self.model_args)), None)

    def build(self) -> torch.nn.Module:
        """The model in stock timm, with random weights."""
        args = {"num_classes": self.num_classes, "img_size": self.img_size, "in_chans": self.in_chans}
        return timm.create_model(self.stock, **args, **self.model_args)

    @cached_property
    def blueprint(self) -> VisionTransformer:
        """The model without memory for its weights: names, shapes and structure. What is no plain ViT is refused."""
        try:
            with torch.device("meta"):
                model = self.build()
        except (TypeError, ValueError, LookupError, ArithmeticError, AssertionError, RuntimeError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(
                f"timm builds of {self.stock} no plain ViT ({reason}): name one, with its arguments."
            ) from error
        if not isinstance(model, VisionTransformer):
            raise UserError(f"{self.stock} is a {type(model).__name__}, no plain ViT of timm: name one.")
        return model

    def config(self, tag: str, license: str) -> dict[str, Any]:
        """The Hub's config.json: timm's schema, stock architecture, and arguments of the architecture only.

        timm's own export also writes class, channel and image sizes as arguments, with which transformers fails. A size
        or channel count other than the architecture's own has to be one, though: transformers reads nothing else.
        """
        model_args = dict(self.model_args)
        default_size = timm.get_pretrained_cfg(self.stock).input_size
        if self.img_size != tuple(default_size[1:]):
            model_args["img_size"] = list(self.img_size)
        if self.in_chans != default_size[0]:
            model_args["in_chans"] = self.in_chans
        return {
            "architecture": self.stock,
            "num_classes": self.num_classes,
            "num_features": self.blueprint.num_features,
            "global_pool": self.blueprint.global_pool,
            "model_args": model_args,
            "pretrained_cfg": {
                "tag": tag,
                "custom_load": False,
                "input_size": [self.in_chans, *self.img_size],
                "fixed_input_size": True,
                "interpolation": "bicubic",
                "crop_pct": 0.875,
                "crop_mode": "center",
                "mean": list(IMAGENET_DEFAULT_MEAN[: self.in_chans]) if self.in_chans <= 3 else [0.5] * self.in_chans,
                "std": list(IMAGENET_DEFAULT_STD[: self.in_chans]) if self.in_chans <= 3 else [0.5] * self.in_chans,
                "num_classes": self.num_classes,
                "pool_size": None,
                "first_conv": "patch_embed.proj",
                "classifier": "head",
                "license": license,
            },
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Backbone":
        """The encoder that a config.json describes; ValueError, KeyError or TypeError where it describes none."""
        architecture, num_classes = config["architecture"], config["num_classes"]
        size = config["pretrained_cfg"]["input_size"]
        args = dict(config.get("model_args", {}))
        if not isinstance(architecture, str):
            raise ValueError(f"architecture is {architecture!r}")
        if num_classes != 0 and not is_size(num_classes):
            raise ValueError(f"num_classes is {num_classes!r}")
        if not isinstance(size, list) or len(size) != 3 or not all(map(is_size, size)):
            raise ValueError(f"input_size is {size!r}")
        args.pop("img_size", None)
        args.pop("in_chans", None)
        return cls(architecture, tuple(size[1:]), args, size[0], num_classes)


@lru_cache
def registered(model_name: str) -> Backbone:
    """The encoder behind one of our names, or any ViT of timm under its own name."""
    name = model_name.partition(".")[0]
    if name not in STOCK and not timm.is_model(name):
        raise UserError(f"{model_name or 'An empty name'} is no model of timm or of timm_dseq: see timm-dseq models.")
    size = tuple(timm.get_pretrained_cfg(name).input_size[1:])
    return Backbone(STOCK[name], size, dict(BACKBONE)) if name in STOCK else Backbone(name, size)


def detect(weights: Weights) -> Backbone:
    """Tell from names and shapes which plain ViT these weights are."""
    for name, dims in {"patch_embed.proj.weight": 4, "pos_embed": 3, "blocks.0.mlp.fc1.weight": 2}.items():
        shape = tuple(weights[name].shape) if name in weights else None
        if shape is None or len(shape) != dims or 0 in shape:
            fault = f"it has no {name}" if shape is None else f"its {name} is {shape}"
            raise UserError(f"This is no plain ViT of timm: {fault}. Convert weights of a plain ViT only.")
    width, in_chans, *patch = weights["patch_embed.proj.weight"].shape
    depth = len({block[1] for name in weights if (block := re.match(r"blocks\.(\d+)\.", name))})
    class_token, fc_norm = "cls_token" in weights, "fc_norm.weight" in weights
    positions = weights["pos_embed"].shape[1]
    no_embed_class = class_token and math.isqrt(positions) ** 2 == positions
    side = math.isqrt(positions - (class_token and not no_embed_class))
    if width not in _STOCK_BY_WIDTH:
        raise UserError(f"A ViT {width} wide is not known, and its heads show in no shape: name it with --model NAME.")
    if side**2 != positions - (class_token and not no_embed_class):
        raise UserError(
            f"pos_embed holds {positions} positions, which is no square image: name it with --model NAME "
            "--img-size H W."
        )

    stock = "vit_huge_patch16_gap_448" if (width, *patch) == (1280, 16, 16) else _STOCK_BY_WIDTH[width]
    if not class_token:  # I-JEPA
        args = {"class_token": False, "global_pool": "avg", "fc_norm": fc_norm}
    elif no_embed_class:  # DSeq-JEPA
        args = {**BACKBONE, "fc_norm": fc_norm}
    else:
        args = {"global_pool": "avg" if fc_norm else "token"}
    standard = registered(stock).blueprint
    if tuple(patch) != standard.patch_embed.patch_size:
        args["patch_size"] = patch[0] if patch[0] == patch[1] else list(patch)
    if depth != len(standard.blocks):
        args["depth"] = depth
    return Backbone(stock, (side * patch[0], side * patch[1]), args, in_chans, classes(weights))


def classes(weights: Weights) -> int:
    """How many classes the head of these weights tells apart: 0 without a head."""
    if "head.weight" not in weights:
        return 0
    shape = tuple(weights["head.weight"].shape)
    if len(shape) != 2 or 0 in shape:
        raise UserError(f"head.weight is {shape}, no head of a ViT: leave it out of the checkpoint.")
    return shape[0]


def sized(backbone: Backbone, weights: Weights, asked: tuple[int, int] | None = None) -> Backbone:
    """The backbone for the image whose positions the weights hold: its own, else a square, else the size asked for.

    Where they fit none of these it stays as it is, and check_fit names them.
    """
    model, positions = backbone.blueprint, weights.get("pos_embed")
    if positions is None or positions.ndim != 3 or model.pos_embed is None:
        return backbone
    patches = positions.shape[1] - (0 if model.no_embed_class else model.num_prefix_tokens)
    patch_size = model.patch_embed.patch_size
    side = math.isqrt(max(patches, 0))
    grids = [model.patch_embed.grid_size, (side, side)]
    if asked:
        grids.append(tuple(length // p for length, p in zip(asked, patch_size, strict=True)))
    grid = next((grid for grid in grids if 0 < grid[0] * grid[1] == patches), grids[0])
    return replace(backbone, img_size=(grid[0] * patch_size[0], grid[1] * patch_size[1]))


def check_fit(weights: Weights, backbone: Backbone, mend: str = "name its model with --model NAME") -> None:
    """Every weight has its place in the model and every place its weight, or the first that has not is named."""
    missing, unused, reshaped = misfits(weights, backbone.blueprint.state_dict())
    name = backbone.dseq_name or backbone.stock
    if reshaped:
        key, ours, theirs = reshaped[0]
        raise UserError(f"{key} is {theirs} in the checkpoint and {ours} in {name}: {mend}.")
    if missing or unused:
        key, fault = (missing[0], "is not in the checkpoint") if missing else (unused[0], "has no place in the model")
        raise UserError(f"{key} {fault}, taken as {name}: {mend}.")


def macs(vit: torch.nn.Module) -> int:
    """Multiply-accumulates of one image through a plain ViT without a head, products of the attention included."""
    patches, tokens = vit.patch_embed.num_patches, vit.patch_embed.num_patches + vit.num_prefix_tokens
    per_token = sum(m.weight.numel() for m in vit.blocks.modules() if isinstance(m, torch.nn.Linear))
    attention = 2 * len(vit.blocks) * tokens**2 * vit.embed_dim
    return patches * vit.patch_embed.proj.weight.numel() + tokens * per_token + attention
