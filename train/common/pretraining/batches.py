"""Where a run's micro-batches come from: a file of pixels that are decoded once, the data set itself, or a stream."""

from collections.abc import Iterator

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from timm_dseq import UserError

from ..data.decoded import Batch, Crops, collate, readable
from ..data.framing import Framing
from ..data.loading import loaded
from ..data.order import DistributedBatchSampler
from ..data.resident.batches import Resident
from ..data.resident.build import build
from ..data.resident.pixel_file import PixelFile, working_side
from ..data.source import Source
from ..data.stream import Stream
from ..run.length import Length
from ..run.resume import Progress
from ..system.machine import free_memory, short_of_memory
from ..system.screen import Screen
from .settings import Config

_OF_MEMORY = 0.5  # share of the host's free memory that `auto` may fill; the system can take pages back


def open_batches(
    config: Config,
    framing: Framing,
    source: Source | None,
    length: Length,
    progress: Progress,
    accelerator: Accelerator,
    screen: Screen,
) -> Iterator[Batch]:
    """This process's endless micro-batches, from the run's current step on. All processes have to call it.

    source: None for a stream. A line on the screen says where images come from.
    """
    pixels = None
    if progress.step < length.last(config.max_steps):
        pixels, why_not = pixel_file(config, source, length, progress, accelerator)
        screen.say(why_not)
    if not pixels:
        crop = 3 * config.model.img_size**2
        screen.say(short_of_memory(config.data.workers, length.micro_batch * framing.crops * crop))
    rank, processes = accelerator.process_index, accelerator.num_processes
    pinned = accelerator.device.type == "cuda"
    if source is None:
        state = progress.streams[rank] if progress.streams else None
        return Stream(config.data, framing, rank, processes, length.micro_batch, state, pinned)
    sampler = DistributedBatchSampler(
        config.seed, len(source), length.batch, length.micro_batch, rank, processes, progress.samples
    )
    if pixels:
        resident = Resident(pixels, source, framing, sampler, accelerator.device)
        screen.say(resident.describe())
        return resident
    return readable(
        loaded(
            Crops(source, framing),
            batch_sampler=sampler,
            num_workers=config.data.workers,
            collate_fn=collate,
            pin_memory=pinned,
        )
    )


def pixel_file(
    config: Config, source: Source | None, length: Length, progress: Progress, accelerator: Accelerator
) -> tuple[PixelFile | None, str]:
    """The file of pixels that a run reads, built if need be; or None, and why not. All processes have to call it.

    What data.resident becomes is chosen once for the whole run: `progress.chosen` keeps the images' side, 0 for none.
    """
    if source is None:
        return None, "images are read as a stream"
    why = "as the run began"
    if "resident" not in progress.chosen:
        answer: list = [None]
        if accelerator.is_main_process:
            try:
                answer = [(*_choose_side(config, source, length), None)]
            except UserError as error:
                answer = [(0, "", str(error))]
        broadcast_object_list(answer)
        progress.chosen["resident"], why, error = answer[0]
        if error:
            raise UserError(error)
    side = progress.chosen["resident"]
    if not side:
        return None, f"images are decoded each time they are used: {why}"
    file = PixelFile.of(source, side, config.data)
    if config.dry_run:
        builds_none = (
            "images are decoded in this dry run, which builds no file: the run would crop them from one, faster"
        )
        return (file, "") if file.path.exists() else (None, builds_none)
    return build(file, source, config.data.workers, accelerator), ""


def _choose_side(config: Config, source: Source, length: Length) -> tuple[int, str]:
    """The side of the images in the file, 0 for no file, and why."""
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
    if length.last(config.max_steps) * length.batch <= len(source):
        until = f" up to max_steps={config.max_steps}, and a run stays as it began" if config.max_steps else ""
        return 0, f"none comes twice{until} (--data.resident true builds the file)"
    file = PixelFile.of(source, side, data)
    need, memory = file.bytes / 2**30, free_memory() / 2**30
    if need > _OF_MEMORY * memory:
        return 0, f"at {side} px they take {need:.1f} GiB, and {memory:.1f} of memory are free"
    if file.missing_bytes():
        return 0, f"at {side} px they take {need:.1f} GiB, more than the disk of {file.path.parent} has"
    return side, "they fit"
