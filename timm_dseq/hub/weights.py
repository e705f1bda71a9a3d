"""Files of weights: opened safely, their kind recognised, split into student, target and predictor."""

import argparse
import hashlib
import pickle
import re
import warnings
import zipfile
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ..errors import UserError

Weights = dict[str, torch.Tensor]

# Before this release, a file can make torch.load(weights_only=True) run code (CVE-2025-32434, CVE-2026-24747).
SAFE_TORCH = (2, 10)


@dataclass
class Checkpoint:
    """Weights by role, under names without the prefixes of DDP and torch.compile. Roles that a file lacks are empty.

    kind: "dseq_jepa" (our training), "dseq_official" (the authors'), "ijepa" (Meta's), "timm" (a bare ViT).
    """

    kind: str
    target: Weights = field(default_factory=dict)
    student: Weights = field(default_factory=dict)
    predictor: Weights = field(default_factory=dict)
    heads: Weights = field(default_factory=dict)  # what losses of ours have learnt beside, as recognition.projector…
    left_out: list[str] = field(default_factory=list)  # top-level entries of the file that are in none of these

    def encoder(self, which: str = "target") -> Weights:
        """The weights of the "target" encoder (of a file with one encoder: that one) or of the "student"."""
        if which == "student" and not self.student:
            raise UserError("This checkpoint holds one encoder only, no student beside it: take the target encoder.")
        weights = self.student if which == "student" else self.target or self.student
        check_types(weights)
        return weights


def check_safetensors(path: str | PathLike) -> None:
    """Refuse a safetensors file that is missing, truncated or corrupt; files with other names are not opened."""
    path = _existing(path)
    if path.suffix != ".safetensors":
        return
    if not _holds_safetensors(path):
        raise UserError(f"{path} is a torch file named .safetensors: make it one with timm-dseq convert.")
    _check_complete(path)


