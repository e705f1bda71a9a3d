"""Sources for tests: the smallest model, in the authors' format on a drive, and in Meta's at an address."""

from functools import partial
from pathlib import Path

import timm

import timm_dseq  # noqa: F401
from tests.drive_server import FOLDER
from timm_dseq.dseq_jepa import IJEPA_LICENSE, META_TAG
from timm_dseq.hub.store import drive, sources, url

OFFICIAL, META = "dseq_jepa_vit_ti16.in1k_official", f"dseq_jepa_vit_ti16.{META_TAG}"
FILE, META_FILE = "dseq_jepa_vit_ti16.pth", "IN1K-vit.ti.16-300e.pth.tar"


def register(meta_address: str) -> None:
    """Let both names be brought and loaded."""
    import dataclasses

    from timm.models import _registry

    official = sources.SOURCES["dseq_jepa_vit_b16.in1k_official"]
    fetch = partial(drive.fetch, FOLDER, (r"d-?seq", r"ti(ny)?[-_]?(patch)?16"))
    sources.SOURCES[OFFICIAL] = dataclasses.replace(official, fetch=fetch, link=drive.address(FOLDER))
    sources.SOURCES[META] = sources.Source(partial(url.fetch, meta_address), meta_address, "ijepa", IJEPA_LICENSE)
    cfg = timm.get_pretrained_cfg("dseq_jepa_vit_ti16.in1k")
    _registry._model_pretrained_cfgs[META] = dataclasses.replace(cfg, tag=META_TAG, license=IJEPA_LICENSE, crop_pct=0.9)
    _registry._model_with_tags["dseq_jepa_vit_ti16"].append(META)


def forget() -> None:
    """Forget both names."""
    from timm.models import _registry

    for name in (OFFICIAL, META):
        sources.SOURCES.pop(name, None)
    _registry._model_pretrained_cfgs.pop(META)
    _registry._model_with_tags["dseq_jepa_vit_ti16"].remove(META)


def only(folder: Path) -> list[str]:
    """What is in the store, but for locks."""
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))
