"""What tells images, data sets and weights apart in a few digits, and images that are there twice."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import xxhash
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from timm_dseq import UserError

from ..system.screen import Screen
from ..system.signals import deaf
from .source import Source

DIGEST = 16  # bytes of an image's


def weights_digest(model: nn.Module) -> str:
    """All of a model's weights in a few digits."""
    digest = xxhash.xxh3_128()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def data_digest(source: Source) -> str:
    """A split in a few digits: some of its images, and where `datasets` has it from."""
    known = getattr(source.rows, "_fingerprint", "")
    return hashlib.blake2b(f"{source.fingerprint()} {known}".encode(), digest_size=8).hexdigest()


class Pictures(Dataset):
    """`pictures[index]`: the index, the image as the evaluation sees it in uint8, its pixels' digest, what is wrong."""

    def __init__(self, source: Source, transform: Callable | None) -> None:
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[int, np.ndarray, bytes, str | None]:
        try:
            picture = self.source.picture(index)
        except Exception as error:  # PIL's readers raise almost anything on damaged files
            return index, np.zeros(0, np.uint8), b"", f"{self.source.where(index)}: {type(error).__name__}: {error}"
        digest = xxhash.xxh3_128_digest(repr(picture.size).encode() + picture.tobytes())
        shown = np.zeros(0, np.uint8) if self.transform is None else np.asarray(self.transform(picture))
        return index, shown, digest, None


def together(items: list) -> tuple[np.ndarray, torch.Tensor, np.ndarray, str | None]:
    indices, images, digests, wrong = zip(*items, strict=True)
    if line := next(filter(None, wrong), None):
        return np.array(indices), torch.zeros(0), np.zeros(0), line
    found = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, DIGEST)
    return np.array(indices), torch.from_numpy(np.stack(images)), found, None


def whole(loader: DataLoader) -> Iterator[tuple[np.ndarray, torch.Tensor, np.ndarray]]:
    """The loader's batches, as long as every image can be read."""
    for indices, images, digests, wrong in loader:
        if wrong:
            raise UserError(f"{wrong}: mend or remove this image, a result has to be of all of them.")
        yield indices, images, digests


def digests_of(source: Source, workers: int, folder: str, accelerator: Accelerator) -> np.ndarray:
    """The digests alone, (n, 16), for protocols that keep no features; kept in the folder.

    All processes have to ask; each reads its share of the images.
    """
    path = Path(folder) / f"digests-{data_digest(source)}-{source.name.replace('/', '_')}.npy"
    known = [np.load(path) if accelerator.is_main_process and path.is_file() else None]
    broadcast_object_list(known)
    if known[0] is not None:
        return known[0]
    mine = range(accelerator.process_index, len(source), accelerator.num_processes)
    screen = Screen(len(mine), 0, accelerator.is_main_process, unit="image")
    screen.say(f"looking for duplicates: {len(source)} images of {source.name}")
    own = Subset(Pictures(source, None), mine)
    found, seen = np.zeros((len(source), DIGEST), np.uint8), 0
    for indices, _, digests in whole(
        DataLoader(own, 256, num_workers=workers, collate_fn=together, worker_init_fn=deaf)
    ):
        found[indices] = digests
        seen += len(indices)
        screen.show(seen, "digests")
    screen.close()
    summed = accelerator.reduce(torch.from_numpy(found).to(accelerator.device), "sum")  # a row is one process's
    found = summed.cpu().numpy()
    if accelerator.is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".new").open("wb") as file:
            np.save(file, found)
        path.with_suffix(".new").replace(path)
    return found


def duplicates(learnt: np.ndarray, tested: np.ndarray) -> int:
    """How many tested images have exactly the pixels of one that was learnt from."""
    known = {digest.tobytes() for digest in learnt}
    return sum(digest.tobytes() in known for digest in tested)
