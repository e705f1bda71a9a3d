"""Checkpoints in the key layout and shapes of each kind we convert, filled with random numbers."""

from pathlib import Path

import torch
from safetensors.torch import save_file

Weights = dict[str, torch.Tensor]


def _block(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.norm1.weight": (width,),
        f"{prefix}.norm1.bias": (width,),
        f"{prefix}.attn.qkv.weight": (3 * width, width),
        f"{prefix}.attn.qkv.bias": (3 * width,),
        f"{prefix}.attn.proj.weight": (width, width),
        f"{prefix}.attn.proj.bias": (width,),
        f"{prefix}.norm2.weight": (width,),
        f"{prefix}.norm2.bias": (width,),
        f"{prefix}.mlp.fc1.weight": (4 * width, width),
        f"{prefix}.mlp.fc1.bias": (4 * width,),
        f"{prefix}.mlp.fc2.weight": (width, 4 * width),
        f"{prefix}.mlp.fc2.bias": (width,),
    }


def encoder_shapes(width=192, depth=12, patch=16, grid=14, class_token=True) -> dict[str, tuple[int, ...]]:
    """The encoder of I-JEPA, and with a class token that of the authors' DSeq-JEPA."""
    shapes = {"cls_token": (1, 1, width)} if class_token else {}
    shapes |= {
        "pos_embed": (1, grid * grid, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
    }
    for index in range(depth):
        shapes |= _block(f"blocks.{index}", width)
    return shapes | {"norm.weight": (width,), "norm.bias": (width,)}


def predictor_shapes(width=192, narrow=384, depth=6, grid=14) -> dict[str, tuple[int, ...]]:
    shapes = {
        "mask_token": (1, 1, narrow),
        "predictor_pos_embed": (1, grid * grid, narrow),
        "predictor_embed.weight": (narrow, width),
        "predictor_embed.bias": (narrow,),
    }
    for index in range(depth):
        shapes |= _block(f"predictor_blocks.{index}", narrow)
    return shapes | {
        "predictor_norm.weight": (narrow,),
        "predictor_norm.bias": (narrow,),
        "predictor_proj.weight": (width, narrow),
        "predictor_proj.bias": (width,),
    }


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def hollow_weights(shapes: dict[str, tuple[int, ...]]) -> Weights:
    """Full shapes, but one number in memory each, so that the file of a huge model is small."""
    return {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}


def wrapped(weights: Weights) -> Weights:
    """Under the names that DistributedDataParallel gives."""
    return {f"module.{name}": tensor for name, tensor in weights.items()}


def save_ijepa(path: Path, target: Weights, student: Weights, predictor: Weights) -> Path:
    """Meta's I-JEPA: `jepa-latest.pth.tar`."""
    torch.save(
        {
            "encoder": wrapped(student),
            "predictor": wrapped(predictor),
            "target_encoder": wrapped(target),
            "opt": {"state": {}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [0, 1]}]},
            "scaler": None,
            "epoch": 300,
            "loss": 0.2,
            "batch_size": 128,
            "world_size": 16,
            "lr": 1e-3,
        },
        path,
    )
    return path


def save_official(path: Path, target: Weights, student: Weights, predictor: Weights) -> Path:
    """The authors' DSeq-JEPA."""
    torch.save(
        {
            "epoch": 600,
            "encoder": wrapped(student),
            "predictor": wrapped(predictor),
            "opt": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
            "scaler": {"scale": 65536.0, "growth_factor": 2.0},
            "lr_scheduler": {"step": 10},
            "wd_scheduler": {"step": 10},
            "ema_scheduler": {"step": 10},
            "target_encoder": wrapped(target),
        },
        path,
    )
    return path


def save_training(path: Path, target: Weights, student: Weights, predictor: Weights) -> Path:
    """Our own training checkpoints: one safetensors file, the role before each name."""
    roles = {"target": target, "student": student, "predictor": predictor}
    save_file({f"{role}.{name}": tensor for role, weights in roles.items() for name, tensor in weights.items()}, path)
    return path
