"""A finished run → a Hub-ready folder, a report, and what to do next."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from timm_dseq import UserError
from timm_dseq.hub import cards
from timm_dseq.hub.convert import convert
from timm_dseq.hub.push import push
from timm_dseq.hub.stock import StockModel, described

from ..run.checkpoints import state_of
from ..run.export import next_steps, public_name, replacing, table
from ..run.log import records
from ..system.screen import Screen
from .monitor.report import write_report
from .settings import Config


def export(config: Config, checkpoint: Path, screen: Screen) -> None:
    """Export the target encoder of a checkpoint, write the report, publish if asked."""
    output = Path(config.output_dir)
    folder = output / "export"
    with replacing(folder) as fresh:
        convert(checkpoint / "model.safetensors", fresh, with_pretraining_state=True)
        _describe(fresh, config, state_of(checkpoint)["done"], records(output / "log.jsonl"))
    report = write_report(output)
    trial = f"import timm; print(timm.create_model({json.dumps(f'local-dir:{folder}')}, pretrained=True))"
    screen.say(f"\ntarget encoder, ready for the Hub: {folder}\ncurves and pictures: {report}")
    screen.say(next_steps(folder, trial))
    if config.hub.push_to:
        result = push(folder, config.hub.push_to, private=config.hub.private)
        screen.say(f"published: {result['url']}")


@torch.no_grad()
def check_exportable(config: Config, encoder: nn.Module) -> None:
    """Refuse, before a run, an encoder that stock timm would not build again as it is."""
    settings = config.model
    if not settings.args:
        return
    refused = f"model.name={settings.name} with these model.args could not be exported after the run"
    try:
        again = described(settings.name, settings.img_size, settings.args).build()
        again.load_state_dict(encoder.state_dict())
    except (UserError, TypeError, ValueError, LookupError, AssertionError, RuntimeError) as error:
        raise UserError(f"{refused} ({(str(error) or type(error).__name__).splitlines()[0]}).") from error
    image = torch.randn(1, 3, settings.img_size, settings.img_size, generator=torch.Generator().manual_seed(0))
    training = encoder.training
    image = image.to(next(encoder.parameters()).dtype)
    ours, theirs = (model.eval().forward_features(image) for model in (encoder, again.to(image.dtype)))
    encoder.train(training)
    if not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4):
        raise UserError(f"{refused} (stock timm makes another model of them): leave some of them out.")


def _describe(folder: Path, config: Config, done: dict[str, Any], lines: list[dict]) -> None:
    """Describe this run in the folder's config and card.

    done: the checkpoint's progress. lines: of the log, which may be gone.
    """
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stock = StockModel.from_config(described)
    tag = re.sub(r"[^a-z0-9]+", "_", Path(public_name(config.data.path)).stem.lower()).strip("_") or "images"
    tag = "in1k" if tag in ("imagenet_1k", "imagenet_1k_wds") else tag
    described["pretrained_cfg"] |= {"tag": tag, "license": config.hub.license or "unknown"}
    card = cards.run_card(
        f"{stock.dseq_name or config.model.name.partition('.')[0]}.{tag}",
        stock,
        method=_method(config),
        training=_training(config, done),
        results=_results(config, lines),
        license=config.hub.license,
    )
    (folder / "config.json").write_text(cards.config_text(described), encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")


def _method(config: Config) -> str:
    model = config.model
    names = {"dseq": "DSeq-JEPA", "dseq_causal": "DSeq-JEPA (block-causal)", "ijepa": "I-JEPA", "views": "views"}
    name = names[model.objective]
    if model.views:
        added = "" if model.objective == "views" else f" + {model.views_factor:g} × views"
        name += f"{added} ({model.views} of an image, {model.view_share:.0%} of the patches, InfoNCE, temperature "
        name += f"{model.temperature:g})"
    terms = {**({"contrastive": 1.0} if model.contrastive else {}), **model.terms}
    return name + "".join(f" + {'' if factor == 1 else f'{factor:g} × '}{term} term" for term, factor in terms.items())


def _training(config: Config, done: dict[str, Any]) -> str:
    """What was done, as a table."""
    data, optim, model, chosen = config.data, config.optim, config.model, done["chosen"]
    side = chosen.get("resident")
    regions = f"up to {model.num_regions} regions of at least {model.min_area:g} of the image, order {model.order}, "
    regions += f"lambda {optim.regions:g} → {optim.regions_end:g} linear"
    rows = {
        "images": f"{public_name(data.path)}, split {data.split}; labels unused"
        + (f"; kept as squares of {side} px" if side else ""),
        "objective": _method(config) + (f", {regions}" if model.objective.startswith("dseq") else ""),
        "optimiser": f"AdamW, batch {optim.batch_size}",
        "length": f"{done['step']:,} steps, {done['samples']:,} images seen, of a schedule of "
        + (f"{chosen['steps']:,} steps, {config.minutes:g} minutes" if config.minutes else f"{optim.epochs:g} epochs"),
        "learning rate": f"{optim.lr_start:g} → {optim.lr:g} over {optim.warmup_epochs:g} epochs, cosine → "
        f"{optim.lr_end:g}",
        "weight decay": f"{optim.weight_decay:g} → {optim.weight_decay_end:g} cosine",
        "target encoder": f"moving average, {optim.momentum:g} → {optim.momentum_end:g} linear",
        "augmentation": f"RandomResizedCrop to {model.img_size}, scale {data.crop_scale[0]:g}–{data.crop_scale[1]:g}; "
        + (f"flip {data.flip:g}, " if data.flip else "no flip, ")
        + (f"colour {data.color_jitter:g}" if data.color_jitter else "no colour")
        + "".join(f", {name} {getattr(data, name):g}" for name in ("hue", "gray", "solarize") if getattr(data, name)),
        "precision": {"no": "float32", "bf16": "bf16 autocast"}.get(chosen["precision"], chosen["precision"]),
        "start": f"weights of {public_name(model.init)}" if model.init else "random",
        "seed": str(config.seed),
    }
    return table(rows)


def _results(config: Config, lines: list[dict]) -> str:
    probed = [line for line in lines if line.get("probe", {}).get("knn") is not None]
    if not probed:
        return "Nothing was measured."
    last = probed[-1]
    return f"""Probes of this one run, after step {last["step"]:,}, on held-out images of the same data set:

| probe of the mean patch features | accuracy |
|---|---|
| kNN (k = 20, whitened) | {last["probe"]["knn"]:.1%} |
| logistic regression | {last["probe"]["linear"]:.1%} |"""
