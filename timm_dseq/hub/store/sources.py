"""The weights of others that `timm-dseq get` brings: where they are, what kind of file they are, under which terms."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import timm

from ...dseq_jepa import IJEPA_LICENSE, META
from . import drive, url
from .arrival import Arrival


@dataclass(frozen=True)
class Source:
    fetch: Callable[[Arrival], str]  # brings the file; returns where it lay
    link: str  # for a browser
    kind: str  # of the checkpoint, as hub.weights names it
    license: str  # of the weights, as far as it is known


def _from_meta(name_in_timm: str) -> Source:
    address = getattr(timm.get_pretrained_cfg(name_in_timm), "url", None) or ""  # another timm may not have it
    return Source(partial(url.fetch, address), address, "ijepa", f"{IJEPA_LICENSE}: attribution, no commercial use")


_AUTHORS = "1x1yN5A1Hav8eUBYZEy7MWCKMiHxy1Bx4"  # the folder that the README of SkyShunsuke/DSeq-JEPA links

# model.tag → its source
SOURCES = {
    "dseq_jepa_vit_b16.in1k_official": Source(
        partial(drive.fetch, _AUTHORS, (r"d-?seq", r"b(ase)?[-_]?(patch)?16")),
        drive.address(_AUTHORS),
        "dseq_official",
        "none is stated for the weights; the authors' code is under the MIT licence",
    ),
    **{name: _from_meta(name_in_timm) for name, name_in_timm in META.items()},
}
