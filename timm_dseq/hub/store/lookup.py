"""Which weights a name of ours means, and the file that holds them: in this package, on the Hub, in the local store.

Of a model.tag the store's are taken if they are there. A name without a tag means ours, in this package or on the Hub;
if there are none, the first in the store in the order of the tags.
"""

import logging
from os import PathLike
from typing import Any

from timm.models import resolve_pretrained_cfg

from ...dseq_jepa import SHIPPED, default_cfgs, namespace
from ...errors import UserError
from ..weights import check_safetensors
from .folders import stored, weights_of
from .sources import SOURCES

_logger = logging.getLogger(__name__)
_SOURCES = ("file", "hf_hub_id", "source", "state_dict", "url")  # how timm is told where weights are


def choose(variant: str, asked: Any, overlay: dict[str, Any]) -> Any:
    """The tag of the weights to load: that which is asked for, else what there is, which the log then says.

    asked, overlay: pretrained_cfg and pretrained_cfg_overlay of timm.create_model.
    """
    if asked or _elsewhere(asked, overlay):
        return asked
    cfg = resolve_pretrained_cfg(variant, None, overlay)
    if cfg.has_weights:
        _logger.info(f"{variant}: the weights are those of {variant}.{cfg.tag}")
        return asked
    if not (name := in_store(variant)):
        return asked
    _logger.warning(
        f"{variant}: the weights are those of {name}, from the local store"
    )  # neither ours nor under our terms
    return name.partition(".")[2]


def in_store(name: str) -> str | None:
    """The model.tag in the store that a name means: itself, or without a tag the first in the order of the tags."""
    architecture, _, tag = name.partition(".")
    tags = [tag] if tag else default_cfgs[architecture].cfgs if architecture in default_cfgs else []
    return next((full for tag in tags if stored(full := f"{architecture}.{tag}")), None)


def locate(
    variant: str, cfg: dict[str, Any], asked: Any, overlay: dict[str, Any], cache_dir: str | PathLike | None
) -> str | None:
    """The file of the weights of a configuration, downloaded and checked; None if timm has or locates them itself."""
    name = f"{variant}.{cfg['tag']}" if cfg.get("tag") else variant
    if cfg.get("state_dict") or cfg.get("source"):
        return None
    if cfg.get("file"):
        check_safetensors(cfg["file"])
        return cfg["file"]
    if not _elsewhere(asked, overlay) and stored(name):
        return weights_of(name)
    if cfg.get("hf_hub_id"):
        from ..download import download

        return download(cfg["hf_hub_id"], cfg.get("hf_hub_filename") or "model.safetensors", cache_dir)
    if cfg.get("url"):
        return None
    namespace()  # a wrong one is the reason
    raise UserError(
        f"No weights of {name} are here: {_others(name)}convert a checkpoint (timm-dseq convert "
        'CHECKPOINT --output DIR, then timm.create_model("local-dir:DIR", pretrained=True)), or set '
        f"TIMM_DSEQ_NAMESPACE to the organisation that has published them (timm-dseq push DIR ORGANISATION/{name})."
    )


def _others(name: str) -> str:
    """The beginning of what to do: other weights of the same model, under the name by which they load."""
    architecture = name.partition(".")[0]
    shipped = [f"take {other}, which is in this package, " for other in SHIPPED if other.startswith(f"{architecture}.")]
    known = [other for other in SOURCES if other.startswith(f"{architecture}.")]
    brought = name if name in SOURCES else known[0] if known else None
    loads = f" (it loads as {brought})" if brought != name else ""
    return "".join(shipped) + (f"bring some with timm-dseq get {brought}{loads}, " if brought else "")


def command_for(name: str) -> str | None:
    """The command that brings weights of a model or a model.tag; None where there are none to bring."""
    architecture = name.partition(".")[0]
    known = [other for other in SOURCES if other.partition(".")[0] == architecture]
    return f"timm-dseq get {name if name in SOURCES else known[0]}" if known else None


def _elsewhere(asked: Any, overlay: dict[str, Any]) -> bool:
    """Whether the caller says where the weights are."""
    said = {**(asked if isinstance(asked, dict) else {}), **overlay}
    return any(said.get(key) for key in _SOURCES)
