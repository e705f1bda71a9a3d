"""An encoder as stock timm knows it: the architecture's name, its arguments, and the config.json that the Hub wants.

Stock timm is timm without this package. The description comes from one of our names, from a config.json, or from the
names and shapes of weights.
"""

import math
import re
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import VisionTransformer

from ..dseq_jepa import ARCHITECTURES, BACKBONE, META_TAG, STOCK, is_size
from ..errors import UserError, similar
from .weights import Weights, check_types, misfits

# Width of a plain ViT → its timm name and the heads that no shape shows. 1408 is I-JEPA's ViT-g.
_STOCK_BY_WIDTH = {ARCHITECTURES[ours]["embed_dim"]: stock for ours, stock in STOCK.items() if ours[-3:] != "448"}
_STOCK_BY_WIDTH[1408] = "vit_giant_patch16_gap_224"
IJEPA = {"class_token": False, "global_pool": "avg", "fc_norm": False}  # Meta's encoders, in timm's words


@dataclass(frozen=True)
class StockModel:
    """What stock timm has to be told to build an encoder."""

    architecture: str  # its name in timm
    img_size: tuple[int, int]
    model_args: dict[str, Any] = field(default_factory=dict)  # where it differs from the architecture's defaults
    in_chans: int = 3
    num_classes: int = 0

    @property
    def dseq_name(self) -> str | None:
        """Our name for it, if it is a DSeq-JEPA backbone."""
        same = (name for name, stock in STOCK.items() if (stock, BACKBONE) == (self.architecture, self.model_args))
        return next(same, None)

    def build(self) -> torch.nn.Module:
        """The model, with random weights."""
        args = {"num_classes": self.num_classes, "img_size": self.img_size, "in_chans": self.in_chans}
        return timm.create_model(self.architecture, **args, **self.model_args)

    @cached_property
    def blueprint(self) -> VisionTransformer:
        """The model on the meta device: names, shapes and structure, without memory for its weights."""
        failure = None
        with torch.device("meta"):
            try:
                model = self.build()
            except (TypeError, ValueError, LookupError, ArithmeticError, AssertionError, RuntimeError) as error:
                failure = error
                model = timm.create_model(self.architecture)  # not a ViT? most others know no img_size
        check_plain_vit(model, self.architecture)
        if failure:
            reason = (str(failure) or type(failure).__name__).splitlines()[0]
            raise UserError(
                f"timm makes no plain ViT of {self.architecture} with these arguments ({reason}): check them."
            ) from failure
        return model

    def config(self, tag: str, license: str) -> dict[str, Any]:
        """The content of config.json, in timm's schema.

        timm's own export repeats the numbers of classes and channels and the image size in model_args, with which
        transformers fails. But a size or channel number that is not the architecture's default has to be in
        model_args, since transformers reads nothing else.
        """
        model_args = dict(self.model_args)
        default_size = timm.get_pretrained_cfg(self.architecture).input_size
        if self.img_size != tuple(default_size[1:]):
            model_args["img_size"] = list(self.img_size)
        if self.in_chans != default_size[0]:
            model_args["in_chans"] = self.in_chans
        return {
            "architecture": self.architecture,
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
    def from_config(cls, config: dict[str, Any]) -> "StockModel":
        """The encoder that a config.json describes; ValueError, KeyError or TypeError if it describes none."""
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


def check_plain_vit(model: torch.nn.Module, name: str) -> None:
    """Refuse what is not timm's VisionTransformer: the method reads its blocks, patch tokens and class token."""
    if not isinstance(model, VisionTransformer):
        raise UserError(
            f"{name} is a {type(model).__name__}, no plain ViT of timm: name one, such as dseq_jepa_vit_b16 or "
            "vit_base_patch16_224."
        )


@lru_cache
def registered(model_name: str) -> StockModel:
    """The encoder behind one of our names, or any ViT of timm by its name; a tag after the dot decides its size."""
    name = model_name.partition(".")[0]
    if not timm.is_model(name):
        hint = similar(name, timm.list_models())
        raise UserError(
            f"{model_name or 'An empty name'} is no model of timm or of timm_dseq{hint}: see timm-dseq models."
        )
    tagged = model_name in timm.list_models(f"{name}.*", include_tags=True)
    size = tuple(timm.get_pretrained_cfg(model_name if tagged else name).input_size[1:])
    if name not in STOCK:
        return StockModel(name, size)
    return StockModel(STOCK[name], size, dict(IJEPA if model_name.endswith(f".{META_TAG}") else BACKBONE))


def described(name: str, img_size: int | tuple[int, int], args: dict[str, Any]) -> StockModel:
    """The encoder that timm.create_model(name, img_size=…, **args) makes, args as a settings file may hold them."""
    stock, args = registered(name), dict(args)
    size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    classes, channels = args.pop("num_classes", 0), args.pop("in_chans", stock.in_chans)
    rates = [key for key in args if key.endswith("_rate")]  # of dropout, which no trained model has
    model_args = {**stock.model_args, **{key: value for key, value in args.items() if key not in rates}}
    return StockModel(stock.architecture, size, model_args, channels, classes)


def detect(weights: Weights) -> StockModel:
    """Which plain ViT these weights are, by their names and shapes. Heads and activations do not show."""
    for name, dims in {"patch_embed.proj.weight": 4, "pos_embed": 3, "blocks.0.mlp.fc1.weight": 2}.items():
        shape = tuple(weights[name].shape) if name in weights else None
        if shape is None or len(shape) != dims or 0 in shape:
            fault = f"it has no {name}" if shape is None else f"its {name} is {shape}"
            raise UserError(f"This is no plain ViT of timm: {fault}. Give weights of a plain ViT.")
    width, in_chans, *patch = weights["patch_embed.proj.weight"].shape
    depth = len({block[1] for name in weights if (block := re.match(r"blocks\.(\d+)\.", name))})
    class_token, fc_norm = "cls_token" in weights, "fc_norm.weight" in weights
    positions = weights["pos_embed"].shape[1]
    registers = _registers(weights)
    no_embed_class = class_token and math.isqrt(positions) ** 2 == positions
    patches = positions - (0 if no_embed_class else class_token + registers)
    side = math.isqrt(patches)
    if width not in _STOCK_BY_WIDTH:
        raise UserError(
            f"A ViT {width} wide is not known, and no shape shows its heads: timm-dseq convert FILE --model NAME."
        )
    if side**2 != patches:
        raise UserError(
            f"pos_embed holds {positions} positions, which is no square image: timm-dseq convert FILE --model NAME "
            "--img-size H W."
        )

    stock = "vit_huge_patch16_gap_448" if (width, *patch) == (1280, 16, 16) else _STOCK_BY_WIDTH[width]
    if not class_token:  # I-JEPA
        args = {**IJEPA, "fc_norm": fc_norm}
    elif no_embed_class:  # DSeq-JEPA
        args = {**BACKBONE, "fc_norm": fc_norm}
    else:
        args = {"global_pool": "avg" if fc_norm else "token"}
    default = registered(stock).blueprint
    if tuple(patch) != default.patch_embed.patch_size:
        args["patch_size"] = patch[0] if patch[0] == patch[1] else list(patch)
    if depth != len(default.blocks):
        args["depth"] = depth
    if registers:
        args["reg_tokens"] = registers
    if "blocks.0.ls1.gamma" in weights:  # the value that they began with plays no part any more
        args["init_values"] = 1e-5
    return StockModel(stock, (side * patch[0], side * patch[1]), args, in_chans, class_count(weights))


def _registers(weights: Weights) -> int:
    """The number of register tokens in these weights."""
    if "reg_token" not in weights:
        return 0
    shape = tuple(weights["reg_token"].shape)
    if len(shape) != 3 or 0 in shape:
        raise UserError(f"reg_token is {shape}, no registers of a ViT: check that the file is whole.")
    return shape[1]


def class_count(weights: Weights) -> int:
    """The number of classes of the head in these weights; 0 without a head."""
    if "head.weight" not in weights:
        return 0
    shape = tuple(weights["head.weight"].shape)
    if len(shape) != 2 or 0 in shape:
        raise UserError(f"head.weight is {shape}, no head of a ViT: leave it out of the checkpoint.")
    return shape[0]


def at_size_of(weights: Weights, stock: StockModel, asked: tuple[int, int] | None = None) -> StockModel:
    """The model at the image size of which the weights hold positions: its default, else a square, else that asked for.

    If they fit none of these, the model stays as it is, and check_fit says so.
    """
    model, positions = stock.blueprint, weights.get("pos_embed")
    if positions is None or positions.ndim != 3 or model.pos_embed is None:
        return stock
    patches = positions.shape[1] - (0 if model.no_embed_class else model.num_prefix_tokens)
    patch_size = model.patch_embed.patch_size
    side = math.isqrt(max(patches, 0))
    grids = [model.patch_embed.grid_size, (side, side)]
    if asked:
        grids.append(tuple(length // p for length, p in zip(asked, patch_size, strict=True)))
    grid = next((grid for grid in grids if 0 < grid[0] * grid[1] == patches), grids[0])
    return replace(stock, img_size=(grid[0] * patch_size[0], grid[1] * patch_size[1]))


def check_fit(weights: Weights, stock: StockModel, mend: str = "name its model with --model NAME") -> None:
    """Refuse weights that are not exactly the model's parameters, in name and shape; the first difference is named."""
    missing, unused, reshaped = misfits(weights, stock.blueprint.state_dict())
    name = stock.dseq_name or stock.architecture
    if reshaped:
        key, wanted, given = reshaped[0]
        raise UserError(f"{key} is {given} in the checkpoint and {wanted} in {name}: {mend}.")
    if missing or unused:
        key, fault = (missing[0], "is not in the checkpoint") if missing else (unused[0], "has no place in the model")
        raise UserError(f"{key} {fault}, taken as {name}: {mend}.")
    check_types(weights)


def macs(vit: torch.nn.Module) -> int:
    """Multiply-accumulates of one image in a plain ViT without a head, the attention's products included."""
    patches, tokens = vit.patch_embed.num_patches, vit.patch_embed.num_patches + vit.num_prefix_tokens
    per_token = sum(m.weight.numel() for m in vit.blocks.modules() if isinstance(m, torch.nn.Linear))
    attention = 2 * len(vit.blocks) * tokens**2 * vit.embed_dim
    return patches * vit.patch_embed.proj.weight.numel() + tokens * per_token + attention
