"""Any checkpoint of weights we know → a Hub-ready folder: config.json, README.md, model.safetensors.

Sources: our training checkpoints, Meta's I-JEPA, the authors' DSeq-JEPA, any plain timm ViT. The folder names a stock
timm architecture, so it loads with and without this package.
"""

import os
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

from ..dseq_jepa import TAGS, is_size
from ..errors import UserError
from . import cards
from .stock import Backbone, check_fit, classes, detect, registered, sized
from .weights import Checkpoint, Weights, parse, read

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DEFAULT_TAGS = {"dseq_jepa": "in1k", "dseq_official": "in1k_official", "ijepa": "ijepa", "timm": "converted"}


def convert(
    source: str | os.PathLike,
    output: str | os.PathLike | None = None,
    *,
    encoder: str = "target",
    model: str | None = None,
    img_size: tuple[int, int] | None = None,
    dtype: str = "float32",
    license: str | None = None,
    with_pretraining_state: bool = False,
) -> dict:
    """Write the Hub-ready folder of a checkpoint; returns what was found, taken and left out.

    encoder: "target" (of a file with one encoder: that one) or "student". model: the name, with or without a tag, where
    it cannot be told from the file. img_size: resample the positions to this size; never done unasked. dtype: of the
    stored weights. with_pretraining_state: also write pretraining.safetensors, with the student and the predictor.
    """
    checkpoint = parse(read(_file(Path(source))))
    weights = checkpoint.encoder(encoder)
    if img_size is not None and not all(map(is_size, img_size)):
        raise UserError(f"--img-size {' '.join(map(str, img_size))} is no image size: give two numbers from 1.")
    if model is None:
        backbone = detect(weights)
        check_fit(weights, backbone)
    else:
        backbone = _named(model, checkpoint.kind, weights, img_size)
        check_fit(weights, backbone, "check --model, or give the size of its positions as --img-size H W")
    if img_size is not None:
        weights, backbone = _resampled(weights, backbone, img_size)

    architecture = backbone.dseq_name or backbone.stock
    tag = (model or "").partition(".")[2] or _DEFAULT_TAGS[checkpoint.kind]
    name = f"{architecture}.{tag}"
    card, license = _card(checkpoint.kind, name, backbone, license)
    files = {
        "config.json": cards.config_text(backbone.config(tag, license)).encode(),
        "README.md": card.encode(),
    }
    tensors = {"model.safetensors": {name: _stored(tensor, dtype) for name, tensor in weights.items()}}
    if with_pretraining_state:
        tensors["pretraining.safetensors"] = _pretraining_state(checkpoint, source)

    output = Path(output or name)
    _write_folder(output, files, tensors)
    return {
        "kind": checkpoint.kind,
        "model": name,
        "stock": backbone.stock,
        "encoder": encoder if checkpoint.target and checkpoint.student else "only",
        "tensors": len(weights),
        "left_out": _left_out(checkpoint, encoder, with_pretraining_state),
        "output": str(output),
        "files": {path.name: path.stat().st_size for path in sorted(output.iterdir())},
        "blanks": len(cards.blanks(card)),
    }


def _file(source: Path) -> Path:
    if not source.is_dir():
        return source
    if not (source / "model.safetensors").is_file():
        raise UserError(f"{source} holds no model.safetensors: name the checkpoint's file.")
    return source / "model.safetensors"


def _named(model: str, kind: str, weights: Weights, img_size: tuple[int, int] | None) -> Backbone:
    backbone = registered(model.partition(".")[0])
    if kind == "ijepa":
        backbone = replace(backbone, model_args={"class_token": False, "global_pool": "avg", "fc_norm": False})
    return replace(sized(backbone, weights, img_size), num_classes=classes(weights))


def _resampled(weights: Weights, backbone: Backbone, img_size: tuple[int, int]) -> tuple[Weights, Backbone]:
    """The same encoder for images of another size."""
    old, new = backbone.blueprint, replace(backbone, img_size=tuple(img_size))
    patch = old.patch_embed.patch_size
    if any(side % p for side, p in zip(img_size, patch, strict=True)):
        raise UserError(f"--img-size {img_size[0]} {img_size[1]} is not divisible by the patch {patch[0]}×{patch[1]}.")
    if "pos_embed" not in weights:
        return weights, new
    prefix = 0 if old.no_embed_class else old.num_prefix_tokens
    positions = resample_abs_pos_embed(
        weights["pos_embed"].float(),
        new_size=[side // p for side, p in zip(img_size, patch, strict=True)],
        old_size=list(old.patch_embed.grid_size),
        num_prefix_tokens=prefix,
    )
    return {**weights, "pos_embed": positions}, new


def _card(kind: str, name: str, backbone: Backbone, license: str | None) -> tuple[str, str]:
    """The card, and the licence that the config repeats."""
    tag = name.partition(".")[2]
    if backbone.dseq_name and kind != "timm":
        if tag not in TAGS:
            raise UserError(f"{name}: the tags are {', '.join(TAGS)}: give one as --model {backbone.dseq_name}.TAG.")
        return cards.dseq_card(name, backbone, license), license or cards.license_of(tag)
    if kind == "ijepa":
        if license not in (None, cards.IJEPA_LICENSE):
            raise UserError(
                f"Meta's I-JEPA weights are under {cards.IJEPA_LICENSE}, not {license}: leave --license out."
            )
        return cards.ijepa_card(name, backbone), cards.IJEPA_LICENSE
    return cards.other_card(name, backbone, license), license or "unknown"


def _stored(tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    return tensor.detach().to(DTYPES[dtype] if tensor.is_floating_point() else tensor.dtype).contiguous().clone()


def _pretraining_state(checkpoint: Checkpoint, source: str | os.PathLike) -> Weights:
    """Student and predictor in full precision, so that training can go on from the published folder."""
    if not (checkpoint.student and checkpoint.predictor):
        lacks = " and ".join(role for role in ("student", "predictor") if not getattr(checkpoint, role))
        raise UserError(f"{source} holds no {lacks}: convert it without --with-pretraining-state.")
    return {
        f"{role}.{name}": _stored(tensor, "float32")
        for role in ("student", "predictor")
        for name, tensor in getattr(checkpoint, role).items()
    }


def _left_out(checkpoint: Checkpoint, encoder: str, with_pretraining_state: bool) -> list[str]:
    """Every part of the checkpoint that is not in the folder."""
    taken = {encoder if getattr(checkpoint, encoder) else "student"}
    if with_pretraining_state:
        taken |= {"student", "predictor"}
    roles = [role for role in ("target", "student", "predictor") if getattr(checkpoint, role) and role not in taken]
    return roles + checkpoint.left_out


def _write_folder(output: Path, files: dict[str, bytes], tensors: dict[str, Weights]) -> None:
    """Whole or not at all: everything is written beside the folder, which then takes its name."""
    if output.exists():
        raise UserError(f"{output} exists already: name another folder with --output, or remove it.")
    if file := next((parent for parent in output.parents if parent.is_file()), None):
        raise UserError(f"{output} cannot be written: {file} is a file, no folder: name another --output.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as unfinished:
            folder = Path(unfinished) / "folder"
            folder.mkdir()
            for name, weights in tensors.items():
                save_file(weights, folder / name, metadata={"format": "pt"})
            for name, content in files.items():
                (folder / name).write_bytes(content)
            folder.rename(output)
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror or error}): check space and rights.") from error
