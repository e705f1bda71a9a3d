"""Ctrl-C while the `timm-dseq` command still loads torch, which takes seconds: one line instead of a long traceback.

A program that imports this package is left alone.
"""

import os
import signal
import sys
from pathlib import Path


def _stopped(_number: int, _frame: object) -> None:
    os.write(2, b"timm-dseq: stopped before it began\n")
    os._exit(130)


def ready() -> None:
    """From here on the command answers an interruption itself."""
    if signal.getsignal(signal.SIGINT) is _stopped:
        signal.signal(signal.SIGINT, signal.default_int_handler)


_OURS = Path(sys.argv[0]).stem in ("timm-dseq", "timm-dseq-script")
if _OURS and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and nobody had it ignored
    signal.signal(signal.SIGINT, _stopped)
