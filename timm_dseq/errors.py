"""What is said to a user: one line that names what is wrong and how to mend it, also where the fault is ours."""

import difflib
import errno
import os
import sys
import tempfile
import traceback
from collections.abc import Iterable
from pathlib import Path

DEBUG = "TIMM_DSEQ_DEBUG"  # set to anything, the traceback of a fault is printed, too
GONE = ("closed by peer", "reset by peer", "remote process exited")  # of those that compute together
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room, or not for this user, or not for a file so large


class UserError(RuntimeError):
    """A mistake that the user can mend. The message is one line; commands print it without a traceback.

    What it quotes of a file may hold letters that cannot be printed, or end a line: they are shown as in Python.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """A text whose letters that cannot be printed, or end a line, are shown as in Python."""
    return "".join(x if x.isprintable() else repr(x)[1:-1] for x in text)


def similar(name: str, known: Iterable[str]) -> str:
    """The end of a message on a mistyped name: ", maybe A or B", of the known names nearest to it; "" without any."""
    near = difflib.get_close_matches(name, known, 3)
    return f", maybe {' or '.join(near)}" if near else ""


def one_line(error: Exception, folder: str | os.PathLike | None = None) -> str:
    """What a program says of an error that ends it. If it is no UserError, its traceback is written into a file.

    folder: where the file goes, if it exists (else: the system's folder of temporary files). Call it while the error
    is handled.
    """
    if isinstance(error, UserError):
        return str(error)
    text = traceback.format_exc()
    if os.environ.get(DEBUG):
        print(text, file=sys.stderr)
    said = " ".join(str(error).split())
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in said:
        return "the memory is not enough: take a smaller batch, image or model."
    if any(word in said for word in ("gloo", "NCCL")) and any(word in said for word in GONE):
        return "another process of this run has ended: the lines before say why."
    if isinstance(error, BrokenPipeError):
        return "what reads the output has gone."
    if isinstance(error, OSError) and error.strerror and (error.filename or error.errno in FULL):
        place = f"{str(error.filename)[:200]} cannot be used" if error.filename else "a file cannot be written"
        return f"{place} ({error.strerror}): check its path, its rights and the room on the disk."
    what = f"{type(error).__name__}: {said[:300]}" if said else type(error).__name__
    try:
        place = folder if folder and Path(folder).is_dir() else None
        with tempfile.NamedTemporaryFile(
            "w", dir=place, prefix="fault-", suffix=".txt", delete=False, encoding="utf-8", errors="replace"
        ) as file:
            file.write(text)
        where = f"its traceback is in {file.name}"
    except OSError:
        where = f"{DEBUG}=1 shows its traceback"
    return f"a fault of ours ({what}): {where}, please report it."
