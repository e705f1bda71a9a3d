"""The feature cache: a split's features in a file on the disk; a row is computed when it is first asked for.

    CACHE/KEY/  rows.bin (n, width)  digests.bin (n, 16)  done.bin (n,)  about.json

The key is made of the backbone, the data set and the preprocessing, so no row is stale, unless an image was changed
within its file's size and time. A process that is stopped or killed loses at most the batch in hand. done.bin holds 0
for a row that was never computed, else a check of what was written, so that a row which a power cut, a full disk or a
hand has spoilt is computed again.
"""

import errno
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from timm.data import create_transform
from torch.utils.data import Subset

from timm_dseq import UserError

from ..data.digests import DIGEST, Pictures, collate_pictures, data_digest
from ..data.source import Source
from ..data.unreadable import batches_of_all
from ..salient_crop import CROP, DETAIL
from ..system.screen import Screen
from .features import FrozenBackbone, RowLayout
from .settings import Cache

DTYPES = {"float16": np.float16, "float32": np.float32}


@dataclass(frozen=True)
class CachedFeatures:
    """A split's features, mapped into memory; rows that were never asked for are zero."""

    rows: np.ndarray  # (n, width)
    digests: np.ndarray  # (n, 16) uint8, of the decoded pixels
    labels: torch.Tensor  # (n,)
    layout: RowLayout
    crops: np.ndarray | None = None  # (n, width), of salient crops: what is read is the mean of both

    def read(self, indices: np.ndarray, columns: slice) -> torch.Tensor:
        """Columns of some rows: (rows, columns), as they are stored."""
        found = torch.from_numpy(np.asarray(self.rows[indices, columns]))
        if self.crops is None:
            return found
        return (found.float() + torch.from_numpy(np.asarray(self.crops[indices, columns])).float()) / 2

    def view(self, indices: np.ndarray, view: str, device: torch.device) -> torch.Tensor:
        """A view of some rows: (rows, width of the view), float32 on the device."""
        # column by column: of a mapped file only what is asked for is read
        pieces = [self.read(indices, columns) for columns in self.layout.columns(view)]
        return torch.cat([piece.to(device).float() for piece in pieces], dim=1)


def eval_transform(preprocessing: dict[str, Any]) -> Callable:
    """timm's evaluation transform up to the normalisation: PIL image → uint8 (3, S, S)."""
    words = {k: preprocessing[k] for k in ("input_size", "interpolation", "crop_pct", "crop_mode")}
    return create_transform(**words, is_training=False, use_prefetcher=True)