def read(path: str | PathLike) -> dict[str, Any]:
    """The content of a safetensors or torch file, whatever its name. Nothing in the file is ever executed."""
    path = _existing(path)
    if _holds_safetensors(path):
        _check_complete(path)
        return load_file(path)
    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < SAFE_TORCH:
        raise UserError(
            f"torch {torch.__version__} cannot open {path} safely (CVE-2025-32434, CVE-2026-24747): "
            f"pip install 'torch>={'.'.join(map(str, SAFE_TORCH))}'."
        )
    try:
        # timm's checkpoints hold an argparse.Namespace, which is plain data. torch warns of what the errors below say
        # in one line. An archive is mapped, not read, since most of a training's checkpoint is not used. Anything else
        # is given as an open file: newer versions choose the reader by the file's name.
        mapped = path.suffix != ".safetensors" and zipfile.is_zipfile(path)
        with (
            path.open("rb") as file,
            torch.serialization.safe_globals([argparse.Namespace]),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            state = torch.load(str(path) if mapped else file, map_location="cpu", mmap=mapped, weights_only=True)
    except pickle.UnpicklingError as error:
        needed = re.search(r"(?:GLOBAL|class|global) ([\w.]+\.\w+)", str(error))
        what = f"needs {needed[1]}" if needed else "is no plain file of tensors"
        raise UserError(
            f"{path} {what}, and opening it could run foreign code: save its tensors alone, as "
            "safetensors.torch.save_file(state_dict, FILE), where you trust it."
        ) from error
    except Exception as error:  # torch's reader stumbles over a damaged file in many ways
        if "TorchScript" in str(error):
            raise UserError(
                f"{path} is a TorchScript archive, which holds a program: save its weights alone, as "
                "torch.save(torch.jit.load(FILE).state_dict(), OTHER), where you trust it."
            ) from error
        raise UserError(f"{path} cannot be read as a torch file, it may be truncated: download it again.") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, no dictionary of weights: save model.state_dict().")
    return state


def parse(state: dict[str, Any]) -> Checkpoint:
    """A state dictionary of any known kind → its weights by role, all of them dense tensors."""
    _check_names(state)
    if any(name.startswith(("target.", "student.")) for name in state):
        roles = {role: _below(state, role) for role in ("target", "student", "predictor")}
        others = {name: value for name, value in state.items() if name.partition(".")[0] not in roles}
        return Checkpoint("dseq_jepa", **roles, heads=_unwrapped(others))
    if any(isinstance(state.get(key), dict) for key in ("encoder", "target_encoder")):
        names = {"target": "target_encoder", "student": "encoder", "predictor": "predictor"}
        roles = {role: _unwrapped(state[name]) for role, name in names.items() if isinstance(state.get(name), dict)}
        encoder = roles.get("target") or roles.get("student")
        if not encoder:
            raise UserError("The checkpoint holds no weights of an encoder: its target_encoder or encoder is empty.")
        kind = "dseq_official" if "cls_token" in encoder else "ijepa"
        return Checkpoint(kind, **roles, left_out=[name for name in state if name not in names.values()])
    for key in ("state_dict_ema", "model_ema", "state_dict", "model", "teacher"):
        if isinstance(state.get(key), dict):
            return Checkpoint("timm", _unwrapped(state[key]), left_out=[name for name in state if name != key])
    return Checkpoint("timm", _unwrapped(state))


def encoder_weights(state: dict[str, Any], which: str = "target") -> Weights:
    """The weights of the "target" encoder or the "student" in a state dictionary of any known kind."""
    return parse(state).encoder(which)


def misfits(
    weights: Weights, parameters: Weights
) -> tuple[list[str], list[str], list[tuple[str, tuple[int, ...], tuple[int, ...]]]]:
    """How weights differ from parameters: names missing, names unused, (name, parameter's shape, weight's shape)."""
    missing = [name for name in parameters if name not in weights]
    unused = [name for name in weights if name not in parameters]
    shared = [name for name in parameters if name in weights]
    shapes = [(name, tuple(parameters[name].shape), tuple(weights[name].shape)) for name in shared]
    return missing, unused, [(name, wanted, given) for name, wanted, given in shapes if wanted != given]


def check_types(weights: Weights) -> None:
    """Refuse tensors that are no weights of a ViT: whole numbers, truth values, numbers of 8 bits."""
    for name, tensor in weights.items():
        if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise UserError(f"{name} is of type {tensor.dtype}, no weight of a ViT: check the file.")


def sha256(path: Path) -> str:
    """The SHA-256 of a file, read in pieces. (hashlib.file_digest needs Python 3.11.)"""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _existing(path: str | PathLike) -> Path:
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is no file: check the path of the weights.")
    return path


def _holds_safetensors(path: Path) -> bool:
    """Decided by the content, since names can be wrong; by the name if the content is neither safetensors nor torch."""
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise UserError(f"{path} cannot be opened ({error.strerror or error}): check its rights.") from error
    if head[8:] == b"{" and int.from_bytes(head[:8], "little") <= 100_000_000:  # the length of a header, then its JSON
        return True
    return path.suffix == ".safetensors" and not head.startswith((b"PK\x03\x04", b"\x80"))  # zip, pickle


def _check_complete(path: Path) -> None:
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise UserError(f"{path} is truncated or corrupt ({error}): download or convert it again.") from error


def _below(state: dict[str, Any], role: str) -> Weights:
    prefix = f"{role}."
    return _unwrapped({name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)})


def _unwrapped(weights: dict[str, Any]) -> Weights:
    """The weights without the prefixes that DDP and torch.compile put before every name."""
    _check_names(weights)
    plain = {re.sub(r"^((module|_orig_mod)\.)+", "", name): value for name, value in weights.items()}
    for name, value in plain.items():
        if not isinstance(value, torch.Tensor):
            raise UserError(f"{name} is of type {type(value).__name__}, no tensor: save model.state_dict() alone.")
        if value.layout != torch.strided or value.is_nested or value.is_quantized or value.is_meta:
            raise UserError(f"{name} is no dense tensor that holds its numbers: save it as one (tensor.to_dense()).")
    return plain


def _check_names(state: dict[Any, Any]) -> None:
    for name in state:
        if not isinstance(name, str) or not name or not name.isprintable():
            raise UserError(f"There is an entry named {name!r}, which is no name of a weight: save model.state_dict().")


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """A safetensors file that others may read as any other new file: safetensors makes it its owner's alone."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)
