"""A file at an address → `download` in an Arrival's folder, gone on with by Range where it broke off."""

import re
import threading
import urllib.error
import urllib.request
from functools import partial
from http import HTTPStatus
from http.client import HTTPResponse
from urllib.parse import urlsplit

from ...errors import UserError, printable
from ..download import patiently
from .arrival import Arrival, BrokenOff, Changed, arriving, first_sentence

SECONDS = 30  # in which the server has to send something
_PIECE = 1 << 20


class _Redirects(urllib.request.HTTPRedirectHandler):
    """To http and https alone: urllib also follows to ftp."""

    def redirect_request(self, request, answer, code, reason, headers, address):
        if urlsplit(address).scheme not in ("http", "https"):
            raise urllib.error.HTTPError(address, code, f"it leads to {printable(address):.200}", headers, answer)
        return super().redirect_request(request, answer, code, reason, headers, address)


def fetch(address: str, arrival: Arrival) -> str:
    """Fetch a file, or the rest of it; returns the address, and the one to which it led."""
    by_hand = f"download {address} by other means, and give it as --file PATH"
    mend = partial(arrival.mend, by_hand)
    stop = threading.Event()
    with arriving(arrival, address, by_hand):
        try:
            if not arrival.resume(address):
                work = partial(arrival.or_anew, partial(_download, address, arrival, stop, by_hand))
                patiently(work, address, mend, received=lambda: arrival.done)
        except urllib.error.HTTPError as error:
            if error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                arrival.discard()  # there is more than the server has: another file
            raise UserError(
                f"{address} answers {error.code} ({first_sentence(str(error.reason))}): try again later, or {by_hand}."
            ) from error
        finally:
            stop.set()
    if arrival.part:
        raise BrokenOff(f"{address} broke off after {arrival.done:,} bytes: {mend()}.")
    return str(arrival.begun().get("from") or address)


def _download(address: str, arrival: Arrival, stop: threading.Event, by_hand: str) -> None:
    done, version = arrival.done, arrival.begun().get("version")
    # If the file has changed since, If-Range makes the server send all of it.
    headers = {"Range": f"bytes={done}-", "If-Range": version} if done and version else {}
    request = urllib.request.Request(address, headers={**headers, "Accept-Encoding": "identity"})
    ask = urllib.request.build_opener(_Redirects).open
    with ask(request, timeout=SECONDS) as answer:
        _check_kind(address, answer, by_hand)
        etag = answer.headers.get("ETag")  # a weak one does not stand for the bytes
        version_now = etag if etag and not etag.startswith("W/") else answer.headers.get("Last-Modified")
        before = arrival.begun().get("total")
        partial_answer = answer.status == HTTPStatus.PARTIAL_CONTENT
        if not headers or not partial_answer:
            arrival.discard()
            done = 0
        if partial_answer:
            _check_part(answer, done, before, version_now == version)
        length = answer.headers.get("Content-Length")
        total = done + int(length) if length else None
        part = arrival.folder / "download.part"
        with part.open("ab") as file:
            arrival.begin(address, total, version_now, _led(address, answer.url))
            while not stop.is_set() and (piece := answer.read1(_PIECE)):
                arrival.check_length(done + len(piece), total)
                done += file.write(piece)
                arrival.show(done)
    if not stop.is_set() and total in (None, done):
        part.rename(arrival.file)


def _check_kind(address: str, answer: HTTPResponse, by_hand: str) -> None:
    """Refuse an answer that says that it is no file of weights; what has arrived before is kept."""
    kind, encoding = answer.headers.get_content_type(), answer.headers.get("Content-Encoding", "identity")
    if kind == "text/html":
        raise UserError(
            f"{address}: the server sent a web page ({kind}) instead of the file, as networks do that want a login: "
            f"open the address in a browser, then give the same command again; or {by_hand}."
        )
    if encoding.lower() != "identity":
        raise UserError(f"{address}: the server packed the file ({encoding}), which was not asked for: {by_hand}.")


def _check_part(answer: HTTPResponse, done: int, total: int | None, same: bool) -> None:
    """Refuse a part of a file that is not exactly what is missing."""
    said = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", answer.headers.get("Content-Range", ""))
    rest = said and int(said[1]) == done and said[3] in ("*", str(int(said[2]) + 1))
    if done and not (rest and same and (total is None or int(said[2]) + 1 == total)):
        raise Changed("the server goes on with another file")
    if not done and not rest:
        raise ValueError("the server sent a part that was not asked for")


def _led(address: str, final: str) -> str:
    """An address and where it led, if elsewhere; what comes after a ? may be a key, and is left out."""
    final = printable(final.partition("?")[0])
    return address if final == address.partition("?")[0] else f"{address} (which led to {final})"
