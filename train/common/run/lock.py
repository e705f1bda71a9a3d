"""One run in a folder: a lock that ends with its process, however it ends.

    OUTPUT/.lock   {"host": …, "process": …, "since": …, "beat": …}

The system holds the lock, for the process alone: neither a kill nor a child that lives on leaves it behind. Where a
shared disk passes locks on between hosts it works there, too. Where it does not, the holder's beat tells.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from timm_dseq import UserError

try:
    import fcntl
except ImportError:  # on Windows, where the beat alone tells
    fcntl = None

NAME = ".lock"
BEAT = 10.0  # seconds between two signs of life
WATCHED = 25.0  # seconds without one, after which a holder on another host counts as dead
_LENGTH = 400  # bytes of the file, always the same, so that it can be written over in place


@contextmanager
def locked(folder: str | Path, accelerator: Accelerator, wanted: bool = True) -> Iterator[None]:
    """The folder is this run's within the block. All processes have to call it; where it is not, all end.

    wanted: False where the run writes nothing.
    """
    held, answer = None, [None]
    if wanted and accelerator.is_main_process:
        try:
            held = _Lock(Path(folder))
        except UserError as error:
            answer = [str(error)]
    broadcast_object_list(answer)
    if answer[0]:
        raise UserError(answer[0])
    try:
        yield
    finally:
        if held:
            held.release()


class _Lock:
    """Taken as it is made, or UserError."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / NAME
        self.made = not folder.exists()
        self.file = self._opened()
        self._wait_for_a_foreign_beat()
        self.owner = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%F %T"), "beat": 0}
        self._beat()
        self._released = threading.Event()
        threading.Thread(target=self._go_on_beating, daemon=True).start()

    def release(self) -> None:
        """Give it back; a folder that was made for it and holds nothing else goes, too."""
        self._released.set()
        with suppress(OSError):
            self.path.unlink()
            if self.made:
                self.folder.rmdir()  # fails unless it is empty
        os.close(self.file)

    def _opened(self) -> int:
        """The file, locked: the one that has the name, not one that its holder has just removed."""
        while True:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:
                raise UserError(
                    f"output_dir={self.folder} cannot be written ({error.strerror}): name another."
                ) from error
            try:
                if fcntl is not None:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(file), os.stat(self.path)):
                    return file
            except FileNotFoundError:
                pass
            except OSError:
                owner = _owner(file)
                os.close(file)
                raise self._in_use(owner) from None
            os.close(file)

    def _wait_for_a_foreign_beat(self) -> None:
        """Some shared disks give the same lock to several hosts: see whether the last holder still lives."""
        last = _owner(self.file)
        if not last or (fcntl is not None and last["host"] == socket.gethostname()):
            return
        print(
            f"{self.folder} was last in use on {last['host']}: waiting {WATCHED:.0f} s to see whether that run lives",
            flush=True,
        )
        end = time.monotonic() + WATCHED
        while time.monotonic() < end:
            time.sleep(min(1.0, WATCHED / 10))
            if (now := _owner(self.file)) != last:
                os.close(self.file)
                raise self._in_use(now)

    def _in_use(self, owner: dict) -> UserError:
        who = f"process {owner['process']} on {owner['host']}, since {owner['since']}" if owner else "another process"
        return UserError(
            f"output_dir={self.folder} is in use by another run ({who}): wait for its end, or name another folder."
        )

    def _beat(self) -> None:
        self.owner["beat"] += 1
        os.lseek(self.file, 0, os.SEEK_SET)
        os.write(self.file, json.dumps(self.owner).encode().ljust(_LENGTH))

    def _go_on_beating(self) -> None:
        while not self._released.wait(BEAT):
            with suppress(OSError):  # a full disk, or one that is gone, ends the run elsewhere
                self._beat()


def _owner(file: int) -> dict:
    """Who wrote the file last; nobody, if it is empty or torn."""
    try:
        os.lseek(file, 0, os.SEEK_SET)
        owner = json.loads(os.read(file, _LENGTH))
        return owner if {"host", "process", "since"} <= owner.keys() else {}
    except (ValueError, AttributeError):
        return {}
