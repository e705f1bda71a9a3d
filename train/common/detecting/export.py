"""The detector that a run ends in as a folder: model.safetensors and config.json, and the way back."""

import json
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models import get_model_args

from timm_dseq import UserError
from timm_dseq.hub.model_args import check_args, making
from timm_dseq.images import decode

from ..dense.backbone import DenseBackbone, at_depth
from ..dense.pyramid import EVERYWHERE, TAPS
from ..run.export import replacing
from .model import Detector

KIND = "timm_dseq detector"
_ELSEWHERE = ("img_size", "num_classes", "drop_path_rate")  # or for training alone
_FIELDS = {
    "kind": str,
    "architecture": str,
    "model_args": dict,
    "img_size": list,
    "pyramid": str,
    "window": (int, type(None)),
    "size": int,
    "channels": int,
    "mean": list,
    "std": list,
    "masks": bool,
    "names": list,
    "ids": list,
}


def describe(detector: Detector, kind: str, names: tuple[str, ...], ids: tuple[int, ...]) -> dict[str, Any]:
    """config.json: all that is needed to build the detector again. kind: of its pyramid."""
    dense, transform = detector.rcnn.backbone.backbone, detector.rcnn.transform
    args = {name: value for name, value in get_model_args(dense.vit).items() if name not in _ELSEWHERE}
    return {
        "kind": KIND,
        "architecture": dense.vit.pretrained_cfg["architecture"],
        "model_args": args,
        "img_size": list(dense.vit.patch_embed.img_size),  # of the grid that its positions are for
        "pyramid": kind,
        "window": dense.window,
        "size": transform.max_size,
        "channels": detector.rcnn.backbone.out_channels,
        "mean": list(transform.image_mean),
        "std": list(transform.image_std),
        "masks": detector.rcnn.roi_heads.has_mask(),
        "names": list(names),
        "ids": list(ids),
    }


def save(folder: Path, detector: Detector, config: dict[str, Any]) -> None:
    """Write the folder, in one step."""
    with replacing(folder) as fresh:
        fresh.mkdir(parents=True)
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in detector.state_dict().items()}
        save_file(weights, fresh / "model.safetensors", metadata={"format": "pt"})
        (fresh / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_detector(folder: str | Path) -> tuple[Detector, dict[str, Any]]:
    """The detector in a folder that `train/detect.py` wrote, or in export/ of its run, and its config.json."""
    folder = Path(folder)
    folder = folder / "export" if (folder / "export").is_dir() else folder
    config = _config(folder / "config.json")
    with making(f"the detector in {folder}"):
        size = tuple(config["img_size"])
        vit = timm.create_model(config["architecture"], img_size=size, num_classes=0, **config["model_args"])
        depth = len(vit.blocks)
        taps, everywhere = ([at_depth(x, depth) for x in of[config["pyramid"]]] for of in (TAPS, EVERYWHERE))
        detector = Detector(
            DenseBackbone(vit, taps, config["window"], everywhere),
            config["pyramid"],
            len(config["names"]),
            config["size"],
            config["mean"],
            config["std"],
            config["masks"],
            config["channels"],
        )
    try:
        detector.load_state_dict(load_file(folder / "model.safetensors"))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"{folder}/model.safetensors does not hold the weights of its detector ({reason}).") from error
    return detector.eval(), config


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: name a run of detect.py, or its export/.") from error
    fits = isinstance(config, dict) and all(isinstance(config.get(name), kind) for name, kind in _FIELDS.items())
    fits = fits and config["kind"] == KIND and config["pyramid"] in TAPS and timm.is_model(config["architecture"])
    if not fits or len(config["names"]) != len(config["ids"]):
        raise UserError(f"{path} describes no detector: name a run of detect.py, or its export/.")
    check_args(config["model_args"], f"{path}: model_args")  # none that names other files
    return config


@torch.inference_mode()
def detect(detector: Detector, image: Image.Image | str) -> dict[str, torch.Tensor]:
    """What is in an image, open or a file: boxes (n, 4) in its pixels, labels (n,), which are indices of the config's
    names, scores (n,), and masks (n, H, W) bool, best first."""
    opened = decode({"bytes": None, "path": image} if isinstance(image, str) else image)
    pixels = torch.frombuffer(bytearray(opened.tobytes()), dtype=torch.uint8)
    pixels = pixels.reshape(opened.height, opened.width, 3).permute(2, 0, 1)
    (found,) = detector([pixels.to(next(detector.parameters()).device)])
    found["labels"] = found["labels"] - 1
    if "masks" in found:
        found["masks"] = found["masks"][:, 0] > 0.5
    return found
