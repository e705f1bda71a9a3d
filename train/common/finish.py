"""The hand-over: a finished run → a Hub-ready folder, a report, and what to do next."""

import os
import shutil
from pathlib import Path

from timm_dseq.convert import convert
from timm_dseq.dseq_jepa import ARCHITECTURES

from .config import Config
from .record import Screen
from .report import write_report


def finish(config: Config, checkpoint: Path, screen: Screen) -> None:
    """Export the target encoder of a checkpoint, write the report, publish if asked."""
    output = Path(config.output_dir)
    export = output / "export"
    fresh = output / "export.new"
    shutil.rmtree(fresh, ignore_errors=True)
    convert(checkpoint / "model.safetensors", fresh, model=_name(config), with_pretraining_state=True)
    shutil.rmtree(export, ignore_errors=True)
    os.replace(fresh, export)
    report = write_report(output)
    screen.say(f"\ntarget encoder, ready for the Hub: {export}\ncurves and pictures: {report}\nnext:")
    screen.say(f"  timm-dseq verify {export}")
    screen.say(f"  python -c \"import timm; print(timm.create_model('local-dir:{export}', pretrained=True))\"")
    screen.say(f"  timm-dseq push {export} ORGANISATION/NAME")
    if config.hub.push_to:
        from timm_dseq.push import push

        result = push(export, config.hub.push_to, private=config.hub.private)
        screen.say(f"published: {result['url']}")


def _name(config: Config) -> str | None:
    """model.tag of a run that trained one of our backbones as it is; None lets the weights tell."""
    if config.model.name.partition(".")[0] not in ARCHITECTURES or config.model.args:
        return None
    tag = "in1k_ijepa" if config.model.objective == "ijepa" else "in1k_vicreg" if config.model.contrastive else "in1k"
    return f"{config.model.name.partition('.')[0]}.{tag}"
