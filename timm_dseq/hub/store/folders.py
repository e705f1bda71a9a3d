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

from huggingface_hub import cached_assets_path, constants
from huggingface_hub.utils import WeakFileLock

from ...errors import FULL, UserError
from ..weights import check_safetensors, sha256

RECORD, WEIGHTS = "source.json", "model.safetensors"


def store() -> Path:
    """The store's folder, made if it is not there."""
    if not os.path.isabs(constants.HF_ASSETS_CACHE):  # it would be another one in each working directory
        raise UserError(
            f"HF_HOME or HF_ASSETS_CACHE makes {constants.HF_ASSETS_CACHE!r} of the local store, which is no whole "
            "path: begin it with /, or unset it."
        )
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
    folder = store() / name
    if fault := damage(folder):
        raise UserError(f"{fault} Mend the store: timm-dseq get {name} brings it anew.")
    return str(folder / WEIGHTS)


def damage(folder: Path, thorough: bool = False) -> str | None:
    """What is wrong with the weights in a folder of the store, if anything is. thorough: read all of them."""
    file, known = folder / WEIGHTS, record(folder).get("weights")
    try:
        check_safetensors(file)
        known = known if isinstance(known, dict) else {}  # one that an earlier version stored has no such entry
        same = known.get("size") in (None, file.stat().st_size)
        if same and thorough and known.get("sha256"):
            same = known["sha256"] == sha256(file)
    except (UserError, OSError) as error:
        return str(error)
    return None if same else f"{file} is not as it was stored, by its size or SHA-256."


def record(folder: Path) -> dict[str, Any]:
    """Where the weights in a folder of the store come from: source, size, SHA-256, licence, date; {} if unreadable."""
    try:
        said = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return said if isinstance(said, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def unfinished(name: str) -> Path:
    """The folder of what has arrived so far of a model.tag."""
    return store() / f".{name}"


def prepared(name: str) -> Path:
    """The folder to work in, with nothing in it but a download to go on with; what bears the name is removed."""
    work, entry = unfinished(name), store() / name
    if work.is_symlink() or not work.is_dir():
        delete(work)
    work.mkdir(exist_ok=True)
    for path in work.iterdir():
        if not path.name.startswith("download") or path.is_symlink() or not path.is_file():
            delete(path)
    if os.path.lexists(entry):
        entry.rename(work / "removed")  # at once, so that a kill leaves nothing that looks complete
        delete(work / "removed")
    return work


@contextmanager
def locked(name: str, say: Callable[[str], None]) -> Iterator[None]:
    """One process at a time for a model.tag; another one waits. The lock ends with its process."""
    with ExitStack() as held:
        with writing(name):
            lock = store() / f".{name}.lock"
            try:
                held.enter_context(WeakFileLock(lock, timeout=0.1))
            except TimeoutError:
                say(f"{name}: another process is at it, waiting for its end")
                held.enter_context(WeakFileLock(lock))
        yield


@contextmanager
def writing(name: str) -> Iterator[None]:
    """For a model.tag: a disk that takes no more, or a folder that may not be written, is one line."""
    try:
        yield
    except OSError as error:
        full = error.errno in FULL
        mend = f"free some room{held(name)}, or set HF_HOME elsewhere" if full else "set HF_HOME to a folder of yours"
        raise UserError(
            f"{error.filename or store()} cannot be written ({error.strerror or error}): {mend}."
        ) from error


def held(name: str) -> str:
    """In brackets, the room that an unfinished download takes, and how to get it back; "" if there is none."""
    size = _size(unfinished(name))
    return (
        f" (what has arrived of {name} takes {size_text(size)}: timm-dseq get --remove {name} frees it)" if size else ""
    )


def publish(folder: Path, name: str) -> Path:
    """Give a complete folder its name in the store, after all of it has reached the disk."""
    for path in (*folder.iterdir(), folder):
        _sync(path)
    folder.rename(store() / name)
    _sync(store())
    return store() / name


def remove(name: str) -> int:
    """Remove whatever bears the name of a model.tag, and what has arrived of it; returns the bytes that this frees."""
    waste, entry = unfinished(name), store() / name
    freed = delete(waste)
    if os.path.lexists(entry):
        entry.rename(waste)  # at once, so that a kill leaves nothing that looks complete
        freed += delete(waste)
    return freed


def delete(path: Path) -> int:
    """Remove a folder, a file, or a link alone, if it is there; returns the bytes that it held."""
    freed = _size(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    return freed


def check_room(needed: int, name: str) -> None:
    """Refuse a disk that has no room for so many more bytes of a model.tag."""
    free = shutil.disk_usage(store()).free
    if free < needed:
        raise UserError(
            f"{store()} has room for {size_text(free)}, and {name} takes {size_text(needed)}: free some{held(name)}, "
            "or set HF_HOME elsewhere."
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


def _size(path: Path) -> int:
    """The bytes of a file or folder; a link holds none."""
    files = path.rglob("*") if path.is_dir() and not path.is_symlink() else [path]
    return sum(file.lstat().st_size for file in files if file.is_file() and not file.is_symlink())
