"""A segmenter ↔ a folder: model.safetensors, and a config.json that says all that testing needs."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models import VisionTransformer, get_model_args

from timm_dseq import UserError
from timm_dseq.hub.model_args import check_args, making

from ..dense.backbone import DenseBackbone, at_depth, check
from ..run.export import replacing
from .classes import Classes
from .heads import HEADS
from .segmenter import Segmenter

WEIGHTS, CONFIG = "model.safetensors", "config.json"


@dataclass(frozen=True)
class Description:
    """What is known of a segmenter besides its weights."""

    architecture: str  # of timm, with timm_dseq imported
    model_args: dict[str, Any]
    img_size: list[int]  # of the ViT's own positions
    head: str
    channels: int
    ids: tuple[int, ...]  # of the classes, in masks
    names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    backbone: str  # what was trained, as tables call it
    weights: str  # digest of the backbone's weights before

    @property
    def classes(self) -> Classes:
        return Classes(tuple(self.ids), tuple(self.names))


def build(
    vit: VisionTransformer, head: str, channels: int, classes: int, mean: Sequence[float], std: Sequence[float]
) -> Segmenter:
    """A segmenter with this ViT and a fresh head. channels: of UPerNet."""
    (kind, shares, norm), depth = HEADS[head], len(vit.blocks)
    taps = [at_depth(share, depth) for share in shares] if shares else [*range(max(0, depth - 4), depth)]
    made = kind(vit.embed_dim, taps, classes, **({"channels": channels} if head == "upernet" else {}))
    return Segmenter(DenseBackbone(vit, taps, norm=norm), made, mean, std, frozen=head != "upernet")


def describe(vit: VisionTransformer) -> dict[str, Any]:
    """The part of a description that makes this ViT again."""
    args = get_model_args(vit)
    others = {name: value for name, value in args.items() if name not in ("num_classes", "img_size", "drop_path_rate")}
    size = list(vit.patch_embed.img_size)
    return {"architecture": vit.pretrained_cfg["architecture"], "model_args": others, "img_size": size}


def check_rebuilds(segmenter: Segmenter, description: Description) -> None:
    """One line, before training, if what `load` would build has other weights."""
    with torch.device("meta"):
        built = rebuilt(description)
    shapes, wanted = ({key: tensor.shape for key, tensor in each.state_dict().items()} for each in (built, segmenter))
    if fault := next((key for key in sorted({*shapes, *wanted}) if shapes.get(key) != wanted.get(key)), None):
        raise UserError(f"model={description.backbone} cannot be exported: timm makes another {fault}.")


def rebuilt(description: Description) -> Segmenter:
    """A segmenter of this description, with random weights."""
    with making(f"model {description.architecture}"):
        vit = timm.create_model(
            description.architecture, img_size=description.img_size, num_classes=0, **description.model_args
        )
    check(vit, description.backbone)
    return build(vit, description.head, description.channels, len(description.ids), description.mean, description.std)


def save(folder: Path, segmenter: Segmenter, description: Description) -> None:
    """Write the folder."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in segmenter.state_dict().items()}
    content = json.dumps(asdict(description), indent=2) + "\n"
    with replacing(folder) as fresh:
        fresh.mkdir(parents=True)
        save_file(weights, fresh / WEIGHTS, metadata={"format": "pt"})
        (fresh / CONFIG).write_text(content, encoding="utf-8")


def load(run: Path) -> tuple[Segmenter, Description]:
    """What `save` wrote, of a run or in this folder itself; one line where it holds anything else."""
    folder = run / "export" if (run / "export").is_dir() else run
    if not all((folder / name).is_file() for name in (CONFIG, WEIGHTS)):
        raise UserError(f"{folder} holds no segmenter: name a run of segment.py that has ended, or its export/.")
    try:
        description = Description(**json.loads((folder / CONFIG).read_text(encoding="utf-8")))
        if description.head not in HEADS or not timm.is_model(description.architecture):
            raise ValueError(f"{description.head!r} or {description.architecture!r} is unknown")
        check_args(description.model_args, f"{folder / CONFIG}: model_args")
        segmenter = rebuilt(description)
        segmenter.load_state_dict(load_file(folder / WEIGHTS))
    except UserError:
        raise
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be read ({' '.join(str(error).split())[:200]}): export it again.") from error
    return segmenter.eval(), description
