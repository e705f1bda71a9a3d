"""A fine-tuned backbone with its head → a Hub-ready folder that stock timm and transformers' pipeline load.

The folder names a stock architecture, its arguments and the classes; what loads it needs nothing of this project.
"""

import json
import re
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import timm
import torch
from huggingface_hub import ModelCardData
from timm.models import get_model_args
from torch import nn

from timm_dseq import UserError
from timm_dseq.dseq_jepa import BACKBONE, STOCK
from timm_dseq.hub import cards
from timm_dseq.hub.stock import StockModel
from timm_dseq.hub.weights import save_tensors

from ..data.digests import weights_digest
from ..run.export import public_name, replacing

Tensors = dict[str, torch.Tensor]
_NO_ARCHITECTURE = ("num_classes", "in_chans", "img_size")  # given elsewhere: twice, transformers fails
_CARD = Path(__file__).with_name("classifier_card.md")


@dataclass(frozen=True)
class Description:
    """What config.json and the model card say of a classifier, known before it is trained."""

    architecture: str  # in stock timm
    model_args: dict[str, Any]
    name: str  # architecture.tag, the architecture under our own name if it has one
    backbone: str  # what was fine-tuned, as tables call it
    backbone_digest: str  # of its weights before
    trained_on: str
    label_names: list[str]
    preprocessing: dict[str, Any]  # timm's words: input_size, mean, std, crop_pct, …
    fixed_size: bool
    head: str  # name of the head's module
    license: str

    @property
    def config(self) -> dict[str, Any]:
        """config.json, in timm's schema."""
        return {
            "architecture": self.architecture,
            "num_classes": len(self.label_names),
            "label_names": self.label_names,
            "model_args": self.model_args,
            "pretrained_cfg": {
                "tag": self.name.partition(".")[2],
                "custom_load": False,
                "fixed_input_size": self.fixed_size,
                "num_classes": len(self.label_names),
                "classifier": self.head,
                "license": self.license,
                **{k: list(value) if isinstance(value, tuple) else value for k, value in self.preprocessing.items()},
            },
        }


def describe(
    model: nn.Module, shown: str, label_names: list[str], trained_on: str, preprocessing: dict[str, Any]
) -> Description:
    """The description of a model with its head. shown: what tables call the backbone. trained_on: data.path.

    A model that stock timm cannot rebuild with the same weights is refused here, before it is trained.
    """
    if not hasattr(model, "get_classifier"):
        raise UserError(f"model={shown} has no weights to train: name a backbone.")
    source = model.pretrained_cfg
    stock = STOCK.get(source["architecture"], source["architecture"])
    args = {key: value for key, value in get_model_args(model).items() if key not in _NO_ARCHITECTURE}
    model_args = {**(BACKBONE if stock != source["architecture"] else {}), **args}
    size = tuple(preprocessing["input_size"][1:])
    architecture = StockModel(stock, size, model_args).dseq_name or stock
    if source["fixed_input_size"] and size != tuple(timm.get_pretrained_cfg(stock).input_size[1:]):
        model_args["img_size"] = list(size)
    check_rebuilds(model, shown, stock, {"num_classes": len(label_names), **model_args})
    trained_on = public_name(trained_on)
    earlier_tag = re.search(r"\.(\w+)$", shown)
    tag = [earlier_tag[1] if earlier_tag else "", "ft", re.sub(r"\W+", "_", trained_on.lower()).strip("_")]
    backbone = deepcopy(model)
    backbone.reset_classifier(0)
    return Description(
        architecture=stock,
        model_args=model_args,
        name=f"{architecture}.{'_'.join(filter(None, tag))}",
        backbone=shown,
        backbone_digest=weights_digest(backbone),
        trained_on=trained_on,
        label_names=label_names,
        preprocessing=preprocessing,
        fixed_size=source["fixed_input_size"],
        head=source["classifier"],
        license=source.get("license") or "unknown",
    )


def check_rebuilds(model: nn.Module, shown: str, stock: str, args: dict[str, Any]) -> None:
    """One line if what stock timm builds with these arguments has other weights than the model."""
    with torch.device("meta"):
        built = timm.create_model(stock, **args)
    shapes, wanted = ({key: tensor.shape for key, tensor in part.state_dict().items()} for part in (built, model))
    for key in sorted({*shapes, *wanted}):
        if shapes.get(key) != wanted.get(key):
            raise UserError(f"model={shown} cannot be exported: stock timm's {stock} has another {key}.")


def save(folder: Path, weights: Tensors, description: Description, words: dict[str, str]) -> None:
    """Write the Hub-ready folder. words: introduction, training and results, for the card."""
    size = sum(tensor.numel() for tensor in weights.values())
    with replacing(folder) as fresh:
        fresh.mkdir(parents=True)
        save_tensors(weights, fresh / "model.safetensors")
        (fresh / "config.json").write_text(json.dumps(description.config, indent=2) + "\n", encoding="utf-8")
        (fresh / "README.md").write_text(card(description, size, words), encoding="utf-8")


def card(description: Description, parameters: int, words: dict[str, str]) -> str:
    """The model card. What only the publisher knows is a blank, with which `timm-dseq push` refuses the folder."""
    height, width = description.preprocessing["input_size"][1:]
    known = description.license != "unknown"
    front_matter = ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["timm", "transformers", "image-classification"],
        license=description.license if known else "[TO BE STATED: licence]",
    )
    names = ", ".join(description.label_names[:10]) + (", …" if len(description.label_names) > 10 else "")
    return Template(_CARD.read_text(encoding="utf-8")).substitute(
        name=description.name,
        repository=cards.REPOSITORY.format(name=description.name),
        front_matter=front_matter.to_yaml(),
        stock=description.architecture,
        model_args=", ".join(f"`{key}={value!r}`" for key, value in description.model_args.items()) or "no arguments",
        parameters=f"{parameters / 1e6:.1f}",
        size=f"{height} × {width}",
        resize=str(int(min(height, width) / description.preprocessing["crop_pct"])),
        interpolation=description.preprocessing["interpolation"],
        crop=f"{height} × {width}",
        classes=str(len(description.label_names)),
        some_names=names,
        licence=f"{description.license if known else '[TO BE STATED: licence]'}. The data set has its own terms.",
        **words,
    )
