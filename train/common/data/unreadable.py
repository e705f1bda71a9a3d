"""What becomes of images that cannot be read: pretraining takes the next ones, a result has to be of all images."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from torch.utils.data import Dataset, default_collate

from timm_dseq import UserError
from timm_dseq.images import UnreadableImage

from .loading import loaded

TRIES = 100  # unreadable images in a row that end a run
Read = TypeVar("Read")


def none_readable(count: int, first: str) -> UserError:
    """Ends a run that has nothing to learn from. first: the first of these images, and why it cannot be read."""
    why = "is the disk of data.path still there?" if "no such file" in first else "is data.image right?"
    return UserError(f"{count} images in a row cannot be read, the first {first}: {why}")


def first_readable(indices: Iterable[int], read: Callable[[int], Read]) -> tuple[Read | None, int, list[str]]:
    """What `read` gives for the first image that it can read, that image's index, and one line for each image before.

    None, -1 and all lines where it can read none of them, or none of the first TRIES.
    """
    broken = []
    for index in islice(indices, TRIES):
        try:
            return read(index), index, broken
        except UnreadableImage as error:
            broken.append(str(error))
    return None, -1, broken


def batches_of_all(samples: Dataset, collate: Callable[[list], Any] = default_collate, **options: Any) -> Iterator[Any]:
    """The batches of a DataLoader with these options; an image that cannot be read ends them in one line."""
    for batch in loaded(_Samples(samples), collate_fn=partial(_collated, collate), **options):
        if isinstance(batch, UnreadableImage):
            raise UserError(f"{batch}: mend or remove this image, a result has to be of all of them.")
        yield batch


class _Samples(Dataset):
    """Samples, or the error of one whose image cannot be read: raised in a worker it would end in a traceback."""

    def __init__(self, samples: Dataset) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: Any) -> Any:
        try:
            return self.samples[index]
        except UnreadableImage as error:
            return error


def _collated(collate: Callable[[list], Any], items: list) -> Any:
    return next((item for item in items if isinstance(item, UnreadableImage)), None) or collate(items)