def cached_features(
    source: Source,
    wanted: torch.Tensor | None,
    backbone: FrozenBackbone,
    preprocessing: dict[str, Any],
    cache: Cache,
    function: str,
    accelerator: Accelerator,
    workers: int,
    salient_crop: str | None = None,
) -> CachedFeatures:
    """The features of these rows (None: all) of a split, computed where the cache lacks them.

    function: digest of the backbone. salient_crop: a query, by which they are those of the view of each image's most
    salient region. All processes have to call it; each computes its share.
    """
    layout = backbone.layout(preprocessing["input_size"])
    about = {
        "function": function,
        "data": data_digest(source),
        "split": source.name,
        "images": len(source),
        "preprocessing": preprocessing,
        "precision": accelerator.mixed_precision,
        "dtype": cache.dtype,
        "layout": asdict(layout)["parts"],
        **({"salient crop": [salient_crop, *CROP]} if salient_crop else {}),
    }
    folder = Path(cache.folder) / hashlib.blake2b(json.dumps(about).encode(), digest_size=8).hexdigest()
    if accelerator.is_main_process:
        _create_files(folder, about, layout.width, cache)
    accelerator.wait_for_everyone()
    if not (folder / "about.json").is_file():
        raise UserError(f"cache.folder={cache.folder} has to be on a disk that all processes share.")
    shape = (len(source), layout.width)
    rows = np.memmap(folder / "rows.bin", DTYPES[cache.dtype], "r", shape=shape)
    digests = np.memmap(folder / "digests.bin", np.uint8, "r", shape=(len(source), DIGEST))
    done = np.memmap(folder / "done.bin", np.uint8, "r", shape=(len(source),))
    asked = np.arange(len(source)) if wanted is None else wanted.numpy()
    if accelerator.is_main_process:
        spoilt = [i for i in asked if done[i] and done[i] != _check(rows[i], digests[i])]
        if spoilt:
            print(f"{len(spoilt)} rows in {folder} are damaged and are computed again", flush=True)
            _write(folder, spoilt, {"done.bin": np.zeros((len(spoilt), 1), np.uint8)})
    accelerator.wait_for_everyone()
    todo = asked[done[asked] == 0]
    accelerator.wait_for_everyone()  # before any process marks a row as done: all have to share out the same rows
    if len(todo):
        mine = todo[accelerator.process_index :: accelerator.num_processes]
        screen = Screen(len(mine), 0, accelerator.is_main_process, unit="image")
        what = "salient crops" if salient_crop else "images"
        screen.say(f"features of {len(todo)} {what} of {source.name}, into {folder}")
        channels, *size = preprocessing["input_size"]
        seen_at = [channels, *(side * DETAIL for side in size)] if salient_crop else preprocessing["input_size"]
        transform = eval_transform({**preprocessing, "input_size": seen_at})
        batches = batches_of_all(
            Subset(Pictures(source, transform), mine.tolist()),  # datasets 4.0: no numpy integers
            collate_pictures,
            batch_size=cache.batch_size,
            num_workers=workers,
            pin_memory=accelerator.device.type == "cuda",
        )
        seen = 0
        for indices, images, found in batches:
            with accelerator.autocast():
                images = images.to(accelerator.device, non_blocking=True)
                if salient_crop:
                    features = layout.rows(backbone.salient_features(images, salient_crop))
                else:
                    features = layout.rows(backbone.features(images))
            stored = _stored(features, cache.dtype, source, int(indices[0]))
            checks = np.array([[_check(*both)] for both in zip(stored, found, strict=True)], np.uint8)
            # the check last: a row that has none is computed again
            _write(folder, indices, {"rows.bin": stored, "digests.bin": found, "done.bin": checks})
            seen += len(indices)
            screen.show(seen, f"{source.name}: features")
        screen.close()
    accelerator.wait_for_everyone()
    return CachedFeatures(rows, digests, source.truth, layout)


def _write(folder: Path, indices: Sequence[int], parts: dict[str, np.ndarray]) -> None:
    """Rows (k, …) of these indices (k,) into files of the cache, in this order.

    Written into a mapped file, they would end the process without a word where the disk is full.
    """
    try:
        for name, values in parts.items():
            with (folder / name).open("r+b", buffering=0) as file:
                for index, value in zip(indices, np.ascontiguousarray(values), strict=True):
                    file.seek(int(index) * value.nbytes)
                    if file.write(value.tobytes()) < value.nbytes:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}): make room, or name another cache.folder; the same command "
            "goes on."
        ) from error


def _check(row: np.ndarray, digest: np.ndarray) -> int:
    """Of one row (width,) and the digest (16,) beside it: 1 to 255."""
    return 1 + zlib.crc32(digest, zlib.crc32(row)) % 255


def _stored(features: torch.Tensor, dtype: str, source: Source, first: int) -> np.ndarray:
    """Features (B, width) as the cache stores them; one line where they are not finite. first: row of the first one."""
    features = features.to(torch.float32).cpu()
    if not features.isfinite().all():
        raise UserError(
            f"the features of {source.where(first)} and its neighbours are not finite: check the weights, or use "
            "--precision no."
        )
    with np.errstate(over="ignore"):  # what does not fit is looked for below
        stored = features.numpy().astype(DTYPES[dtype])
    if not np.isfinite(stored).all():
        raise UserError(f"features are too large for {dtype}: give --cache.dtype float32.")
    return stored


def _create_files(folder: Path, about: dict[str, Any], width: int, cache: Cache) -> None:
    """Empty files of the right size, unless all are there: one alone would say nothing about the others."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        n = about["images"]
        sizes = {"rows.bin": n * width * DTYPES[cache.dtype]().itemsize, "digests.bin": n * DIGEST, "done.bin": n}
        paths = {folder / name: size for name, size in sizes.items()}
        if not all(path.is_file() and path.stat().st_size == size for path, size in paths.items()):
            for path, size in paths.items():
                path.unlink(missing_ok=True)  # it may be a FIFO, which would be waited for
                with path.open("wb") as file:
                    file.truncate(size)
        if not (folder / "about.json").is_file():
            (folder / "about.json").unlink(missing_ok=True)
        (folder / "about.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cache.folder={cache.folder} cannot be written ({error.strerror}): name another.") from error
