"""Features once: images → rows of a file on the disk, each computed when it is first needed and never again.

    CACHE/KEY/  rows.bin (n, width)  digests.bin (n, 16)  done.bin (n,)  about.json

The key is made of the weights, the data set and the preprocessing, so no row can be stale. Any process may stop at any
moment: the rows that are done stay.
"""

import hashlib
import json
from collections.abc import Callable
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
from ..system.screen import Screen
from .features import Frozen, Layout
from .settings import Cache

DTYPES = {"float16": np.float16, "float32": np.float32}


@dataclass(frozen=True)
class Extracted:
    """A split's features, mapped into memory; rows that nobody asked for are zero."""

    rows: np.ndarray  # (n, width)
    digests: np.ndarray  # (n, 16) uint8, of the decoded pixels
    labels: torch.Tensor
    layout: Layout


def eval_transform(preprocessing: dict[str, Any]) -> Callable:
    """timm's evaluation, up to the normalisation: PIL image → uint8 (3, S, S)."""
    words = {k: preprocessing[k] for k in ("input_size", "interpolation", "crop_pct", "crop_mode")}
    return create_transform(**words, is_training=False, use_prefetcher=True)


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
    digests = np.memmap(folder / "digests.bin", np.uint8, "r+", shape=(len(source), DIGEST))
    done = np.memmap(folder / "done.bin", np.uint8, "r+", shape=(len(source),))
    asked = np.arange(len(source)) if wanted is None else wanted.numpy()
    todo = asked[done[asked] == 0]
    accelerator.wait_for_everyone()  # nobody writes before all have counted
    mine = todo[accelerator.process_index :: accelerator.num_processes]
    screen = Screen(len(mine), 0, accelerator.is_main_process and len(todo) > 0, unit="image")
    if len(todo):
        screen.say(f"features of {len(todo)} images of {source.name}, into {folder}")
    batches = batches_of_all(
        Subset(Pictures(source, eval_transform(preprocessing)), mine.tolist()),  # datasets 4.0: no integers of numpy
        collate_pictures,
        batch_size=cache.batch_size,
        num_workers=workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    seen = 0
    for indices, images, found in batches:
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


def read(rows: np.ndarray, indices: np.ndarray, layout: Layout, view: str, device: torch.device) -> torch.Tensor:
    """A view of some rows of a cache, float32 on the device."""
    # a mapped file is read piece by piece: all columns of a row that is not wanted would be read for nothing
    pieces = [torch.from_numpy(np.asarray(rows[indices, columns])) for columns in layout.columns(view)]
    return torch.cat([piece.to(device).float() for piece in pieces], dim=1)


def _begin(folder: Path, about: dict[str, Any], width: int, cache: Cache) -> None:
    """Empty files of the right size; what is there already stays."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        n = about["images"]
        sizes = {"rows.bin": n * width * DTYPES[cache.dtype]().itemsize, "digests.bin": n * DIGEST, "done.bin": n}
        for name, size in sizes.items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != size:
                with path.open("wb") as file:
                    file.truncate(size)
        (folder / "about.json").write_text(json.dumps(about, indent=1))
    except OSError as error:
        raise UserError(f"cache.folder={cache.folder} cannot be written ({error.strerror}): name another.") from error
