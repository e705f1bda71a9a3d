"""A checkpoint of any known kind → a folder ready for the Hub: config.json, README.md, model.safetensors.

Sources: our training checkpoints, Meta's I-JEPA, the authors' DSeq-JEPA, any plain timm ViT. The folder names a stock
timm architecture, so it loads with and without this package.
"""

import math
import os
import re
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from timm.layers import resample_abs_pos_embed

from ..dseq_jepa import IJEPA_LICENSE, TAGS, is_size
from ..errors import UserError
from . import cards, checkpoints
from .config import read_stock
from .stock import IJEPA, StockModel, at_size_of, check_fit, class_count, described, detect, registered
from .weights import Checkpoint, Weights, check_types, parse, read, save_tensors

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PIXELS = 2**27  # of an image for which positions are resampled: at 1280 numbers for each patch of 14, 3.5 GB
_DEFAULT_TAGS = {"dseq_jepa": "in1k", "dseq_official": "in1k_official", "ijepa": "ijepa", "timm": "converted"}


class NotWritten(UserError):
    """The folder could not be written, through no fault of the checkpoint."""


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
    """Write the folder of a checkpoint; returns what was read, what was written and what was left out.

    encoder: "target" (of a file with one encoder: that one) or "student". model: the name, with or without a tag, if
    neither the file shows it nor, of a checkpoint of pretrain.py, the state beside it. img_size: resample the positions
    to this size; only if given. dtype: of the stored weights. with_pretraining_state: also write
    pretraining.safetensors, with the student, the predictor and the heads of the losses.
    """
    file = _file(Path(source))
    theirs, known = _config_beside(file) if model is None else ({}, None)
    checkpoint = parse(read(file))
    weights = checkpoint.encoder(encoder)
    if img_size is not None and not (all(map(is_size, img_size)) and math.prod(img_size) <= _PIXELS):
        raise UserError(
            f"--img-size {' '.join(map(str, img_size))} is no image size: give two numbers from 1, of at most "
            f"{_PIXELS:,} pixels together."
        )
    assumed = None
    if model is None:
        stock = _of_run(file) or known
        if stock is None:
            stock = detect(weights)
            assumed = stock.blueprint.blocks[0].attn.num_heads if checkpoint.kind == "timm" else None
        check_fit(weights, stock)
    else:
        stock = _named(model, checkpoint.kind, weights, img_size)
        check_fit(weights, stock, "check --model, or give the size of its positions as --img-size H W")
    if img_size is not None:
        weights, stock = _resampled(weights, stock, img_size)

    architecture = stock.dseq_name or stock.architecture
    tag = (model or "").partition(".")[2] or _DEFAULT_TAGS[checkpoint.kind]
    for what, word in (("tag", tag), ("license", license)):
        if word and not re.fullmatch(r"[\w.+-]*\w", word):
            raise UserError(f"{word!r} is no {what}: write letters, digits, dots, dashes and underscores.")
    name = f"{architecture}.{tag}"
    taken = _taken(checkpoint, encoder)
    card, license = _card(checkpoint.kind, name, stock, license, taken)
    files = {
        "config.json": cards.config_text(_with_preprocessing(stock.config(tag, license), theirs)).encode(),
        "README.md": card.encode(),
    }
    tensors = {"model.safetensors": {name: _stored(name, tensor, dtype) for name, tensor in weights.items()}}
    if with_pretraining_state:
        tensors["pretraining.safetensors"] = _pretraining_state(checkpoint, stock, source)

    output = Path(output or name)
    _write_folder(output, files, tensors)
    return {
        "kind": checkpoint.kind,
        "model": name,
        "stock": stock.architecture,
        "encoder": taken,
        "tensors": len(weights),
        "assumed_heads": assumed,
        "left_out": _left_out(checkpoint, encoder, with_pretraining_state),
        "output": str(output),
        "files": {path.name: path.stat().st_size for path in sorted(output.iterdir())},
        "blanks": len(cards.blanks(card)),
    }


def _file(source: Path) -> Path:
    """A file of weights: itself, that of a folder, or of a run's newest complete checkpoint."""
    if checkpoints.steps(source / "checkpoints"):
        return checkpoints.latest(source / "checkpoints") / checkpoints.MODEL
    file = source / checkpoints.MODEL if source.is_dir() else source
    if file.name == checkpoints.MODEL and checkpoints.is_checkpoint(file.parent):
        checkpoints.check(file.parent, needed=(checkpoints.MODEL, checkpoints.STATE))
    elif source.is_dir() and not file.is_file():
        raise UserError(f"{source} holds no model.safetensors, and no checkpoints of a run: name a file of weights.")
    return file


