"""What lies in a file of weights: opened safely, its kind recognised, student, target and predictor told apart."""

import argparse
import pickle
import re
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from .errors import UserError

Weights = dict[str, torch.Tensor]

# torch.load(weights_only=True) can be made to run foreign code before this release (CVE-2025-32434, CVE-2026-24747).
SAFE_TORCH = (2, 10)


@dataclass
class Checkpoint:
    """Weights by their role, names without wrappers' prefixes. Roles that a file lacks are empty.

    kind: "dseq_jepa" (our training), "dseq_official" (the authors'), "ijepa" (Meta's), "timm" (a bare ViT).
    """

    kind: str
    target: Weights = field(default_factory=dict)
    student: Weights = field(default_factory=dict)
    predictor: Weights = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)  # top-level entries that hold no weights of the three

    def encoder(self, which: str = "target") -> Weights:
        """The weights of the "target" encoder (of a file with one encoder: that one) or of the "student"."""
        if which == "target":
            return self.target or self.student
        if not self.student:
            raise UserError("This checkpoint holds one encoder only, no student beside it: take the target encoder.")
        return self.student


def check_safetensors(path: str | PathLike) -> None:
    """Refuse a weights file that is missing, truncated or corrupt; files of other kinds are left to their reader."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is no file: check the path of the weights.")
    if path.suffix != ".safetensors":
        return
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise UserError(f"{path} is truncated or corrupt ({error}): download or convert it again.") from error


def read(path: str | PathLike) -> dict[str, Any]:
    """Everything a .safetensors or torch file holds. Nothing in the file is ever executed."""
    check_safetensors(path)
    if Path(path).suffix == ".safetensors":
        return load_file(path)
    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < SAFE_TORCH:
        raise UserError(
            f"torch {torch.__version__} cannot open {path} safely (CVE-2025-32434, CVE-2026-24747): "
            f"pip install 'torch>={'.'.join(map(str, SAFE_TORCH))}'."
        )
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm keeps its arguments in one: plain data
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"(?:GLOBAL|class|global) ([\w.]+\.\w+)", str(error))
        what = f"needs {wanted[1]}" if wanted else "is no plain file of tensors"
        raise UserError(
            f"{path} {what}, and opening it could run foreign code: save its tensors alone, as "
            "safetensors.torch.save_file(state_dict, FILE), where you trust it."
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise UserError(f"{path} cannot be read as a torch file, it may be truncated: download it again.") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, no dictionary of weights: save model.state_dict().")
    return state


def parse(state: dict[str, Any]) -> Checkpoint:
    """A state dictionary of any known kind → its weights by role."""
    if any(name.startswith(("target.", "student.")) for name in state):
        roles = {role: _below(state, role) for role in ("target", "student", "predictor")}
        rest = [name for name in state if not name.startswith(tuple(f"{role}." for role in roles))]
        return Checkpoint("dseq_jepa", **roles, left_out=rest)
    if any(isinstance(state.get(key), dict) for key in ("encoder", "target_encoder")):
        names = {"target": "target_encoder", "student": "encoder", "predictor": "predictor"}
        roles = {role: _unwrapped(state[name]) for role, name in names.items() if isinstance(state.get(name), dict)}
        kind = "dseq_official" if "cls_token" in (roles.get("target") or roles["student"]) else "ijepa"
        return Checkpoint(kind, **roles, left_out=[name for name in state if name not in names.values()])
    for key in ("state_dict_ema", "model_ema", "state_dict", "model", "teacher"):
        if isinstance(state.get(key), dict):
            return Checkpoint("timm", _unwrapped(state[key]), left_out=[name for name in state if name != key])
    return Checkpoint("timm", _unwrapped(state))


def encoder_weights(state: dict[str, Any], which: str = "target") -> Weights:
    """The encoder's weights in a state dictionary of any known kind; the target's, unless the student is asked for."""
    return parse(state).encoder(which)


def misfits(
    weights: Weights, parameters: Weights
) -> tuple[list[str], list[str], list[tuple[str, tuple[int, ...], tuple[int, ...]]]]:
    """Names that the weights lack, names they have beyond the parameters, and (name, wanted, found) of other shapes."""
    missing = [name for name in parameters if name not in weights]
    unused = [name for name in weights if name not in parameters]
    shared = [name for name in parameters if name in weights]
    shapes = [(name, tuple(parameters[name].shape), tuple(weights[name].shape)) for name in shared]
    return missing, unused, [(name, wanted, found) for name, wanted, found in shapes if wanted != found]


def _below(state: dict[str, Any], role: str) -> Weights:
    return {name.removeprefix(f"{role}."): value for name, value in state.items() if name.startswith(f"{role}.")}


def _unwrapped(weights: dict[str, Any]) -> Weights:
    """Without the prefixes that DDP and torch.compile put before every name."""
    return {re.sub(r"^((module|_orig_mod)\.)+", "", name): value for name, value in weights.items()}
