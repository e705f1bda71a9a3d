"""The local store: a folder for each model.tag whose weights `timm-dseq get` has brought.

    HF_HOME/assets/timm_dseq/weights/default/
        NAME.TAG/    config.json  model.safetensors  README.md  source.json   complete, since it has this name
        .NAME.TAG/   what has arrived so far, for a later call to go on with

It is huggingface_hub's folder for assets, so HF_HOME and HF_ASSETS_CACHE move it.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import cached_assets_path
from huggingface_hub.utils import WeakFileLock

from ...errors import UserError
from ..weights import check_safetensors

RECORD = "source.json"


def store() -> Path:
    """The store's folder, made if it is not there."""
    try:
        return cached_assets_path(library_name="timm_dseq", namespace="weights")
    except (OSError, ValueError) as error:  # ValueError: a file is in the way
        raise UserError(f"The local store cannot be made ({error}): set HF_HOME to a folder of yours.") from error


def stored(name: str) -> Path | None:
    """The folder of a model.tag, if the store has it."""
    try:
        folder = store() / name
        return folder if (folder / RECORD).is_file() else None
    except (UserError, OSError):  # where no store can be, nothing is in it
        return None


def weights_of(name: str) -> str:
    """The file of the weights of a model.tag that is in the store."""
    file = store() / name / "model.safetensors"
    try:
        check_safetensors(file)
    except UserError as error:
        raise UserError(f"{error} Mend the store: timm-dseq get --remove {name}, then timm-dseq get {name}.") from error
    return str(file)


def record(folder: Path) -> dict[str, Any]:
    """Where the weights in a folder of the store come from: source, size, SHA-256, licence, date."""
    try:
        return json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def unfinished(name: str) -> Path:
    """The folder of what has arrived so far of a model.tag."""
    return store() / f".{name}"


@contextmanager
def locked(name: str, say: Callable[[str], None]) -> Iterator[None]:
    """One process at a time for a model.tag; another one waits. The lock ends with its process."""
    with ExitStack() as held:
        with writing():
            lock = store() / f".{name}.lock"
            try:
                held.enter_context(WeakFileLock(lock, timeout=0.1))
            except TimeoutError:
                say(f"{name}: another process is at it, waiting for its end")
                held.enter_context(WeakFileLock(lock))
        yield


@contextmanager
def writing() -> Iterator[None]:
    """A disk that takes no more, or a folder that may not be written, is one line."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or store()} cannot be written ({error.strerror or error}): free some room, or set "
            "HF_HOME elsewhere."
        ) from error


def publish(folder: Path, name: str) -> Path:
    """Give a complete folder its name in the store, after all of it has reached the disk."""
    for path in (*folder.iterdir(), folder):
        _sync(path)
    folder.rename(store() / name)
    _sync(store())
    return store() / name


def remove(name: str) -> int:
    """Remove a model.tag and whatever has arrived of it; returns the bytes that this frees."""
    waste = unfinished(name)
    freed = _emptied(waste)
    if folder := stored(name):
        folder.rename(waste)  # at once, so that a kill leaves nothing that looks complete
        freed += _emptied(waste)
    return freed


def check_room(needed: int, what: str) -> None:
    """Refuse a disk that has no room for so many more bytes."""
    free = shutil.disk_usage(store()).free
    if free < needed:
        raise UserError(
            f"{store()} has room for {size_text(free)}, and {what} takes {size_text(needed)}: free some, or set "
            "HF_HOME elsewhere."
        )


def size_text(count: int) -> str:
    """Bytes in words."""
    return f"{count / 2**20:.1f} MiB" if count < 2**30 else f"{count / 2**30:.1f} GiB"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _emptied(folder: Path) -> int:
    """Remove a folder, if it is there; returns the bytes that it held."""
    freed = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
    if folder.is_dir():
        shutil.rmtree(folder)
    return freed
