"""DSeq-JEPA backbones for timm: the `dseq_jepa_vit_*` entry points and their pretrained configurations.

Paper: DSeq-JEPA: Discriminative Sequential Joint-Embedding Predictive Architecture, https://arxiv.org/abs/2511.17354

Each model is timm's `VisionTransformer` with a class token that carries no position, the mean of the patch tokens as
its feature, and the final norm before the mean. Images (B, C, H, W) go in, features (B, D) or logits come out.
"""

import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn

from .errors import UserError
from .hub.weights import encoder_weights, misfits
from .positions import sincos_positions

__all__ = [
    *("ARCHITECTURES", "BACKBONE", "META", "PUBLISHED", "SHIPPED", "STOCK", "TAGS"),
    *("DSeqVisionTransformer", "default_cfgs"),
]

# What makes a ViT a DSeq-JEPA backbone, as arguments of timm's VisionTransformer.
BACKBONE = {"class_token": True, "no_embed_class": True, "global_pool": "avg", "fc_norm": False}

ARCHITECTURES = {
    "dseq_jepa_vit_ti16": {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3},
    "dseq_jepa_vit_s16": {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6},
    "dseq_jepa_vit_b16": {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12},
    "dseq_jepa_vit_l16": {"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16},
    "dseq_jepa_vit_h14": {"patch_size": 14, "embed_dim": 1280, "depth": 32, "num_heads": 16},
    "dseq_jepa_vit_h16_448": {"patch_size": 16, "embed_dim": 1280, "depth": 32, "num_heads": 16},
}

# The timm architecture that equals each of ours once BACKBONE is given: what a Hub config names, so that timm and
# transformers load the weights without this package.
STOCK = {
    "dseq_jepa_vit_ti16": "vit_tiny_patch16_224",
    "dseq_jepa_vit_s16": "vit_small_patch16_224",
    "dseq_jepa_vit_b16": "vit_base_patch16_224",
    "dseq_jepa_vit_l16": "vit_large_patch16_224",
    "dseq_jepa_vit_h14": "vit_huge_patch14_224",
    "dseq_jepa_vit_h16_448": "vit_huge_patch16_gap_448",
}

# model.tag → "organisation/repository@revision": the weights that exist, and the only source of `hf_hub_id`.
PUBLISHED: dict[str, str] = {}


def namespace() -> str:
    """The organisation that TIMM_DSEQ_NAMESPACE names, "" if it is not set; UserError if it cannot be one."""
    name = os.environ.get("TIMM_DSEQ_NAMESPACE", "")
    if name and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(f"TIMM_DSEQ_NAMESPACE={name!r} is no organisation or user of the Hub: give its bare name.")
    return name


def _hub_id(model_tag: str) -> str | None:
    """The repository of the weights of `model.tag`: in the namespace from the environment, else that in PUBLISHED."""
    try:
        owner = namespace()
    except UserError:  # an import must not fail: _locate_weights raises it when weights are asked for
        return None
    return f"{owner}/{model_tag}" if owner else PUBLISHED.get(model_tag)


def _size(architecture: str) -> int:
    """The image's side of which the paper trains the architecture."""
    return 448 if architecture.endswith("448") else 224


def _cfg(model_tag: str, size: int = 224, **kwargs: Any) -> dict[str, Any]:
    return {
        "hf_hub_id": _hub_id(model_tag),
        "hf_hub_filename": "model.safetensors",
        "num_classes": 0,
        "input_size": (3, size, size),
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "origin_url": "https://github.com/SkyShunsuke/DSeq-JEPA",
        "paper_name": "DSeq-JEPA: Discriminative Sequential Joint-Embedding Predictive Architecture",
        "paper_ids": "arXiv:2511.17354",
        **kwargs,
    }


# in1k: ours, the paper's recipe. in1k_official: the authors' weights, converted; their code is MIT, for the weights no
# licence is stated. in1k_vicreg: ours with the contrastive term. in1k_ijepa: I-JEPA on the same ViT.
TAGS = {
    "in1k": {},
    "in1k_official": {"license": "unknown"},
    "in1k_vicreg": {},
    "in1k_ijepa": {},
}

# Meta's I-JEPA, whose encoders have no class token: model.tag → the name in timm whose configuration has the address.
META = {
    "dseq_jepa_vit_h14.in1k_ijepa_meta": "vit_huge_patch14_gap_224.in1k_ijepa",
    "dseq_jepa_vit_h16_448.in1k_ijepa_meta": "vit_huge_patch16_gap_448.in1k_ijepa",
}
META_TAG = "in1k_ijepa_meta"
_CROPS = dict(zip(META, (0.9, 1.0), strict=True))  # as timm crops for the same weights
IJEPA_LICENSE = "cc-by-nc-4.0"  # of Meta's release, which only Meta can change
_IJEPA = {
    "license": IJEPA_LICENSE,
    "origin_url": "https://github.com/facebookresearch/ijepa",
    "paper_name": "Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture",
    "paper_ids": "arXiv:2301.08243",
}

_OURS = {"origin_url": None, "paper_name": None, "paper_ids": None}  # trained here, and not by the paper's objective
# Weights that are part of this package: model.tag → what differs from `_cfg`. A card stands beside each file.
SHIPPED = {
    "dseq_jepa_vit_ti16.photos65k": {"size": 128, "license": "other", **_OURS},
}
WEIGHTS = Path(__file__).parent / "weights"

# timm takes the first tag of a model that has weights where none is named, and with it the image size.
default_cfgs = generate_default_cfgs(
    {
        name: _cfg(name, hf_hub_id=None, file=str(WEIGHTS / f"{name}.safetensors"), **settings)
        for name, settings in SHIPPED.items()
    }
    | {
        f"{architecture}.{tag}": _cfg(f"{architecture}.{tag}", _size(architecture), **settings)
        for architecture in ARCHITECTURES
        for tag, settings in TAGS.items()
    }
    | {name: _cfg(name, _size(name.partition(".")[0]), crop_pct=_CROPS[name], **_IJEPA) for name in META}
)


class DSeqVisionTransformer(VisionTransformer):
    """timm's ViT with another initialisation: I-JEPA's, and sin-cos positions for the grid it is built at.

    Positions stay trainable, as in all of timm; pretraining freezes them.
    """

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        super().init_weights(mode, needs_reset)
        if (mode or self.weight_init_mode) not in ("", "reset"):  # the caller asked for one of timm's schemes
            return
        if self.pos_embed is not None:
            positions = sincos_positions(self.patch_embed.grid_size, self.embed_dim, self.pos_embed.device)
            with torch.no_grad():  # a position of a prefix token stays timm's
                self.pos_embed[:, self.pos_embed.shape[1] - len(positions) :] = positions.to(self.pos_embed.dtype)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.patch_embed.proj.weight, std=0.02)
        if self.patch_embed.proj.bias is not None:
            nn.init.zeros_(self.patch_embed.proj.bias)
        if not self.fix_init:  # else timm has already rescaled the blocks
            self.fix_init_weight()


