"""The images a run is watched on: the same ones from its start to its end, each process holding its share."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms.v2 import CenterCrop, Compose, PILToTensor, Resize

from timm_dseq import UserError

from ...data.source import TRIES, Source, load, open_source, source_of, test_split
from ...system.screen import Screen
from ...system.signals import deaf
from ..settings import Config

BATCH = 64


@dataclass(frozen=True)
class Shared:
    """Some images over all processes, dealt out one by one."""

    images: torch.Tensor  # (k, 3, S, S) uint8, this process's; k is the same in all, as FSDP needs it
    count: int  # of all; what a share has beyond them is filled up with the first ones
    labels: torch.Tensor | None  # (count,), in the main process


class Centres(Dataset):
    """`centres[place]`: the centre of an image as the evaluation sees it, (3, S, S) uint8; which one; what is broken.

    One that cannot be read is replaced by the next of `wanted` that can.
    """

    def __init__(self, source: Source, wanted: Sequence[int], size: int) -> None:
        self.source, self.wanted = source, wanted
        self.show = Compose([Resize(round(size / 0.875), interpolation=3), CenterCrop(size), PILToTensor()])

    def __len__(self) -> int:
        return len(self.wanted)

    def __getitem__(self, place: int) -> tuple[torch.Tensor, int, list[str]]:
        broken = []
        for step in range(min(TRIES, len(self))):
            index = self.wanted[(place + step) % len(self)]
            try:
                return self.show(self.source.picture(index)), index, broken
            except Exception as error:  # PIL's readers raise almost anything on damaged files
                broken.append(f"{self.source.where(index)}: {type(error).__name__}: {error}")
        return torch.zeros(0), 0, broken


def sources(config: Config) -> tuple[Source, Source, str | None]:
    """What probes learn from, what they are tested on, and why there are none."""
    data = config.data
    if data.streaming:
        return _first_of_stream(config)
    train = open_source(data)
    split = data.probe_split or ("test" if data.path == "scenes" else test_split(data.path, data.config))
    test = open_source(data, split) if split and split != data.split else train
    off = None
    if train.label is None or test.label is None:
        off = "the data set has no labels (data.label names their column)"
    return train, test, off


def probe_images(
    config: Config, train: Source, test: Source, accelerator: Accelerator, screen: Screen
) -> tuple[Shared, Shared]:
    """Evenly spaced images of both; without a test split, others of the training split."""
    count, size = config.watch.probe_images, config.model.img_size
    if train is test:
        wanted = [int(i) for i in torch.linspace(0, len(train) - 1, min(2 * count, len(train)))]
        choices = (train, wanted[::2]), (train, wanted[1::2])
    else:
        choices = tuple(
            (source, [int(i) for i in torch.linspace(0, len(source) - 1, min(count, len(source)))])
            for source in (train, test)
        )
    learned, tested = (
        _shared(Centres(source, wanted, size), config.data.workers, accelerator, screen) for source, wanted in choices
    )
    return learned, tested


def picture_images(config: Config, source: Source) -> torch.Tensor:
    """The first images, in every process: (n, 3, S, S) uint8."""
    count = min(config.watch.pictures, len(source))
    centres = Centres(source, range(len(source)), config.model.img_size)
    images, _, _ = _whole(centres[place] for place in range(count))
    return images


def in_order(part: torch.Tensor, count: int, accelerator: Accelerator) -> torch.Tensor:
    """Something of each process's images (k, …) → of all of them in their order (count, …), in every process."""
    every = accelerator.gather(part.to(accelerator.device)).unflatten(0, (accelerator.num_processes, len(part)))
    return every.transpose(0, 1).flatten(0, 1)[:count]


def _shared(centres: Centres, workers: int, accelerator: Accelerator, screen: Screen) -> Shared:
    """All processes have to ask; each loads its share."""
    count, processes = len(centres), accelerator.num_processes
    padded = -(-count // processes) * processes
    mine = [place % count for place in range(accelerator.process_index, padded, processes)]
    loader = DataLoader(
        Subset(centres, mine),
        BATCH,
        num_workers=min(workers, -(-len(mine) // BATCH)),
        collate_fn=list,
        worker_init_fn=deaf,
    )
    items = []
    for some in loader:
        items += some
        screen.note(f"probing: {len(items)} of {len(mine)} images are loaded")
    images, indices, broken = _whole(items)
    if lines := gather_object(broken):
        screen.say(
            f"an image that probes look at cannot be read and is replaced by another: {lines[0]}"
            + f" ({len(lines)} such lines in all)" * (len(lines) > 1)
        )
    indices = in_order(indices, count, accelerator).tolist()
    return Shared(images, count, centres.source.labels(indices) if accelerator.is_main_process else None)


def _whole(items) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Images (n, 3, S, S), which they are (n,), and what is broken."""
    images, indices, broken = zip(*items, strict=True)
    for image, lines in zip(images, broken, strict=True):
        if not image.numel():
            raise UserError(f"{len(lines)} images in a row cannot be read, the first {lines[0]}: is data.image right?")
    return torch.stack(images), torch.tensor(indices), [line for lines in broken for line in lines]


def _first_of_stream(config: Config) -> tuple[Source, Source, str | None]:
    """The first images of a stream, as both: nothing else of it can be had without reading on."""
    count = max(2 * config.watch.probe_images * bool(config.watch.probe_every), config.watch.pictures)
    rows = load(config.data, config.data.split, streaming=True)
    source = source_of(config.data, rows, list(rows.take(count)))
    return source, source, None if source.label else "the data set has no labels (data.label names their column)"
