"""Builds a file of pixels: each process of a node decodes its share of the images.

Images are decoded in chunks. A process that is killed leaves an unfinished file and marks of the chunks that are on
the disk; the next one decodes the others.
"""

import os
import time
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from filelock import FileLock, Timeout
from PIL import Image
from torch.utils.data import Dataset

from timm_dseq import UserError
from timm_dseq.images import UnreadableImage, as_unreadable, decode, measure

from ...system.screen import Screen
from ..loading import loaded
from ..source import Source
from ..unreadable import TRIES, none_readable
from .pixel_file import PixelFile

CHUNK = 64  # images that are decoded, written and marked together
SECONDS = 5.0  # of work that a kill may undo
_ROUND = 60.0  # seconds after which processes tell each other how far they are


class Squares(Dataset):
    """`squares[index]`: the image, resized to (3, W, W) uint8, and its (height, width); zeros if it cannot be read."""

    def __init__(self, source: Source, side: int) -> None:
        self.source, self.side = source, side

    def __getitem__(self, index: int) -> tuple[np.ndarray, tuple[int, int]]:
        try:
            return self.source.read(index, self._square)
        except UnreadableImage:  # it is named each time a batch would take it
            return np.zeros((3, self.side, self.side), np.uint8), (0, 0)

    @as_unreadable()
    def _square(self, value: Any) -> tuple[np.ndarray, tuple[int, int]]:
        image, size = measure(value)
        picture = decode(image, min(size) / self.side)
        if picture.size != (self.side, self.side):
            shrunk = round(size[1] / picture.width)
            box = (0, 0, size[1] / shrunk, size[0] / shrunk)  # a JPEG decoded smaller may end within its last pixel
            picture = picture.resize((self.side, self.side), Image.Resampling.BICUBIC, box=box)
        return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1)), size


def build(file: PixelFile, source: Source, workers: int, accelerator: Accelerator) -> PixelFile:
    """Build the file on every node's disk, unless it is there. All processes have to call it.

    They exchange their state at least once a minute, so that none waits longer than a collective may take. Returned is
    the file as the node's first process has it; the others may name another path.
    """
    rank, first = accelerator.process_index, accelerator.process_index - accelerator.local_process_index
    lock = FileLock(file.path.with_suffix(".lock"))
    work: Iterator[None] | None = None
    said_waiting = False
    try:
        while True:
            report = _state(file, lock) if rank == first else ("", None)
            reports = gather_object([(first, file, *report)])
            _raise_any(error for _, _, _, error in reports)
            nodes = {node: (its_file, state) for node, its_file, state, _ in reports if state}
            file, state = nodes[first]
            if all(state == "ready" for _, state in nodes.values()):
                return file
            error = None
            if state == "build":
                processes = sum(node == first for node, *_ in reports)
                work = work or _decode(file, source, workers, rank - first, processes, accelerator.is_main_process)
                error = _for_a_while(work, file)
            else:
                if accelerator.is_main_process and not said_waiting:
                    print(f"waiting for another process, which builds {file.path}", flush=True)
                said_waiting = True
                time.sleep(1)
            _raise_any(gather_object([error]))
    finally:
        lock.release()


def _raise_any(errors: Iterable[str | None]) -> None:
    """What went wrong in one process ends all of them, with its line."""
    if error := next(filter(None, errors), None):
        raise UserError(error)


def _state(file: PixelFile, lock: FileLock) -> tuple[str, str | None]:
    """What this node has to do, "build", "wait" for another run, or nothing ("ready"); and what is wrong ("error")."""
    try:
        file.path.parent.mkdir(parents=True, exist_ok=True)
        if not lock.is_locked and not file.path.exists():
            lock.acquire(timeout=0)
        if not file.path.exists():
            _begin(file)
            if not all(file.marks.read_bytes()):
                return "build", None
            os.replace(file.unfinished, file.path)
            file.marks.unlink()
        return "ready", None
    except Timeout:
        return "wait", None
    except OSError as error:
        return "error", _not_writable(file, error)
    except UserError as error:
        return "error", str(error)