def is_size(value: Any) -> bool:
    """Whether a value is a whole number from 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _check_arguments(variant: str, arguments: dict[str, Any], class_token: bool) -> None:
    """Refuse, in one line, arguments that would fail late, that no weights fit, or that make it another model."""
    if arguments.get("class_token") and not class_token:
        raise UserError(f"{variant}.{META_TAG} has no class token, as Meta's I-JEPA: leave class_token out.")
    if class_token and not arguments.get("class_token", True):
        raise UserError(
            f"{variant} always has a class token (saliency needs it): leave class_token out, or take timm's "
            f"{STOCK[variant]} with class_token=False."
        )
    if arguments.get("reg_tokens"):
        raise UserError(
            f"{variant} has no register tokens and no weights for them: leave reg_tokens out, or take timm's "
            f"{STOCK[variant]} with reg_tokens={arguments['reg_tokens']}."
        )
    if arguments.get("use_naflex"):
        raise UserError(f"{variant} is a plain ViT: leave use_naflex out, and use dynamic_img_size=True for any size.")
    num_classes = arguments.get("num_classes", 0)
    if num_classes != 0 and not is_size(num_classes):
        raise UserError(f"{variant}: num_classes={num_classes!r} is no class count: give 0 (no head) or more.")
    if not is_size(arguments.get("in_chans", 3)):
        raise UserError(f"{variant}: in_chans={arguments['in_chans']!r} is no channel count: give 1 or more.")

    img_size, patch_size = arguments.get("img_size", 224), arguments["patch_size"]
    sides = img_size if isinstance(img_size, (tuple, list)) else (img_size, img_size)
    patch_sides = patch_size if isinstance(patch_size, (tuple, list)) else (patch_size, patch_size)
    if len(sides) != 2 or not all(map(is_size, sides)):
        raise UserError(f"{variant}: img_size={img_size!r} is no image size: give a whole number or (height, width).")
    if len(patch_sides) != 2 or not all(map(is_size, patch_sides)):
        raise UserError(f"{variant}: patch_size={patch_size!r} is no patch size: give a whole number or a pair.")
    if not arguments.get("dynamic_img_pad") and any(s % p for s, p in zip(sides, patch_sides, strict=True)):
        fits = tuple(max(p, round(s / p) * p) for s, p in zip(sides, patch_sides, strict=True))
        raise UserError(
            f"{variant}: img_size={tuple(sides)} is not divisible by the patch {tuple(patch_sides)}: take {fits}, "
            "or pad with dynamic_img_pad=True."
        )


def _filter_weights(state_dict: dict[str, Any], model: VisionTransformer) -> dict[str, torch.Tensor]:
    """A checkpoint of any known kind → exactly the model's parameters, or an error that names the first difference.

    A head or attention pool that the checkpoint lacks stays at its initial weights, with a warning. Everything else
    has to be there and to fit.
    """
    weights = checkpoint_filter_fn(encoder_weights(state_dict), model)
    parameters = model.state_dict()
    if "fc_norm.weight" in parameters and "norm.weight" not in parameters:  # fc_norm=True: the same norm, moved
        weights = {re.sub(r"^norm\.", "fc_norm.", name): tensor for name, tensor in weights.items()}
    if model.num_classes != model.pretrained_cfg["num_classes"] or model.num_classes == 0:
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("head.")}

    missing, unused, reshaped = misfits(weights, parameters)
    fresh = [name for name in missing if name.startswith(("head.", "attn_pool."))]
    missing = [name for name in missing if name not in fresh]
    if missing or unused:
        which = f"have no {missing[0]}" if missing else f"also hold {unused[0]}"
        raise UserError(
            f"The weights {which}: they are not of this architecture. Leave out the arguments that change the "
            "backbone, or build it with pretrained=False."
        )
    for name, wanted, given in reshaped:
        if name == "patch_embed.proj.weight" and wanted[:1] + wanted[2:] == given[:1] + given[2:]:
            continue  # timm adapts the input channels
        raise UserError(
            f"The weights do not fit: {name} is {given} in the file and {wanted} in the model. Check the model's name "
            "and its arguments."
        )
    if fresh:
        warnings.warn(
            f"Not in the pretrained weights, so freshly initialised: {', '.join(fresh)}. Train before use.",
            stacklevel=2,
        )
    return weights


def _create_dseq_jepa(variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    arguments = {**BACKBONE, **ARCHITECTURES[variant], **kwargs}
    asked, overlay = arguments.pop("pretrained_cfg", None), dict(arguments.pop("pretrained_cfg_overlay", None) or {})
    own_file = overlay.get("file")
    if pretrained:
        from .hub.store.lookup import choose, locate

        asked = choose(variant, asked, overlay)
    cfg = resolve_pretrained_cfg(variant, asked, overlay).to_dict()
    arguments.setdefault("img_size", cfg["input_size"][1:])
    if of_meta := cfg.get("tag") == META_TAG:
        arguments["class_token"] = kwargs.get("class_token", False)
    _check_arguments(variant, arguments, class_token=not of_meta)
    arguments.pop("use_naflex", None)

    file = locate(variant, cfg, asked, overlay, arguments.get("cache_dir")) if pretrained else None
    if file:
        overlay["file"] = file
    model = build_model_with_cfg(
        DSeqVisionTransformer,
        variant,
        pretrained,
        pretrained_cfg=asked,
        pretrained_cfg_overlay=overlay,
        pretrained_filter_fn=_filter_weights,
        pretrained_strict=False,  # _filter_weights checks more, and knows which parameters may be missing
        feature_cfg={"out_indices": arguments.pop("out_indices", 3), "feature_cls": "getter"},
        **arguments,
    )
    if not own_file:  # a path of this machine does not belong in the model's configuration
        model.pretrained_cfg.pop("file", None)
    return model


@register_model
def dseq_jepa_vit_ti16(pretrained: bool = False, **kwargs: Any) -> DSeqVisionTransformer:
    """DSeq-JEPA ViT-Ti/16, not in the paper: at 128 with the weights of this package, else at 224."""
    return _create_dseq_jepa("dseq_jepa_vit_ti16", pretrained, **kwargs)


@register_model
def dseq_jepa_vit_s16(pretrained: bool = False, **kwargs: Any) -> DSeqVisionTransformer:
    """DSeq-JEPA ViT-S/16 at 224: not in the paper, the small model to try ideas on."""
    return _create_dseq_jepa("dseq_jepa_vit_s16", pretrained, **kwargs)


@register_model
def dseq_jepa_vit_b16(pretrained: bool = False, **kwargs: Any) -> DSeqVisionTransformer:
    """DSeq-JEPA ViT-B/16 at 224: the paper's main model."""
    return _create_dseq_jepa("dseq_jepa_vit_b16", pretrained, **kwargs)


@register_model
def dseq_jepa_vit_l16(pretrained: bool = False, **kwargs: Any) -> DSeqVisionTransformer:
    """DSeq-JEPA ViT-L/16 at 224."""
    return _create_dseq_jepa("dseq_jepa_vit_l16", pretrained, **kwargs)


@register_model
def dseq_jepa_vit_h14(pretrained: bool = False, **kwargs: Any) -> DSeqVisionTransformer:
    """DSeq-JEPA ViT-H/14 at 224: the size I-JEPA published, not in the paper."""
    return _create_dseq_jepa("dseq_jepa_vit_h14", pretrained, **kwargs)


@register_model
def dseq_jepa_vit_h16_448(pretrained: bool = False, **kwargs: Any) -> DSeqVisionTransformer:
    """DSeq-JEPA ViT-H/16 at 448: the paper's largest model."""
    return _create_dseq_jepa("dseq_jepa_vit_h16_448", pretrained, **kwargs)
