"""`timm-dseq models`: the backbones, their size and cost, and where weights of each are."""

from typing import Any

import huggingface_hub

from ...dseq_jepa import ARCHITECTURES, META_TAG, TAGS, default_cfgs, namespace
from ..stock import macs, registered
from .folders import stored
from .sources import SOURCES


def listing() -> list[dict[str, Any]]:
    """A row for each backbone."""
    namespace()  # a wrong one is an error here: with it, no weights would be listed

    def cached(repository: str | None) -> bool:
        if not repository:
            return False
        repo_id, _, revision = repository.partition("@")
        path = huggingface_hub.try_to_load_from_cache(repo_id, "model.safetensors", revision=revision or None)
        return isinstance(path, str)

    def where(name: str, cfg) -> dict:
        return {
            "shipped": bool(cfg.file),
            "published": cfg.hf_hub_id,
            "cached": cached(cfg.hf_hub_id),
            "stored": stored(name) is not None,
            "source": SOURCES[name].link if name in SOURCES else None,
        }

    rows = []
    for name in ARCHITECTURES:
        model = registered(name).blueprint
        rows.append(
            {
                "model": name,
                "image": list(registered(name).img_size),
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "macs": macs(model),
                "weights": {tag: where(f"{name}.{tag}", cfg) for tag, cfg in default_cfgs[name].cfgs.items()},
            }
        )
    return rows


def shown(rows: list[dict[str, Any]]) -> str:
    """The text for a screen of a listing."""
    lines = [f"{'model':24}{'image':>10}{'params':>10}{'GMACs':>9}  weights"]
    for row in rows:
        weights = [f"{tag} ({place})" for tag, state in row["weights"].items() if (place := _place(state))]
        lines.append(
            f"{row['model']:24}{'×'.join(map(str, row['image'])):>10}{row['parameters'] / 1e6:>8.1f} M"
            f"{row['macs'] / 1e9:>9.2f}  {', '.join(weights) or 'none'}"
        )
    tags = f"tags: {', '.join([*TAGS, META_TAG])}"
    return "\n".join([*lines, "", tags, "import timm_dseq before timm.create_model(NAME)"])


def _place(state: dict) -> str | None:
    """Where weights are, the nearest place."""
    for place, words in (("shipped", "in this package"), ("stored", "in the store"), ("cached", "cached")):
        if state[place]:
            return words
    return state["published"] or ("to be had with timm-dseq get" if state["source"] else None)
