"""config.json of a folder ready for the Hub, read: plain JSON whose entries are of the types that timm expects."""

import json
from pathlib import Path
from typing import Any

import timm
import torch

from ..errors import UserError
from .model_args import making, misfit, not_the_models
from .stock import StockModel
from .weights import check_safetensors

_LONGEST = 2**20  # bytes
_TYPES = {"architecture": str, "model_args": dict, "pretrained_cfg": dict, "num_classes": int, "global_pool": str}
_PREPROCESSING = {"interpolation": str, "crop_mode": str, "crop_pct": (int, float), "license": str, "tag": str}
_WORDS = {
    "interpolation": ("bicubic", "bilinear", "nearest", "lanczos", "hamming", "box", "random"),
    "crop_mode": ("center", "squash", "border"),
}
_NUMBERS = ("mean", "std", "input_size")


def read_config(path: Path) -> dict[str, Any]:
    """The content of a config.json; one line where it is none of timm's."""
    try:
        if path.stat().st_size > _LONGEST:
            raise ValueError("it is too long")
        config = json.loads(path.read_text(encoding="utf-8-sig"))
        _check_types(config)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its rights.") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is no config of timm ({error}): convert or export the weights anew.") from error
    return config


def read_stock(path: Path) -> tuple[dict[str, Any], StockModel]:
    """The same, and the model that it describes."""
    config = read_config(path)
    try:
        return config, StockModel.from_config(config)
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is no config of timm ({reason}): convert the weights anew.") from error


def check_described(config: dict[str, Any], weights: Path, name: str) -> None:
    """Refuse a config.json of a model far larger than the weights beside it, before memory is taken for it."""
    check_safetensors(weights)
    architecture, args = config["architecture"], config.get("model_args", {})
    if not timm.is_model(architecture):
        return  # timm says so
    with making(f"model {name}"), torch.device("meta"):
        model = timm.create_model(architecture, **{"num_classes": config.get("num_classes", 1000), **args})
    parameters, stored = sum(weight.numel() for weight in model.parameters()), weights.stat().st_size
    if parameters > stored:  # each takes a byte at least
        raise UserError(
            f"{name}: config.json describes {parameters:,} weights, and {weights.name} has {stored:,} bytes only: "
            "they do not belong together, bring both anew."
        )


def _check_types(config: Any) -> None:
    if not isinstance(config, dict) or "architecture" not in config:
        raise ValueError("it names no architecture")
    for name, kind in _TYPES.items():
        if name in config and (not isinstance(config[name], kind) or isinstance(config[name], bool)):
            raise ValueError(f"{name} is {config[name]!r:.80}")
    args = config.get("model_args", {})
    if fault := misfit(args):
        raise ValueError(fault)
    if name := not_the_models(args):
        raise ValueError(f"{name} is no argument of a model")
    preprocessing = config.get("pretrained_cfg", {})
    for name, kind in _PREPROCESSING.items():
        if preprocessing.get(name) is not None and not isinstance(preprocessing[name], kind):
            raise ValueError(f"{name} is {preprocessing[name]!r:.80}")
    for name, known in _WORDS.items():
        if preprocessing.get(name) is not None and preprocessing[name] not in known:
            raise ValueError(f"{name} is {preprocessing[name]!r:.80}, none of {', '.join(known)}")
    for name in _NUMBERS:
        numbers = preprocessing.get(name, [1.0])
        if not isinstance(numbers, list) or not all(isinstance(x, (int, float)) and x == x for x in numbers):
            raise ValueError(f"{name} is {numbers!r:.80}")
        if name == "input_size" and name in preprocessing and len(numbers) != 3:
            raise ValueError(f"{name} is {numbers!r:.80}")
        if name != "mean" and not all(0 < x < float("inf") for x in numbers):
            raise ValueError(f"{name} is {numbers!r:.80}, of which each has to be above 0")
