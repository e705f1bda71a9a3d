"""Whether a run reads its images from a file of pixels that are decoded once, and that file."""

import os
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from timm_dseq import UserError

from ..data.pixels import Place, build, working_side
from ..data.source import Source
from ..run.length import Length
from ..run.resume import Done
from .settings import Config

_OF_MEMORY = 0.5  # share of the host's free memory that `auto` may take: pages are given back when others need them


def squares(
    done: Done, config: Config, source: Source | None, length: Length, accelerator: Accelerator
) -> tuple[Place | None, str]:
    """The file of pixels that a run reads, built if it is not there, or None and why not. All processes have to call.

    What data.resident becomes is chosen once for the whole run: `done.chosen` keeps the squares' side, 0 for none.
    """
    if source is None:
        return None, "images are read as a stream"
    why = "as the run began"
    if "resident" not in done.chosen:
        found: list = [None]
        if accelerator.is_main_process:
            try:
                found = [(*_chosen(config, source, length), None)]
            except UserError as error:
                found = [(0, "", str(error))]
        broadcast_object_list(found)
        done.chosen["resident"], why, wrong = found[0]
        if wrong:
            raise UserError(wrong)
    side = done.chosen["resident"]
    if not side:
        return None, f"images are decoded whenever they are taken: {why}"
    place = Place.of(source, side, config.data)
    if config.dry_run:
        builds_none = (
            "images are decoded in this dry run, which builds no file: the run would crop them from one, faster"
        )
        return (place, "") if place.path.exists() else (None, builds_none)
    return build(place, source, config.data.workers, accelerator), ""


def _chosen(config: Config, source: Source, length: Length) -> tuple[int, str]:
    """The squares' side, or 0, and why."""
    data = config.data
    if data.resident is False:
        return 0, "asked for"
    side = data.resident_size or working_side(source, config.model.img_size)
    if data.resident is True:
        if not side:
            raise UserError(f"none of 64 images of {data.path} can be read: is this an image column?")
        return side, "asked for"
    if not side:
        return 0, "none of 64 can be read"
    if min(length.steps, config.max_steps or length.steps) * length.batch <= len(source):
        until = f" up to max_steps={config.max_steps}, and a run stays as it began" if config.max_steps else ""
        return 0, f"none comes twice{until} (--data.resident true builds the file)"
    place = Place.of(source, side, data)
    need, memory = place.bytes / 2**30, free_memory() / 2**30
    if need > _OF_MEMORY * memory:
        return 0, f"at {side} px they take {need:.1f} GiB, and {memory:.1f} of memory are free"
    if place.lacks():
        return 0, f"at {side} px they take {need:.1f} GiB, more than the disk of {place.path.parent} has"
    return side, "they fit"


def free_memory() -> int:
    """Bytes of the host's memory that are free, or may become so, within the limit of a container."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for names in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        try:
            limit, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in names)
        except (OSError, ValueError):  # no such group, or "max"
            continue
        free = min(free, max(0, limit - used))
    return free
