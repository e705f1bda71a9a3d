"""Digests of weights, data sets and images, and the images that two splits share."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import xxhash
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from PIL import Image
from torch import nn
from torch.utils.data import Dataset, Subset

from ..system.screen import Screen
from .source import Source
from .unreadable import batches_of_all

DIGEST = 16  # bytes of an image's digest
_WITHOUT_EFFECT = ("training", "fused_attn", "grad_checkpointing")  # on what a module computes, but for its speed


def weights_digest(model: nn.Module) -> str:
    """Of the names, shapes, types and values of all weights."""
    digest = xxhash.xxh3_128()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def function_digest(model: nn.Module) -> str:
    """Of all weights, and of what the modules do with them: an activation, the number of heads and pooling are none."""
    digest = hashlib.blake2b(weights_digest(model).encode(), digest_size=8)
    for name, module in model.named_modules():
        about = {key: _said(value) for key, value in vars(module).items() if not key.startswith("_")}
        about = {key: said for key, said in sorted(about.items()) if said and key not in _WITHOUT_EFFECT}
        digest.update(f"{name} {type(module).__qualname__} {module.extra_repr()} {about}".encode())
    return digest.hexdigest()


def _said(value: object) -> str:
    """A plain setting or a function, of any process alike; nothing for all else."""
    if isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_said, value))}]"
    return getattr(value, "__qualname__", "")


def data_digest(source: Source) -> str:
    """Of a split: its fingerprint, and the version that `datasets` has."""
    return hashlib.blake2b(f"{source.fingerprint()} {source.revision}".encode(), digest_size=8).hexdigest()


def split_digest(*sources: Source, more: Iterable[bytes] = ()) -> str:
    """Of a split: its images, and its truth, which is a source of its own or told as bytes."""
    digest = hashlib.blake2b(" ".join(map(data_digest, sources)).encode(), digest_size=8)
    for part in more:
        digest.update(part)
    return digest.hexdigest()


def labels_digest(source: Source) -> str:
    """Of a split's labels."""
    return hashlib.blake2b(source.all_labels().numpy().tobytes(), digest_size=8).hexdigest()


class Pictures(Dataset):
    """`pictures[index]`: the index, the transformed image (uint8; empty without a transform), its pixels' digest."""

    def __init__(
        self, source: Source, transform: Callable | None, read: Callable[[int], Image.Image] | None = None
    ) -> None:
        """read: the image of an index, or UnreadableImage (default: the source's)."""
        self.source, self.transform, self.read = source, transform, read or source.picture

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[int, np.ndarray, bytes]:
        picture = self.read(index)
        digest = xxhash.xxh3_128_digest(repr(picture.size).encode() + picture.tobytes())
        image = np.zeros(0, np.uint8) if self.transform is None else np.asarray(self.transform(picture))
        return index, image, digest


def collate_pictures(items: list) -> tuple[np.ndarray, torch.Tensor, np.ndarray]:
    """Indices (B,), images (B, 3, S, S) uint8 (or (B, 0)), digests (B, 16) uint8."""
    indices, images, digests = zip(*items, strict=True)
    digests = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, DIGEST)
    return np.array(indices), torch.from_numpy(np.stack(images)), digests


def digests_of(
    source: Source,
    workers: int,
    folder: str,
    accelerator: Accelerator,
    read: Callable[[int], Image.Image] | None = None,
) -> np.ndarray:
    """The digests of all images' pixels, (n, 16) uint8, for protocols that keep no features; kept in the folder.

    read: the image of an index; UnreadableImage ends it in one line (default: the source's picture). All processes have
    to call it; each reads its share of the images.
    """
    path = Path(folder) / f"digests-{data_digest(source)}-{source.name.replace('/', '_')}.npy"
    known = [_stored(path, len(source)) if accelerator.is_main_process else None]
    broadcast_object_list(known)
    if known[0] is not None:
        return known[0]
    share = range(accelerator.process_index, len(source), accelerator.num_processes)
    screen = Screen(len(share), 0, accelerator.is_main_process, unit="image")
    screen.say(f"looking for duplicates: {len(source)} images of {source.name}")
    digests, seen = np.zeros((len(source), DIGEST), np.uint8), 0
    pictures = Subset(Pictures(source, None, read), share)
    for indices, _, some in batches_of_all(pictures, collate_pictures, batch_size=256, num_workers=workers):
        digests[indices] = some
        seen += len(indices)
        screen.show(seen, "digests")
    screen.close()
    # each row is zero in all processes but one
    digests = accelerator.reduce(torch.from_numpy(digests).to(accelerator.device), "sum").cpu().numpy()
    if accelerator.is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".new").open("wb") as file:
            np.save(file, digests)
        path.with_suffix(".new").replace(path)
    return digests


def _stored(path: Path, count: int) -> np.ndarray | None:
    """The digests in a file, if it is there and not damaged."""
    if not path.is_file():  # a FIFO would be waited for
        return None
    try:
        digests = np.load(path)
    except (OSError, ValueError, EOFError):
        return None
    return digests if digests.shape == (count, DIGEST) else None


def duplicates(train: np.ndarray, test: np.ndarray) -> int:
    """How many test images have exactly the pixels of a training image, by their digests (n, 16) and (m, 16)."""
    known = {digest.tobytes() for digest in train}
    return sum(digest.tobytes() in known for digest in test)
