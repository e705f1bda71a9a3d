"""A checkpoint in a public folder of Google Drive → `download` in an Arrival's folder, through the library gdown."""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

from ...errors import UserError, printable
from ..download import patiently
from .arrival import Arrival, Changed, arriving, first_sentence

SECONDS = 30  # in which the drive has to send something
PAGES = 50  # seconds in which its pages (consent, confirmation) have to end in the file
_CHECKPOINTS = (".pth", ".pt", ".tar", ".ckpt", ".bin", ".safetensors")
_OPTIONS = {"quiet": True, "use_cookies": False, "timeout": SECONDS}


def fetch(folder: str, words: tuple[str, ...], arrival: Arrival) -> str:
    """Fetch the checkpoint of a folder; returns where it lay. words: patterns to choose by if there are several."""
    link = address(folder)
    by_hand = f"download the checkpoint in a browser, from {link}, and give it as --file PATH"
    mend = partial(arrival.mend, by_hand)
    gdown = _gdown(by_hand)
    with arriving(arrival, link, by_hand), _refusals(gdown, by_hand):
        listing = partial(gdown.download_folder, id=folder, skip_download=True, **_OPTIONS)
        file = choose(patiently(listing, link, mend, received=lambda: arrival.done), words, by_hand)
        source = f"{link} ({printable(file.path)})"
        if not arrival.resume(file.id):
            arrival.or_anew(partial(_download, gdown, file.id, arrival, source, mend))
    return source


def address(folder: str) -> str:
    """The link to a folder, for a browser."""
    return f"https://drive.google.com/drive/folders/{folder}"


def choose(files: list[Any], words: tuple[str, ...], by_hand: str) -> Any:
    """The checkpoint among the files of a folder; of several the one whose path fits the words, each if any does."""
    found = [file for file in files if file.path.lower().endswith(_CHECKPOINTS)]
    for word in words:
        found = [file for file in found if re.search(word, file.path, re.IGNORECASE)] or found
    if len(found) == 1:
        return found[0]
    names = ", ".join(file.path for file in files)
    if not files:
        fault = "the folder shows no file, it may be empty or no longer public"
    elif not found:
        fault = f"the folder holds no checkpoint, but {names:.300}"
    else:
        fault = f"the folder holds several checkpoints, and no name tells which is meant ({names:.300})"
    raise UserError(f"{fault}: {by_hand}.")


def _gdown(by_hand: str) -> ModuleType:
    try:
        import gdown
    except ImportError as error:
        raise UserError(f"a drive is read with gdown: pip install 'timm-dseq[drive]', or {by_hand}.") from error
    return gdown


@contextmanager
def _refusals(gdown: ModuleType, by_hand: str) -> Iterator[None]:
    """What the drive says instead of sending a file, as one line."""
    try:
        yield
    except gdown.FileURLRetrievalError as error:  # too many downloads today, not public, a page that nobody foresaw
        reason = first_sentence(" ".join((str(error).split("\n\n") * 2)[1].split()))  # of the second paragraph, if any
        raise UserError(f"the drive does not hand the file out ({reason}): wait a day, or {by_hand}.") from error
    except gdown.DownloadCancelled as error:
        raise UserError(f"the drive sends pages and no file: try again later, or {by_hand}.") from error


def _download(gdown: ModuleType, id: str, arrival: Arrival, source: str, mend: Callable[[], str]) -> None:
    """Download a file, or the rest of it; gdown keeps what there is in download….part, in pieces of half a MiB."""
    before, total_before = arrival.done, arrival.begun().get("total")
    stop = threading.Event()
    hurry = threading.Timer(PAGES, stop.set)

    def progress(done: int, total: int | None) -> None:
        if not hurry.finished.is_set():
            hurry.cancel()
            if before and total != total_before:  # gdown compares within one call only
                raise Changed
            arrival.begin(id, total, version=id)
        arrival.check_length(done, total)  # of a body that gdown unpacks it does not
        arrival.show(done)

    hurry.start()
    try:
        output = str(arrival.file)
        work = partial(gdown.download, id=id, output=output, resume=True, progress=progress, cancel=stop, **_OPTIONS)
        patiently(work, source, mend, received=lambda: arrival.done)
    except gdown.FileURLRetrievalError:
        raise
    except gdown.DownloadError:
        if before and arrival.done == before:  # the drive does not go on with it, so the next try begins anew
            arrival.discard()
        raise
    finally:
        hurry.cancel()
        stop.set()
