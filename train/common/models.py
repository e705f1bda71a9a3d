"""Any backbone a user may name → a timm model with its weights, and what to call it in tables.

A name of timm, `hf-hub:` and `local-dir:`, a folder ready for the Hub, a file of weights, a run of pretrain.py or one
of its checkpoints, of which the target encoder is taken, and `pixels`, the image itself, to compare with.
"""

import difflib
import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.data import resolve_model_data_config
from torch import nn

import timm_dseq  # noqa: F401, its names
from timm_dseq import UserError
from timm_dseq.hub.download import explained
from timm_dseq.hub.stock import detect
from timm_dseq.hub.weights import encoder_weights, misfits, read

from .run import checkpoints

_CONFIG = "config.json"
_REMOTE = ("hf-hub:", "hf_hub:", "local-dir:")


def load_backbone(
    name: str, img_size: int | None = None, *, random: bool = False, seed: int = 0, **args: Any
) -> tuple[nn.Module, str]:
    """The model, without a head unless args say num_classes, and its name for tables.

    random: fresh weights drawn from the seed instead of the trained ones, which is the floor to compare with.
    """
    args = {"num_classes": 0, **args}
    torch.manual_seed(seed)  # of a head's weights too
    path = Path(name)
    if name == "pixels":
        model, shown = Pixels(img_size or 32), "raw pixels"
    elif path.exists():
        model, shown = _from_path(path, img_size, random, args)
    elif name.startswith(_REMOTE):
        with explained(name):
            model, shown = _create(name, img_size, not random, args), name.partition(":")[2]
    elif timm.is_model(name):
        if not random and not timm.is_model_pretrained(name):
            raise UserError(
                f"model {name} has no published weights: give a folder or a checkpoint, or --random true for fresh "
                "ones."
            )
        with explained(name):
            model, shown = _create(name, img_size, not random, args), name
    else:
        near = difflib.get_close_matches(name, timm.list_models(), 1)
        raise UserError(
            f"model {name} is neither a model of timm nor a path that exists" + (f", maybe {near[0]}." if near else ".")
        )
    if random or not _published(path):  # the licence that timm names is of other weights
        model.pretrained_cfg = {key: value for key, value in model.pretrained_cfg.items() if key != "license"}
    return model.eval(), f"{shown}, random" if random else shown


def _published(path: Path) -> bool:
    """Whether the weights came with a description of their own, or are those that timm describes."""
    return not path.exists() or (path if path.is_dir() else path.parent).joinpath(_CONFIG).is_file()


class Pixels(nn.Module):
    """No backbone at all: an image's features are its pixels."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.pretrained_cfg = {"input_size": (3, size, size), "crop_pct": 0.875, "interpolation": "bicubic"}

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        return images

    def forward_head(self, images: torch.Tensor, pre_logits: bool) -> torch.Tensor:
        return images.flatten(1)


def data_config(model: nn.Module) -> dict[str, Any]:
    """timm's words for the preprocessing: input_size, mean, std, crop_pct, interpolation, crop_mode."""
    found = {k: tuple(v) if isinstance(v, list) else v for k, v in resolve_model_data_config(model).items()}
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return {**found, "input_size": (found["input_size"][0], *size)} if size else found


def _create(name: str, img_size: int | None, pretrained: bool, args: dict[str, Any]) -> nn.Module:
    try:
        if img_size is None:
            return timm.create_model(name, pretrained=pretrained, **args)
        try:
            return timm.create_model(name, pretrained=pretrained, img_size=img_size, **args)
        except TypeError as error:  # convolutions take any size
            if "img_size" not in str(error):
                raise
        model = timm.create_model(name, pretrained=pretrained, **args)
        model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, img_size, img_size)}
        return model
    except UserError:
        raise
    except SafetensorError as error:
        raise UserError(f"the weights of {name} cannot be read ({error}): copy or export them again.") from error
    except (TypeError, ValueError, AssertionError, LookupError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"model {name} cannot be made ({reason}): check its name, size and arguments.") from error


def _from_path(path: Path, img_size: int | None, random: bool, args: dict[str, Any]) -> tuple[nn.Module, str]:
    path = path.resolve()
    if path.name == checkpoints.MODEL and any((path.parent / name).is_file() for name in (_CONFIG, checkpoints.STATE)):
        path = path.parent  # which says more than the weights alone
    if (path / _CONFIG).is_file():
        try:
            json.loads((path / _CONFIG).read_text())
        except ValueError as error:
            raise UserError(f"{path / _CONFIG} is no JSON ({error}): copy or export it again.") from error
        return _create(f"local-dir:{path}", img_size, not random, args), _named(path)
    if path.is_file():
        return _detected(path, img_size, random, args), f"{path.parent.name}/{path.name}"
    step = path
    runs = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if any(runs.glob("step-*")):
        step, skipped = checkpoints.newest(runs)
        if step is None:
            raise UserError(f"{runs} holds no whole checkpoint{': ' * bool(skipped)}{skipped[:1]}.")
    elif not (path / checkpoints.STATE).is_file():
        if (path / checkpoints.MODEL).is_file():
            return _detected(path / checkpoints.MODEL, img_size, random, args), _named(path)
        raise UserError(f"{path} holds no backbone: neither config.json, nor model.safetensors, nor checkpoints.")
    elif wrong := checkpoints.fault(path):
        raise UserError(f"{path}: {wrong}. Take another checkpoint.")
    return _trained(step, img_size, random, args), f"{step.parents[1].name}, {step.name}"


def _named(folder: Path) -> str:
    """A folder in tables; every run calls one of its folders `export`."""
    return f"{folder.parent.name}/{folder.name}" if folder.name == "export" else folder.name


def _detected(file: Path, img_size: int | None, random: bool, args: dict[str, Any]) -> nn.Module:
    """A plain ViT in a file of weights, told by their names and shapes; seen as timm-dseq convert writes it."""
    weights = encoder_weights(read(file))
    found = detect(weights)
    plain = timm.create_model(found.stock, img_size=found.img_size, in_chans=found.in_chans, **found.model_args, **args)
    plain.pretrained_cfg = {**plain.pretrained_cfg, **found.config("", "")["pretrained_cfg"]}
    return _filled(plain, weights, str(file), img_size, random)


def _trained(step: Path, img_size: int | None, random: bool, args: dict[str, Any]) -> nn.Module:
    """The target encoder of a checkpoint of pretrain.py."""
    settings = json.loads((step / checkpoints.STATE).read_text())["config"]["model"]
    plain = timm.create_model(settings["name"], img_size=settings["img_size"], **{**settings["args"], **args})
    return _filled(plain, encoder_weights(read(step / checkpoints.MODEL)), str(step), img_size, random)


def _filled(
    model: nn.Module, weights: dict[str, torch.Tensor], source: str, img_size: int | None, random: bool
) -> nn.Module:
    own = model.state_dict()
    head = {name for name in {*own, *weights} if name.startswith("head.")}
    weights = {name: tensor.float() for name, tensor in weights.items() if name not in head}
    missing, unused, reshaped = misfits(weights, {name: own[name] for name in own if name not in head})
    for name in [*missing, *unused, *(name for name, *_ in reshaped)][:1]:
        raise UserError(f"{source} does not fit its model: {name} differs.")
    if not random:
        model.load_state_dict(weights, strict=False)
    if img_size and tuple(model.patch_embed.img_size) != (img_size, img_size):
        model.set_input_size((img_size, img_size))
    return model
