"""Any model that a user may name → a timm model with its weights, and what tables call it.

NAMES says what may be named, for every command the same. Of a training run or checkpoint the target encoder is taken.
`pixels` is no model but the image itself, to compare with.
"""

import os
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from timm.data import resolve_model_data_config
from torch import nn

from ..dseq_jepa import ARCHITECTURES, namespace
from ..errors import UserError, similar
from . import checkpoints
from .config import check_described, read_config
from .download import clear_hub_errors, download, hub_access, split_revision
from .model_args import making
from .stock import detect
from .store.lookup import command_for, in_store
from .weights import encoder_weights, misfits, read

NAMES = (
    "any model of timm, hf-hub:REPOSITORY, a folder ready for the Hub, a run or checkpoint of pretrain.py, or a file "
    "of weights"
)
_CONFIG = "config.json"
_FOLDER = "local-dir:"  # timm's prefix for a folder, which needs none here
_REPOSITORY = ("hf-hub:", "hf_hub:")


def load_backbone(
    name: str, img_size: int | None = None, *, random: bool | None = False, seed: int = 0, **args: Any
) -> tuple[nn.Module, str]:
    """The model, without a head unless args say num_classes, and its name for tables.

    random: fresh weights drawn from the seed instead of the trained ones, the floor to compare with; None where the
    caller has no such option. args: further arguments of timm.create_model.
    """
    args = {"num_classes": 0, **args}
    torch.manual_seed(seed)  # for a head's weights too
    path = Path(name.removeprefix(_FOLDER))
    if name.startswith(_FOLDER) and not path.is_dir():
        raise UserError(f"{path} is no folder: name one that timm-dseq convert has written.")
    if name == "pixels":
        model, shown = Pixels(img_size or 32), "raw pixels"
    elif path.exists():
        model, shown = _from_path(path.resolve(), img_size, bool(random), args)
    else:
        _check_known(name, random)
        if name.startswith(_REPOSITORY):
            _bring(name.partition(":")[2], bool(random))
        model, shown = _create(name, img_size, not random, args), name.partition(":")[2] or name
        if name in ARCHITECTURES and not random:  # whose weights they are
            shown = f"{name}.{model.pretrained_cfg['tag']}"
    if not random:
        _check_finite(model, name)
    if random or (path.exists() and not _has_config(path)):  # the licence that timm names is that of other weights
        model.pretrained_cfg = {key: value for key, value in model.pretrained_cfg.items() if key != "license"}
    return model.eval(), f"{shown}, random" if random else shown


def _check_finite(model: nn.Module, name: str) -> None:
    for weight, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise UserError(f"{name} holds numbers that are not finite, in {weight}: take other weights.")


