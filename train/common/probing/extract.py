"""Features once: images → rows of a file on the disk, each computed when it is first needed and never again.

    CACHE/KEY/  rows.bin (n, width)  digests.bin (n, 16)  done.bin (n,)  about.json

The key is made of the weights, the data set and the preprocessing, so no row can be stale. Any process may stop at any
moment: the rows that are done stay.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from timm.data import create_transform
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from timm_dseq import UserError

from ..data.source import Source
from ..system.screen import Screen
from ..system.signals import deaf
from .features import Frozen, Layout
from .settings import Cache

DTYPES = {"float16": np.float16, "float32": np.float32}
_DIGEST = 16


@dataclass(frozen=True)
class Extracted:
    """A split's features, mapped into memory; rows that nobody asked for are zero."""

    rows: np.ndarray  # (n, width)
    digests: np.ndarray  # (n, 16) uint8, of the decoded pixels
    labels: torch.Tensor
    layout: Layout


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


def eval_transform(preprocessing: dict[str, Any]) -> Callable:
    """timm's evaluation, up to the normalisation: PIL image → uint8 (3, S, S)."""
    words = {k: preprocessing[k] for k in ("input_size", "interpolation", "crop_pct", "crop_mode")}
    return create_transform(**words, is_training=False, use_prefetcher=True)


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


def extract(
    source: Source,
    wanted: torch.Tensor | None,
    frozen: Frozen,
    preprocessing: dict[str, Any],
    cache: Cache,
    weights: str,
    accelerator: Accelerator,
    workers: int,
) -> Extracted:
    """The features of these rows (None: all) of a split. All processes have to ask; each computes its share."""
    layout = frozen.layout(preprocessing["input_size"])
    about = {
        "weights": weights,
        "data": data_digest(source),
        "split": source.name,
        "images": len(source),
        "preprocessing": preprocessing,
        "precision": accelerator.mixed_precision,
        "dtype": cache.dtype,
        "layout": asdict(layout)["parts"],
    }
    folder = Path(cache.folder) / hashlib.blake2b(json.dumps(about).encode(), digest_size=8).hexdigest()
    if accelerator.is_main_process:
        _begin(folder, about, layout.width, cache)
    accelerator.wait_for_everyone()
    if not (folder / "about.json").is_file():
        raise UserError(f"cache.folder={cache.folder} has to be on a disk that all processes share.")
    shape = (len(source), layout.width)
    rows = np.memmap(folder / "rows.bin", DTYPES[cache.dtype], "r+", shape=shape)
    digests = np.memmap(folder / "digests.bin", np.uint8, "r+", shape=(len(source), _DIGEST))
    done = np.memmap(folder / "done.bin", np.uint8, "r+", shape=(len(source),))
    asked = np.arange(len(source)) if wanted is None else wanted.numpy()
    todo = asked[done[asked] == 0]
    accelerator.wait_for_everyone()  # nobody writes before all have counted
    mine = todo[accelerator.process_index :: accelerator.num_processes]
    screen = Screen(len(mine), 0, accelerator.is_main_process and len(todo) > 0, unit="image")
    if len(todo):
        screen.say(f"features of {len(todo)} images of {source.name}, into {folder}")
    loader = DataLoader(
        Subset(
            Pictures(source, eval_transform(preprocessing)), mine.tolist()
        ),  # datasets 4.0 takes no integers of numpy
        cache.batch_size,
        num_workers=workers,
        collate_fn=together,
        pin_memory=accelerator.device.type == "cuda",
    )
    seen = 0
    for indices, images, found in whole(loader):
        with accelerator.autocast(), torch.no_grad():
            features = layout.rows(frozen.features(images.to(accelerator.device, non_blocking=True)))
        features = features.to(torch.float32).cpu()
        if not features.isfinite().all():
            raise UserError(
                f"the features of {source.where(int(indices[0]))} and its neighbours are not finite: check the "
                "weights, or use --precision no."
            )
        stored = features.numpy().astype(DTYPES[cache.dtype])
        if not np.isfinite(stored).all():
            raise UserError(f"features are too large for {cache.dtype}: give --cache.dtype float32.")
        rows[indices], digests[indices] = stored, found
        done[indices] = 1  # last: a row that is not marked is computed again
        seen += len(indices)
        screen.show(seen, f"{source.name}: features")
    screen.close()
    accelerator.wait_for_everyone()
    return Extracted(rows, digests, source.truth, layout)


def digests_of(source: Source, workers: int, cache: Cache, accelerator: Accelerator) -> np.ndarray:
    """The digests alone, (n, 16), for protocols that keep no features; kept beside features.

    All processes have to ask; each reads its share of the images.
    """
    path = Path(cache.folder) / f"digests-{data_digest(source)}-{source.name.replace('/', '_')}.npy"
    known = [np.load(path) if accelerator.is_main_process and path.is_file() else None]
    broadcast_object_list(known)
    if known[0] is not None:
        return known[0]
    mine = range(accelerator.process_index, len(source), accelerator.num_processes)
    screen = Screen(len(mine), 0, accelerator.is_main_process, unit="image")
    screen.say(f"looking for duplicates: {len(source)} images of {source.name}")
    own = Subset(Pictures(source, None), mine)
    found, seen = np.zeros((len(source), _DIGEST), np.uint8), 0
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


def read(rows: np.ndarray, indices: np.ndarray, layout: Layout, view: str, device: torch.device) -> torch.Tensor:
    """A view of some rows of a cache, float32 on the device."""
    # a mapped file is read piece by piece: all columns of a row that is not wanted would be read for nothing
    pieces = [torch.from_numpy(np.asarray(rows[indices, columns])) for columns in layout.columns(view)]
    return torch.cat([piece.to(device).float() for piece in pieces], dim=1)


def duplicates(learnt: np.ndarray, tested: np.ndarray) -> int:
    """How many tested images have exactly the pixels of one that was learnt from."""
    known = {digest.tobytes() for digest in learnt}
    return sum(digest.tobytes() in known for digest in tested)


def together(items: list) -> tuple[np.ndarray, torch.Tensor, np.ndarray, str | None]:
    indices, images, digests, wrong = zip(*items, strict=True)
    if line := next(filter(None, wrong), None):
        return np.array(indices), torch.zeros(0), np.zeros(0), line
    found = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, _DIGEST)
    return np.array(indices), torch.from_numpy(np.stack(images)), found, None


def whole(loader: DataLoader) -> Iterator[tuple[np.ndarray, torch.Tensor, np.ndarray]]:
    """The loader's batches, as long as every image can be read."""
    for indices, images, digests, wrong in loader:
        if wrong:
            raise UserError(f"{wrong}: mend or remove this image, a result has to be of all of them.")
        yield indices, images, digests


def _begin(folder: Path, about: dict[str, Any], width: int, cache: Cache) -> None:
    """Empty files of the right size; what is there already stays."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        n = about["images"]
        sizes = {"rows.bin": n * width * DTYPES[cache.dtype]().itemsize, "digests.bin": n * _DIGEST, "done.bin": n}
        for name, size in sizes.items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != size:
                with path.open("wb") as file:
                    file.truncate(size)
        (folder / "about.json").write_text(json.dumps(about, indent=1))
    except OSError as error:
        raise UserError(f"cache.folder={cache.folder} cannot be written ({error.strerror}): name another.") from error
