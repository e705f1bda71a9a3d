"""The end of a run by a signal: asked for, and granted behind a step."""

import atexit
import multiprocessing.util
import os
import signal
import time

STOPPED = 75  # exit code of a run that was asked to stop, and has saved: the same command goes on
ECHO = 5.0  # seconds within which a second signal is the first one again: torchrun hands on what all have got already
NUMBERS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]


class Interrupted(BaseException):
    """A signal came where there is no step to finish."""


def interruptible() -> None:
    """From here on a signal ends what is being done, whatever it is, until `Stop` takes over."""
    for number in NUMBERS:
        signal.signal(number, _interrupt)


def _interrupt(_number: int, _frame) -> None:
    for number in NUMBERS:  # one is enough
        signal.signal(number, signal.SIG_IGN)
    raise Interrupted


class Stop:
    """SIGTERM, SIGINT and SIGUSR1 ask for an end behind the current step; one more, after a while, ends at once."""

    def __init__(self) -> None:
        self.asked = False
        self._since = 0.0
        for number in NUMBERS:
            signal.signal(number, self._ask)

    def _ask(self, number: int, _frame) -> None:
        if not self.asked:
            self.asked, self._since = True, time.monotonic()
        elif time.monotonic() - self._since > ECHO:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def ignore_signals(_worker: int) -> None:
    """`worker_init_fn` of loaders: only the main process reacts to a signal, and it needs its workers for its step."""
    for number in NUMBERS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """At exit Python sends SIGTERM to child processes and waits for them: for ever, for workers that ignore it.

    This is registered later, so it runs first, and kills them.
    """
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would take their end for an accident
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
