"""The end of a run by a signal: asked for, and granted behind a step."""

import signal

STOPPED = 75  # exit code of a run that was asked to stop, and has saved: the same command goes on


class Stop:
    """SIGTERM and SIGINT ask for an end behind the current step; a second one ends at once."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, _frame) -> None:
        self.asked = True
        signal.signal(number, signal.SIG_DFL)


def deaf(_worker: int) -> None:
    """For loader workers: a signal to the whole job is the main process's, which needs them until its step is done."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
