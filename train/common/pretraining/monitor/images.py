"""The images that the monitor uses: the same ones from a run's start to its end. Each process holds its share."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import Dataset, Subset
from torchvision.transforms.v2 import CenterCrop, Compose, PILToTensor, Resize

from timm_dseq.images import as_unreadable, decode

from ...data.loading import loaded
from ...data.opening import test_split
from ...data.source import Source, first_of_stream, open_source, renumbered
from ...data.unreadable import first_readable, none_readable
from ...system.screen import Screen
from ..settings import Config

BATCH = 64


@dataclass(frozen=True)
class Shared:
    """Some images over all processes, dealt out one by one."""

    images: torch.Tensor  # (k, 3, S, S) uint8, this process's; k is the same in all, as FSDP needs it
    count: int  # of all; what a share has beyond them is filled up with the first ones
    labels: torch.Tensor | None  # (count,), in the main process


class Centres(Dataset):
    """`centres[place]`: the centre of an image as the evaluation sees it, (3, S, S) uint8; its index; broken images.

    One that cannot be read is replaced by the next of `wanted` that can.
    """

    def __init__(self, source: Source, wanted: Sequence[int], size: int) -> None:
        self.source, self.wanted = source, wanted
        self.transform = Compose([Resize(round(size / 0.875), interpolation=3), CenterCrop(size), PILToTensor()])

    def __len__(self) -> int:
        return len(self.wanted)

    def __getitem__(self, place: int) -> tuple[torch.Tensor, int, list[str]]:
        indices = (self.wanted[(place + step) % len(self)] for step in range(len(self)))
        image, index, broken = first_readable(indices, lambda at: self.source.read(at, self._centre))
        return (torch.zeros(0) if image is None else image), index, broken

    @as_unreadable()
    def _centre(self, value: Any) -> torch.Tensor:
        return self.transform(decode(value))


def sources(config: Config, train: Source | None) -> tuple[Source, Source, str | None]:
    """What probes learn from, what they are tested on, and why there are none. train: None for a stream."""
    data = config.data
    if train is None:  # its first images are both: to get at others, it would have to be read on
        probed = 2 * config.watch.probe_images if config.watch.probe_every else 0
        train = test = first_of_stream(data, max(probed, config.watch.pictures, 1))
    else:
        split = data.probe_split or ("test" if data.path == "scenes" else test_split(data.path, data.config))
        test = open_source(data, split) if split and split != data.split else train
    if train.label is None or test.label is None:
        return train, test, "the data set has no labels (data.label names their column)"
    if not config.watch.probe_every:
        return train, test, None
    for source in (train, test):
        if fault := source.label_fault():
            return train, test, f"{fault}: does data.label name another column?"
    if train.names and test.names and train.names != test.names:
        test = replace(test, truth=renumbered(test.all_labels(), test.names, train.names))
    if data.path != "scenes" and len(train.all_labels().unique()) < 2:
        return train, test, "all images are of one class: does data.label name another column?"
    return train, test, None


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


def picture_images(config: Config, source: Source, screen: Screen) -> torch.Tensor:
    """The first images, in every process: (n, 3, S, S) uint8."""
    count = min(config.watch.pictures, len(source))
    centres = Centres(source, range(len(source)), config.model.img_size)
    images, _, broken = _stacked(centres[place] for place in range(count))
    _name_broken("pictures show", broken, screen)
    return images


def in_order(part: torch.Tensor, count: int, accelerator: Accelerator) -> torch.Tensor:
    """Something of each process's images (k, …) → of all of them in their order (count, …), in every process."""
    every = accelerator.gather(part.to(accelerator.device)).unflatten(0, (accelerator.num_processes, len(part)))
    return every.transpose(0, 1).flatten(0, 1)[:count]


def _shared(centres: Centres, workers: int, accelerator: Accelerator, screen: Screen) -> Shared:
    """All processes have to call it; each loads its share."""
    count, processes = len(centres), accelerator.num_processes
    padded = -(-count // processes) * processes
    mine = [place % count for place in range(accelerator.process_index, padded, processes)]
    batches = loaded(
        Subset(centres, mine), batch_size=BATCH, num_workers=min(workers, -(-len(mine) // BATCH)), collate_fn=list
    )
    items = []
    for some in batches:
        items += some
        screen.note(f"probing: {len(items)} of {len(mine)} images are loaded")
    images, indices, broken = _stacked(items)
    _name_broken("probes look at", gather_object(broken), screen)
    indices = in_order(indices, count, accelerator).tolist()
    return Shared(images, count, centres.source.labels(indices) if accelerator.is_main_process else None)


def _name_broken(what_for: str, broken: list[str], screen: Screen) -> None:
    if broken:
        more = f" ({len(broken)} such lines in all)" if len(broken) > 1 else ""
        screen.say(f"an image that {what_for} cannot be read and is replaced by another: {broken[0]}{more}")


def _stacked(items) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Images (n, 3, S, S), their indices (n,), and what is broken."""
    images, indices, broken = zip(*items, strict=True)
    for image, lines in zip(images, broken, strict=True):
        if not image.numel():
            raise none_readable(len(lines), lines[0])
    return torch.stack(images), torch.tensor(indices), [line for lines in broken for line in lines]
