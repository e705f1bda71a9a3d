"""Batches from pixels that were decoded once: whether a run takes them, and crops of a whole batch on the device.

Every sample is the one that the decoded path gives: the same order, the same box, the same image in the place of one
that cannot be read.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from timm_dseq import UserError
from timm_dseq.host import to_device

from ..pretraining.settings import Config
from ..run.length import Length
from ..run.resume import Done
from .crops import box_draws, crop_boxes, cropped
from .order import Share, sample_seeds
from .pixels import Place, build, working_side
from .source import TRIES, Source

_OF_MEMORY = 0.5  # share of the host's free memory that `auto` may take: pages are given back when others need them
_OF_DEVICE = 0.3  # share of the device's free memory


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


class Resident:
    """This process's endless micro-batches: crops (B, 3, S, S) uint8, (epoch, index) (B, 2), what is broken.

    Crops are on the device, cut from pixels that lie there, or in the mapped file where they are too many.
    """

    def __init__(self, place: Place, source: Source, config: Config, share: Share, device: torch.device) -> None:
        self.source, self.seed = source, config.seed
        self.size, self.scale = config.model.img_size, config.data.crop_scale
        self.device = device if device.type == "cuda" else torch.device("cpu")
        images, self.sizes = place.read()
        self.readable = _readable(self.sizes, source)
        self.pixels = torch.from_numpy(images)
        self.there = self.device.type == "cpu"  # whether pixels lie where they are cropped
        if not self.there and images.nbytes <= _OF_DEVICE * torch.cuda.mem_get_info(self.device)[0]:
            self.pixels, self.there = _on(self.device, self.pixels), True
        self.reason = cache(self._reason)
        self.batches = self._batches(share)

    def describe(self) -> str:
        where = "in the mapped file" if self.pixels.device.type == "cpu" else "on the device"
        count, _, side, _ = self.pixels.shape
        return f"resident: {count:,} images at {side} px, {self.pixels.nbytes / 2**30:.1f} GiB, {where}"

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[str]]]:
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        samples, images = next(self.batches)
        indices = samples[:, 1].numpy()
        at = self.readable[indices]
        boxes = crop_boxes(box_draws(sample_seeds(self.seed, samples), self.scale), self.sizes[at])
        broken = [line for index in indices[at != indices].tolist() for line in self._broken(index)]
        return cropped(images, self.sizes[at], boxes, self.size), samples, broken

    def _batches(self, share: Share) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Samples, and their pixels on the device."""
        if self.there:
            for samples in share.tensors():
                yield samples, self._rows(samples)
        with ThreadPoolExecutor(1) as reader:  # one batch is read while the device is busy with the one before
            coming = None
            for samples in share.tensors():
                waiting, coming = coming, (samples, reader.submit(self._rows, samples))
                if waiting:
                    yield waiting[0], waiting[1].result().to(self.device, non_blocking=True)

    def _rows(self, samples: torch.Tensor) -> torch.Tensor:
        at = torch.from_numpy(self.readable[samples[:, 1].numpy()])
        if self.there:
            return self.pixels.index_select(0, to_device(at, self.device))
        rows = torch.empty(len(at), *self.pixels.shape[1:], dtype=torch.uint8, pin_memory=True)
        return torch.index_select(self.pixels, 0, at, out=rows)

    def _broken(self, index: int) -> list[str]:
        """What stands between an image and the next that can be read, by name."""
        steps = (int(self.readable[index]) - index) % len(self.source)
        return [self.reason((index + step) % len(self.source)) for step in range(steps)]

    def _reason(self, index: int) -> str:
        try:
            self.source.picture(index)
        except Exception as error:  # PIL's readers raise almost anything on damaged files
            return f"{self.source.where(index)}: {type(error).__name__}: {error}"
        return f"{self.source.where(index)}: it could not be read when the file of pixels was built"


def _readable(sizes: np.ndarray, source: Source) -> np.ndarray:
    """Each image's number, or that of the next one that can be read: (N,) int64."""
    (whole,) = sizes.all(1).nonzero()
    every = np.arange(len(sizes))
    found = whole[np.searchsorted(whole, every) % len(whole)] if len(whole) else every
    lost = (found - every) % len(sizes) >= TRIES if len(whole) else every >= 0
    if lost.any():
        first = source.where(int(lost.argmax()))
        raise UserError(f"{TRIES} images in a row cannot be read, the first {first}: is this an image column?")
    return found


def _on(device: torch.device, pixels: torch.Tensor) -> torch.Tensor:
    """A copy on the device, in pieces: the mapped file is never in memory as a whole."""
    there = torch.empty(pixels.shape, dtype=torch.uint8, device=device)
    for piece, place in zip(pixels.split(4096), there.split(4096), strict=True):
        place.copy_(piece)
    return there
