"""Signals end a run: at once while it prepares, at the end of the current step while it trains."""

import atexit
import multiprocessing.util
import os
import signal
import threading
import time

STOPPED = 75  # exit code of a run that was asked to stop, and has saved: the same command goes on
ECHO = 5.0  # seconds within which a second signal counts as the first: torchrun repeats those that all processes get
LOOKS = 0.5  # seconds between two looks at the parent
NUMBERS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]


class Interrupted(BaseException):
    """A signal came while there was no step to finish."""


_interrupted: float | None = None  # when Interrupted was last raised
_asked: float | None = None  # when a signal asked the run to stop


def usual() -> None:
    """From here on signals do what they do in any program: Ctrl-C raises KeyboardInterrupt, the others end it."""
    for number in NUMBERS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def interruptible() -> None:
    """From here on a signal raises Interrupted, until a `Stop` is made."""
    global _interrupted
    _interrupted = None
    for number in NUMBERS:
        signal.signal(number, _interrupt)


def _interrupt(_number: int, _frame) -> None:
    global _interrupted
    now = time.monotonic()
    if _interrupted is None or now - _interrupted > ECHO:  # an echo would interrupt the clean-up
        _interrupted = now
        raise Interrupted


class Stop:
    """From here on a signal sets `asked`: the run is to end after the current step. A later second one kills it.

    It is set from the start where Interrupted was raised and lost: in code that Python calls by itself, as after a
    fork, exceptions are printed and ignored.
    """

    def __init__(self) -> None:
        global _asked
        self.asked, _asked = _interrupted is not None, _interrupted
        for number in NUMBERS:
            signal.signal(number, self._ask)

    def _ask(self, number: int, _frame) -> None:
        global _asked
        if not self.asked:
            self.asked, _asked = True, time.monotonic()
        elif seconds_since_asked() > ECHO:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def seconds_since_asked() -> float:
    """How long ago a signal asked the run to stop; 0 if none did."""
    return 0.0 if _asked is None else time.monotonic() - _asked


def end_with_parent() -> None:
    """Where the launcher has gone, ask this process to stop, as a signal does. A scheduler's signal may reach the
    launcher alone; its child would train on, and get in the way of the run that follows."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOKS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def ignore_signals(_worker: int) -> None:
    """`worker_init_fn` of loaders: only the main process reacts to a signal, and needs workers to finish its step."""
    for number in NUMBERS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def end_workers(patience: float = 10.0) -> bool:
    """Kill the loaders' workers. Returns whether all of them have ended within so many seconds.

    At exit Python sends SIGTERM to child processes and waits for them: for ever, for workers that ignore it. This is
    registered later, so it runs first.
    """
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would report that a worker was killed
    children = [child for child in multiprocessing.active_children() if child.daemon]
    for child in children:
        child.kill()
    end = time.monotonic() + patience
    for child in children:
        child.join(max(0.0, end - time.monotonic()))
    return not any(child.is_alive() for child in children)
