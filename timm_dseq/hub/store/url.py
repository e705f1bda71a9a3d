"""A file at an address → `download` in an Arrival's folder, gone on with by Range where it broke off."""

import threading
import urllib.error
from functools import partial
from http import HTTPStatus
from urllib.request import Request, urlopen

from ...errors import UserError
from ..download import patiently
from .arrival import Arrival, BrokenOff, arriving

SECONDS = 30  # in which the server has to send something
_PIECE = 1 << 20


def fetch(address: str, arrival: Arrival) -> str:
    """Fetch a file, or the rest of it; returns the address."""
    by_hand = f"download {address} by other means, and give it as --file PATH"
    mend = f"give the same command again, it goes on from there; or {by_hand}"
    stop = threading.Event()
    with arriving(address, mend):
        try:
            if not arrival.resume(address):
                patiently(partial(_download, address, arrival, stop), address, mend)
        except urllib.error.HTTPError as error:
            if error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                arrival.discard()  # there is more than the server has: another file
            raise UserError(
                f"{address} answers {error.code} ({error.reason}): try again later, or {by_hand}."
            ) from error
        finally:
            stop.set()
    if arrival.part:
        raise BrokenOff(f"{address} broke off after {arrival.done:,} bytes: {mend}.")
    return address


def _download(address: str, arrival: Arrival, stop: threading.Event) -> None:
    done, version = arrival.done, arrival.begun().get("version")
    # If the file has changed since, If-Range makes the server send all of it.
    headers = {"Range": f"bytes={done}-", "If-Range": version} if done and version else {}
    with urlopen(Request(address, headers=headers), timeout=SECONDS) as answer:
        etag = answer.headers.get("ETag")  # a weak one does not stand for the bytes
        version_now = etag if etag and not etag.startswith("W/") else answer.headers.get("Last-Modified")
        if answer.status != HTTPStatus.PARTIAL_CONTENT:
            arrival.discard()
            done = 0
        elif version_now != version or not answer.headers.get("Content-Range", "").startswith(f"bytes {done}-"):
            arrival.discard()
            raise ValueError("the server goes on with another file")
        length = answer.headers.get("Content-Length")
        total = done + int(length) if length else None
        part = arrival.folder / "download.part"
        with part.open("ab") as file:
            arrival.begin(address, total, version_now)
            while not stop.is_set() and (piece := answer.read(_PIECE)):
                done += file.write(piece)
                arrival.show(done)
    if not stop.is_set() and total in (None, done):
        part.rename(arrival.file)