def _begin(file: PixelFile) -> None:
    """An unfinished file of the right size, and no marks; what an earlier build has left there stays."""
    if missing := file.missing_bytes():
        raise UserError(
            f"{file.path} needs {file.bytes / 2**30:.1f} GiB and the disk has {missing / 2**30:.1f} GiB too little: "
            "make room, name another folder with data.cache, or give --data.resident false."
        )
    chunks = -(-file.images // CHUNK)
    if file.unfinished.exists() and file.marks.exists() and file.marks.stat().st_size == chunks:
        with file.unfinished.open("rb") as unfinished:
            header = unfinished.read(len(file.header))
        if header == file.header and file.unfinished.stat().st_size == file.bytes:
            return
    file.marks.unlink(missing_ok=True)
    with file.unfinished.open("wb") as unfinished:
        unfinished.write(file.header)
        unfinished.truncate(file.bytes)
    file.marks.write_bytes(bytes(chunks))


def _not_writable(file: PixelFile, error: OSError) -> str:
    return f"{file.path.parent} cannot be written ({error.strerror}): make room, or name another with data.cache."


def _decode(
    file: PixelFile, source: Source, workers: int, rank: int, processes: int, shown: bool
) -> Generator[None, None, None]:
    """Decode, write and mark this process's share of the chunks that are not marked; yields after each chunk."""
    marked = file.marks.read_bytes()
    chunks = [chunk for chunk in range(rank, len(marked), processes) if not marked[chunk]]
    images = [range(chunk * CHUNK, min(file.images, (chunk + 1) * CHUNK)) for chunk in chunks]
    samplers = [list(some) for some in images]
    batches = loaded(Squares(source, file.side), batch_sampler=samplers, num_workers=workers, collate_fn=_collate)
    screen = Screen(sum(map(len, images)), 0, shown, unit="image")
    before = min(file.images, CHUNK * sum(marked))
    screen.say(
        f"decoding {file.images:,} images of {source.name} once, into {file.path}"
        + (f": {before:,} are there" if before else "")
    )
    seen, any_readable, synced, unmarked = 0, False, time.monotonic(), []
    try:
        with file.unfinished.open("r+b") as unfinished, file.marks.open("r+b") as marks:
            for chunk, some, (pixels, sizes) in zip(chunks, images, batches, strict=True):
                unfinished.seek(len(file.header) + 8 * some.start)
                unfinished.write(sizes.numpy())
                unfinished.seek(file.offset(some.start))
                unfinished.write(pixels.numpy())
                seen, any_readable = seen + len(some), any_readable or bool(sizes.any())
                if seen >= TRIES and not any_readable:
                    raise none_readable(seen, source.where(images[0].start))
                unmarked.append(chunk)
                if chunk == chunks[-1] or time.monotonic() - synced > SECONDS:
                    unfinished.flush()
                    os.fsync(unfinished.fileno())  # first the pixels, then their mark
                    for done in unmarked:
                        marks.seek(done)
                        marks.write(b"\1")
                    marks.flush()
                    synced, unmarked = time.monotonic(), []
                screen.show(seen, f"{source.name}: pixels at {file.side} px")
                yield
    finally:
        screen.close()


def _collate(items: list) -> tuple[torch.Tensor, torch.Tensor]:
    pixels, sizes = zip(*items, strict=True)
    return torch.from_numpy(np.stack(pixels)), torch.tensor(sizes, dtype=torch.int32)


def _for_a_while(work: Iterator[None], file: PixelFile) -> str | None:
    """Go on with the work for at most _ROUND seconds; what went wrong, if anything."""
    end = time.monotonic() + _ROUND
    try:
        for _ in work:
            if time.monotonic() > end:
                break
    except OSError as error:
        return _not_writable(file, error)
    except UserError as error:
        return str(error)
    return None
