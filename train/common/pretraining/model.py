"""The model and the optimiser that the settings describe; new weights, given ones, or those of a run to continue."""

import os
from pathlib import Path

import timm
import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from timm_dseq import DSeqJEPA, UserError, block_masks
from timm_dseq.errors import similar
from timm_dseq.hub.load import load_backbone
from timm_dseq.hub.model_args import making
from timm_dseq.hub.weights import Weights, encoder_weights, misfits, parse, read

from .settings import Config, Model, Optim


def build(config: Config) -> DSeqJEPA:
    """DSeqJEPA on the host, the same in every process."""
    torch.manual_seed(config.seed)
    settings = config.model
    if not timm.is_model(settings.name):
        hint = similar(settings.name.partition(".")[0], timm.list_models())
        raise UserError(f"model.name={settings.name} is no model of timm{hint}.")
    with making(f"model.name={settings.name}"):
        encoder = timm.create_model(settings.name, num_classes=0, img_size=settings.img_size, **settings.args)
    model = DSeqJEPA(
        encoder,
        settings.objective,
        query=settings.query,
        block=settings.block,
        num_regions=settings.num_regions,
        min_area=settings.min_area,
        order=settings.order,
        regions=settings.regions,
        stop_after=settings.stop_after,
        flat=settings.flat,
        loss=settings.loss,
        contrastive=settings.contrastive,
        terms=settings.terms,
        views=int(settings.views),
        views_factor=settings.views_factor,
        temperature=settings.temperature,
        predictor_width=int(settings.predictor_width),  # the parser's own integer type breaks torch.compile
        predictor_depth=settings.predictor_depth,
    )
    rows, columns = model.student.patch_embed.grid_size
    if model.predicts and not block_masks((rows, columns), torch.arange(16)).targets.any():
        raise UserError(
            f"model.img_size={settings.img_size}: {rows}×{columns} patches are too few for blocks: give more, or a "
            "smaller patch_size in model.args."
        )
    if settings.init:
        initialise(model, settings)
    if config.system.checkpointing:
        model.student.set_grad_checkpointing()
        model.predictor.grad_checkpointing = True
    return model.double() if config.system.precision == "float64" else model


def initialise(model: DSeqJEPA, settings: Model) -> None:
    """Load the weights of model.init: an encoder's for student and target, or all parts of an exported folder.

    It names what every command takes for a model. What only other losses have learnt is left out; what the folder lacks
    for this run's losses stays new.
    """
    path = Path(settings.init)
    file = path / "model.safetensors" if path.is_dir() else path
    if file.is_file():
        target = encoder_weights(read(file))
    else:
        with torch.random.fork_rng(devices=[]):  # no part of this run's randomness
            target = load_backbone(settings.init, random=None)[0].state_dict()
    parts = [(model.target, target), (model.student, target)]
    if os.path.lexists(more := path / "pretraining.safetensors"):
        others = parse(read(more))
        parts = [(model.target, target), (model.student, others.student)]
        if others.predictor:
            parts.append((model.predictor, others.predictor))
        for name in ("recognition", *model.terms):
            head = {key.removeprefix(f"{name}."): w for key, w in others.heads.items() if key.startswith(f"{name}.")}
            if head and getattr(model, name):
                parts.append((getattr(model, name), head))
    for part, weights in parts:
        _fill(part, weights, settings.init)


def _fill(part: nn.Module, weights: Weights, source: str) -> None:
    """Load all weights of one part of the model, but for its fixed positions, and a head, which it does not have."""
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith("head.")}
    current = part.state_dict()
    if "pos_embed" in current:
        weights["pos_embed"] = current["pos_embed"]
    missing, unused, reshaped = misfits(weights, current)
    for name in [*missing, *unused, *(name for name, *_ in reshaped)][:1]:
        raise UserError(
            f"model.init={source} does not fit model.name: {name} differs. Check model.name and model.args."
        )
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"model.init={source} holds numbers that are not finite, in {name}: take other weights.")
    part.load_state_dict(weights)


def optimizer_of(model: nn.Module, settings: Optim) -> torch.optim.Optimizer:
    """AdamW in two groups: weight decay on matrices, none on biases, norms and the class token."""
    spared = () if settings.decay_class_token else ("student.cls_token",)
    groups = param_groups_weight_decay(model, settings.weight_decay, no_weight_decay_list=spared)
    for group in groups:
        group["decays"] = group["weight_decay"] > 0
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=True)