class Pixels(nn.Module):
    """No model at all: an image's features are its pixels."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.pretrained_cfg = {"input_size": (3, size, size), "crop_pct": 0.875, "interpolation": "bicubic"}

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        return images

    def forward_head(self, images: torch.Tensor, pre_logits: bool) -> torch.Tensor:
        """(B, 3, H, W) → (B, 3·H·W)."""
        return images.flatten(1)


def data_config(model: nn.Module) -> dict[str, Any]:
    """A model's preprocessing in timm's words: input_size, mean, std, crop_pct, interpolation, crop_mode."""
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in resolve_model_data_config(model).items()}
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return {**config, "input_size": (config["input_size"][0], *size)} if size else config


def _bring(repo: str, random: bool) -> None:
    """Into the cache, where timm finds them: a repository's config.json and its weights, which are looked at first.

    timm would build whatever size a config names, and read pickles where there are no safetensors.
    """
    with clear_hub_errors(f"hf-hub:{repo}"):
        validate_repo_id(split_revision(repo)[0])
    config = read_config(Path(download(repo, _CONFIG)))
    if not random:
        check_described(config, Path(download(repo, checkpoints.MODEL)), repo)


def _check_known(name: str, random: bool | None) -> None:
    """Refuse what is no name of timm or the Hub, or has no weights."""
    if name.startswith(_REPOSITORY):
        return
    if not timm.is_model(name):
        hint = similar(name.partition(".")[0], timm.list_models())
        if not hint and name.count("/") == 1:
            hint = f"; a repository of the Hub is named hf-hub:{name}"
        raise UserError(f"model {name} is neither a model of timm nor a path that exists{hint}.")
    if random or timm.is_model_pretrained(name) or in_store(name):
        return
    architecture, _, tag = name.partition(".")
    hint = similar(name, timm.list_pretrained(f"{architecture}.*")) if tag else ""
    mends = ["give a folder or a checkpoint"]
    if architecture in ARCHITECTURES:
        namespace()  # a wrong one would be the reason
        if command := command_for(name):
            mends.append(f"bring some with {command}")
        mends.append("set TIMM_DSEQ_NAMESPACE to the organisation that publishes them")
    if random is False:
        mends.append("--random true for fresh ones")
    raise UserError(f"model {name} has no published weights{hint}: {', or '.join(mends)}.")


def _create(name: str, img_size: int | None, pretrained: bool, args: dict[str, Any]) -> nn.Module:
    """timm.create_model, its errors as one line."""
    create = partial(timm.create_model, name, pretrained=pretrained, **args)
    try:
        with making(f"model {name}"), hub_access(name) if _timm_asks_the_hub(name, pretrained) else nullcontext():
            if img_size is None:
                return create()
            try:
                return create(img_size=img_size)
            except TypeError as error:
                if "img_size" not in str(error):
                    raise
            model = create()  # a convolutional network, which takes any size
        model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, img_size, img_size)}
        return model
    except SafetensorError as error:
        raise UserError(f"the weights of {name} cannot be read ({error}): copy or export them again.") from error


def _timm_asks_the_hub(name: str, pretrained: bool) -> bool:
    """Our own models do not leave it to timm: they download with timm_dseq.hub.download."""
    if name.startswith(_REPOSITORY):
        return True
    return pretrained and not name.startswith(_FOLDER) and name.partition(".")[0] not in ARCHITECTURES


def _from_path(path: Path, img_size: int | None, random: bool, args: dict[str, Any]) -> tuple[nn.Module, str]:
    """A folder ready for the Hub, a file of weights, a run, or one of its checkpoints."""
    if path.name == checkpoints.MODEL and ((path.parent / _CONFIG).is_file() or checkpoints.is_checkpoint(path.parent)):
        path = path.parent  # which says more than the weights alone
    if (path / _CONFIG).is_file():
        config = read_config(path / _CONFIG)
        weights = path / checkpoints.MODEL
        if os.path.lexists(weights) and not weights.is_file():
            raise UserError(f"{weights} is no file: export or copy the weights again.")
        if not random and weights.is_file():
            check_described(config, weights, str(path))
        return _create(f"{_FOLDER}{path}", img_size, not random, args), _folder_name(path)
    if path.is_file():
        return _detected(path, _file_name(path), img_size, random, args)
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if checkpoints.steps(folder):
        step = checkpoints.latest(folder)
    elif checkpoints.is_checkpoint(path):
        step = path
        checkpoints.check(step)
    elif (path / checkpoints.MODEL).is_file():
        return _detected(path / checkpoints.MODEL, _folder_name(path), img_size, random, args)
    else:
        raise UserError(f"{path} holds no backbone: neither config.json, nor model.safetensors, nor checkpoints.")
    return _trained(step, img_size, random, args), f"{step.parents[1].name}, {step.name}"


def _has_config(path: Path) -> bool:
    """Whether weights came with a description, which states their licence."""
    return (path if path.is_dir() else path.parent).joinpath(_CONFIG).is_file()


def _file_name(file: Path) -> str:
    """A file's name in tables, with its folder's, but not that of a home: results are published."""
    return file.name if file.parent == Path.home() else f"{file.parent.name}/{file.name}"


def _folder_name(folder: Path) -> str:
    """A folder's name in tables; that of `export` says nothing, since every run has one."""
    return f"{folder.parent.name}/{folder.name}" if folder.name == "export" else folder.name


def _detected(file: Path, name: str, img_size: int | None, random: bool, args: dict[str, Any]) -> tuple[nn.Module, str]:
    """The plain ViT that names and shapes in a file of weights show, with the preprocessing that convert gives it.

    No shape shows the heads: they are those of the usual ViT of this width, and the name says so.
    """
    weights = encoder_weights(read(file))
    stock = detect(weights)
    model = _create(stock.architecture, stock.img_size, False, {"in_chans": stock.in_chans, **stock.model_args, **args})
    model.pretrained_cfg = {**model.pretrained_cfg, **stock.config("", "")["pretrained_cfg"]}
    model = _filled(model, weights, str(file), img_size, random)
    return model, f"{name} ({model.blocks[0].attn.num_heads} heads assumed)"


def _trained(step: Path, img_size: int | None, random: bool, args: dict[str, Any]) -> nn.Module:
    """The target encoder of a checkpoint of pretrain.py."""
    name, size, model_args = checkpoints.encoder_of(step)
    model = _create(name, size, False, {**model_args, **args})
    return _filled(model, encoder_weights(read(step / checkpoints.MODEL)), str(step), img_size, random)


def _filled(
    model: nn.Module, weights: dict[str, torch.Tensor], source: str, img_size: int | None, random: bool
) -> nn.Module:
    """The model with these weights, all but a head's, which have to fit; then at the size asked for."""
    parameters = model.state_dict()
    head = {name for name in {*parameters, *weights} if name.startswith("head.")}
    weights = {name: tensor.float() for name, tensor in weights.items() if name not in head}
    missing, unused, reshaped = misfits(weights, {name: parameters[name] for name in parameters if name not in head})
    for name in [*missing, *unused, *(name for name, *_ in reshaped)][:1]:
        raise UserError(f"{source} does not fit its model: {name} differs.")
    if not random:
        model.load_state_dict(weights, strict=False)
    if img_size and tuple(model.patch_embed.img_size) != (img_size, img_size):
        model.set_input_size((img_size, img_size))
    return model
