"""What happens to a file: a table for every family of faults whose files the project has written itself."""

import os
from collections.abc import Callable
from pathlib import Path


def _content(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(change(path.read_bytes()))


def _instead(make: Callable[[Path], None]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


def _flipped(content: bytes) -> bytes:
    at = len(content) * 2 // 3
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


DAMAGES: dict[str, Callable[[Path], None]] = {
    "deleted": lambda path: path.unlink(),
    "empty": _content(lambda content: b""),
    "cut short": _content(lambda content: content[: len(content) * 2 // 5]),
    "a bit flipped": _content(_flipped),
    "zeros": _content(lambda content: bytes(len(content))),
    "longer": _content(lambda content: content + b"\n{}"),
    "text": _content(lambda content: b"hello, this is none\n"),
    "bytes that are no text": _content(lambda content: b"\xff\xfe\x80" * 9),
    "a list as JSON": _content(lambda content: b"[1, 2]"),
    "null as JSON": _content(lambda content: b"null"),
    "JSON of another form": _content(lambda content: b'{"done": 3, "config": [], "model.safetensors": 7}'),
    "brackets without end": _content(lambda content: b"[" * 100_000),
    "a folder": _instead(lambda path: path.mkdir()),
    "a FIFO": _instead(os.mkfifo),
    "a dangling link": _instead(lambda path: path.symlink_to("nowhere")),
    "a link to itself": _instead(lambda path: path.symlink_to(path.name)),
}
