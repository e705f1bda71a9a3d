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
from safetensors.torch import save_file
from timm.models import get_model_args
from torch import nn

from timm_dseq import UserError
from timm_dseq.dseq_jepa import BACKBONE, STOCK
from timm_dseq.hub import cards
from timm_dseq.hub.stock import StockModel

from ..data.digests import weights_digest
from ..run.export import public_name, replacing

Tensors = dict[str, torch.Tensor]
_NO_ARCHITECTURE = ("num_classes", "in_chans", "img_size")  # given elsewhere: twice, transformers fails
_CARD = Path(__file__).with_name("classifier_card.md")


@dataclass(frozen=True)
class Described:
    """What config.json says of a classifier."""

    architecture: str  # in stock timm
    model_args: dict[str, Any]
    name: str  # architecture.tag under our own names
    backbone: str  # what it was before
    digest: str  # of the backbone's weights as they were
    trained_on: str
    label_names: list[str]
    data: dict[str, Any]  # input_size, mean, std, crop_pct, …: timm's words for the preprocessing
    fixed_size: bool
    classifier: str  # the head's name
    license: str

    @property
    def config(self) -> dict[str, Any]:
        """timm's schema."""
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
                "classifier": self.classifier,
                "license": self.license,
                **{key: list(value) if isinstance(value, tuple) else value for key, value in self.data.items()},
            },
        }


def describe(model: nn.Module, shown: str, label_names: list[str], trained_on: str, data: dict[str, Any]) -> Described:
    """shown: what tables call the backbone; data: from timm's resolve_model_data_config.

    What stock timm builds of the answer has to take the weights: a model for which it does not is refused before it is
    trained.
    """
    if not hasattr(model, "get_classifier"):
        raise UserError(f"model={shown} has no weights to train: name a backbone.")
    source = model.pretrained_cfg
    stock = STOCK.get(source["architecture"], source["architecture"])
    args = {key: value for key, value in get_model_args(model).items() if key not in _NO_ARCHITECTURE}
    model_args = {**(BACKBONE if stock != source["architecture"] else {}), **args}
    size = tuple(data["input_size"][1:])
    architecture = StockModel(stock, size, model_args).dseq_name or stock
    if source["fixed_input_size"] and size != tuple(timm.get_pretrained_cfg(stock).input_size[1:]):
        model_args["img_size"] = list(size)
    trained_on = public_name(trained_on)
    earlier = re.search(r"\.(\w+)$", shown)
    words = [earlier[1] if earlier else "", "ft", re.sub(r"\W+", "_", trained_on.lower()).strip("_")]
    bare = deepcopy(model)
    bare.reset_classifier(0)
    described = Described(
        architecture=stock,
        model_args=model_args,
        name=f"{architecture}.{'_'.join(filter(None, words))}",
        backbone=shown,
        digest=weights_digest(bare),
        trained_on=trained_on,
        label_names=label_names,
        data=data,
        fixed_size=source["fixed_input_size"],
        classifier=source["classifier"],
        license=source.get("license") or "unknown",
    )
    with torch.device("meta"):
        built = timm.create_model(stock, num_classes=len(label_names), **model_args)
    shapes, wanted = ({key: tensor.shape for key, tensor in part.state_dict().items()} for part in (built, model))
    for key in sorted({*shapes, *wanted}):
        if shapes.get(key) != wanted.get(key):
            raise UserError(f"model={shown} cannot be exported: stock timm's {stock} has another {key}.")
    return described


def save(folder: Path, weights: Tensors, described: Described, words: dict[str, str]) -> None:
    """Write the Hub-ready folder. words: introduction, training and results, for the card."""
    size = sum(tensor.numel() for tensor in weights.values())
    with replacing(folder) as fresh:
        fresh.mkdir(parents=True)
        save_file(weights, fresh / "model.safetensors", metadata={"format": "pt"})
        (fresh / "config.json").write_text(json.dumps(described.config, indent=2) + "\n", encoding="utf-8")
        (fresh / "README.md").write_text(card(described, size, words), encoding="utf-8")


def card(described: Described, parameters: int, words: dict[str, str]) -> str:
    """The model card; what nobody can know but the publisher is a blank, with which `timm-dseq push` refuses."""
    height, width = described.data["input_size"][1:]
    known = described.license != "unknown"
    names = ", ".join(described.label_names[:10]) + (", …" if len(described.label_names) > 10 else "")
    return Template(_CARD.read_text(encoding="utf-8")).substitute(
        name=described.name,
        repository=cards.REPOSITORY.format(name=described.name),
        front_matter=f"license: {described.license}" if known else 'license: "[TO BE STATED: licence]"',
        stock=described.architecture,
        model_args=", ".join(f"`{key}={value!r}`" for key, value in described.model_args.items()) or "no arguments",
        parameters=f"{parameters / 1e6:.1f}",
        size=f"{height} × {width}",
        resize=str(int(min(height, width) / described.data["crop_pct"])),
        interpolation=described.data["interpolation"],
        crop=f"{height} × {width}",
        classes=str(len(described.label_names)),
        some_names=names,
        licence=f"{described.license if known else '[TO BE STATED: licence]'}. The data set has its own terms.",
        **words,
    )
