"""A download on its way into a folder: shown while it arrives, and gone on with where an earlier call broke off.

download         all of it
download….part   what there is so far
download.json    what it is: {"of": its address or identity, "total": bytes, "version": as the server calls it,
                 "from": where it lay}
"""

import json
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.utils import tqdm

from ...errors import FULL, UserError
from .folders import check_room, writing


class BrokenOff(UserError):
    """The connection ended before the file did: another try goes on from there."""


class Changed(Exception):
    """The server goes on with another file than that of which there is a part."""


# Without an announced length so many times the encoder's bytes are taken: a checkpoint holds at most the student, the
# target, a predictor, and two moments for each number that is trained. Meta's largest, ViT-g, are four encoders or so.
ENCODERS = 10


class Arrival:
    """name: of what is to become of it. more: bytes of disk that this will take beside the download itself."""

    def __init__(self, name: str, folder: Path, more: int) -> None:
        self.name, self.folder, self.more = name, folder, more
        self.file, self.note = folder / "download", folder / "download.json"
        self.bar: tqdm | None = None

    @property
    def part(self) -> Path | None:
        """The file of what there is so far."""
        return next(iter(sorted(self.folder.glob("download*.part"))), None)

    @property
    def done(self) -> int:
        """Bytes that have arrived."""
        try:
            return self.part.stat().st_size if self.part else 0
        except FileNotFoundError:  # just now it was renamed
            return 0

    def mend(self, by_hand: str) -> str:
        """What to do after a failure: another try, which goes on only where there is something to go on with."""
        goes_on = ", it goes on from there" if self.done and self.begun().get("version") else ""
        return f"give the same command again{goes_on}; or {by_hand}"

    def begun(self) -> dict[str, Any]:
        """What a download.json says; nothing, where it is not there or torn."""
        try:
            note = json.loads(self.note.read_text(encoding="utf-8"))
            return note if isinstance(note, dict) else {}
        except (OSError, ValueError):
            return {}

    def resume(self, of: str) -> bool:
        """Go on with what is there if it is of this identity; else away with it. True if all of it is there."""
        begun = self.begun()
        if begun.get("of") != of:
            self.discard()
        elif self.part and self.done == begun.get("total"):
            self.part.rename(self.file)
        return self.file.is_file()

    def or_anew(self, download: Callable[[], None]) -> None:
        """Download the rest of it; all of it, where the server has another file by now."""
        try:
            download()
        except Changed:
            self.discard()
            download()

    def begin(self, of: str, total: int | None, version: str | None = None, where: str = "") -> None:
        """The server has said what it sends: check the room for the rest of it, note it, show a bar.

        version: by which it can be gone on with. where: it lay, for the record.
        """
        check_room((total or 0) - self.done + self.more, self.name)
        note = {"of": of, "total": total, "version": version, "from": where}
        self.note.write_text(json.dumps(note), encoding="utf-8")
        self.close()
        self.bar = tqdm(total=total, initial=self.done, desc=self.name, unit="B", unit_scale=True, disable=None)

    def check_length(self, done: int, total: int | None) -> None:
        """Refuse more bytes than were announced, or than any checkpoint of such an encoder takes."""
        most = ENCODERS * self.more if total is None else total
        if done > most:
            self.discard()
            why = "no checkpoint of it is so large" if total is None else "no more were announced"
            raise UserError(
                f"{self.name}: more than {most:,} bytes arrived, and {why}, so they were removed: try again later, or "
                "give the checkpoint as --file PATH."
            )

    def show(self, done: int) -> None:
        """Show that so many bytes are there."""
        if self.bar is not None:
            self.bar.update(done - self.bar.n)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self.bar is not None:
            self.bar.close()

    def discard(self) -> None:
        """Throw away what has arrived."""
        for path in self.folder.glob("download*"):
            path.unlink()

    def check_whole(self) -> None:
        """Compare each part of a file of torch with the checksum that was saved with it; other files have none."""
        try:
            with zipfile.ZipFile(self.file) as archive:
                stored = all(part.compress_type == zipfile.ZIP_STORED for part in archive.infolist())
                damaged = stored and archive.testzip() is not None
        except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, ValueError, EOFError):
            return  # what is no archive is judged by whoever opens it
        if damaged:
            self.discard()
            raise UserError(
                f"{self.name} arrived damaged (its checksums are not those that were saved with it), so it was "
                "removed: try again."
            )


def instead(file: Path) -> str | None:
    """What a file is that is plainly no checkpoint, but something else that servers send; None if it may be one."""
    with file.open("rb") as opened:
        head = opened.read(512).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return "an empty file (0 bytes)" if not file.stat().st_size else None
    if head.startswith((b"<!doctype html", b"<html", b"<head")):
        return "a web page (text/html)"
    return "a gzip archive" if head.startswith(b"\x1f\x8b") else None


@contextmanager
def arriving(arrival: Arrival, what: str, by_hand: str) -> Iterator[None]:
    """What a download stumbles over, as one line: the disk is named, anything else is the connection's."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of requests, urllib, http, and of a library that reads foreign pages
        if isinstance(error, OSError) and error.errno and (error.errno in FULL or error.filename):
            with writing(arrival.name):
                raise
        reason = first_sentence(str(error) or type(error).__name__)
        raise BrokenOff(f"{what} did not arrive whole ({reason}): {arrival.mend(by_hand)}.") from error


def first_sentence(text: str) -> str:
    """The first sentence of what a library says, in one line."""
    return re.split(r"[.!]\s|\n\n", text.strip())[0].replace("\n", " ").rstrip(".")[:200]