def _config_beside(file: Path) -> tuple[dict, StockModel | None]:
    """What config.json says of the weights beside it, where they are a folder ready for the Hub."""
    path = file.parent / "config.json"
    return read_stock(path) if file.name == "model.safetensors" and path.is_file() else ({}, None)


def _with_preprocessing(config: dict, theirs: dict) -> dict:
    """A config with the preprocessing that the weights were trained with, where it is known."""
    known = theirs.get("pretrained_cfg", {})
    kept = {name: known[name] for name in ("mean", "std", "interpolation", "crop_pct", "crop_mode") if name in known}
    return {**config, "pretrained_cfg": {**config["pretrained_cfg"], **kept}}


def _of_run(file: Path) -> StockModel | None:
    """The encoder that a run was told to build, in whose checkpoint the file lies; None if it lies in none."""
    if file.name != checkpoints.MODEL or not checkpoints.is_checkpoint(file.parent):
        return None
    return described(*checkpoints.encoder_of(file.parent))


def _named(model: str, kind: str, weights: Weights, img_size: tuple[int, int] | None) -> StockModel:
    stock = registered(model.partition(".")[0])
    if kind == "ijepa":
        stock = replace(stock, model_args=IJEPA)
    return replace(at_size_of(weights, stock, img_size), num_classes=class_count(weights))


def _resampled(weights: Weights, stock: StockModel, img_size: tuple[int, int]) -> tuple[Weights, StockModel]:
    """The same encoder for images of another size."""
    old, new = stock.blueprint, replace(stock, img_size=tuple(img_size))
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


def _taken(checkpoint: Checkpoint, encoder: str) -> str:
    """Which encoder is written: "target", "student", "lone student" where there is no target, or a ViT's "only" one."""
    if checkpoint.kind == "timm":
        return "only"
    return "lone student" if encoder == "target" and not checkpoint.target else encoder


def _card(kind: str, name: str, stock: StockModel, license: str | None, encoder: str) -> tuple[str, str]:
    """The card, and the licence for config.json."""
    tag = name.partition(".")[2]
    if stock.dseq_name and kind != "timm":
        if tag not in TAGS:
            raise UserError(f"{name}: the tags are {', '.join(TAGS)}: give one as --model {stock.dseq_name}.TAG.")
        return cards.dseq_card(name, stock, license, encoder), license or cards.license_of(tag)
    if kind == "ijepa":
        if license not in (None, IJEPA_LICENSE):
            raise UserError(f"Meta's I-JEPA weights are under {IJEPA_LICENSE}, not {license}: leave --license out.")
        return cards.ijepa_card(name, stock, encoder), IJEPA_LICENSE
    return cards.other_card(name, stock, license), license or "unknown"


def _stored(name: str, tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    """A weight as it is written; refused where it is none, or where it would be written as something else."""
    check_types({name: tensor})
    if not tensor.isfinite().all():
        raise UserError(
            f"{name} holds numbers that are not finite: the training had failed, take an earlier checkpoint."
        )
    stored = tensor.detach().to(DTYPES[dtype]).contiguous().clone()
    if not stored.isfinite().all():
        raise UserError(f"{name} holds numbers too large for {dtype}: give --dtype bfloat16 or float32.")
    return stored


def _pretraining_state(checkpoint: Checkpoint, stock: StockModel, source: str | os.PathLike) -> Weights:
    """Student, predictor and heads in float32, so that others can continue the training."""
    if not (checkpoint.student and checkpoint.predictor):
        lacks = " and ".join(role for role in ("student", "predictor") if not getattr(checkpoint, role))
        raise UserError(f"{source} holds no {lacks}: convert it without --with-pretraining-state.")
    check_fit(checkpoint.student, stock, "the student is not of the model that the target is")
    roles = {"student": checkpoint.student, "predictor": checkpoint.predictor}
    parts = {f"{role}.{name}": tensor for role, weights in roles.items() for name, tensor in weights.items()}
    return {name: _stored(name, tensor, "float32") for name, tensor in {**parts, **checkpoint.heads}.items()}


def _left_out(checkpoint: Checkpoint, encoder: str, with_pretraining_state: bool) -> list[str]:
    """The parts of the checkpoint that are not written into the folder."""
    written = {encoder if getattr(checkpoint, encoder) else "student"}
    if with_pretraining_state:
        written |= {"student", "predictor", "heads"}
    roles = ("target", "student", "predictor", "heads")
    return [role for role in roles if getattr(checkpoint, role) and role not in written] + checkpoint.left_out


def _write_folder(output: Path, files: dict[str, bytes], tensors: dict[str, Weights]) -> None:
    """Complete or not at all: the folder is written under another name, then renamed."""
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
                save_tensors(weights, folder / name)
            for name, content in files.items():
                (folder / name).write_bytes(content)
            folder.rename(output)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise NotWritten(f"{output} cannot be written ({reason}): check space and rights.") from error
