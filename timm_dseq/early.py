"""What the `timm-dseq` command does before torch is loaded, which takes seconds. Other programs are left alone.

Recipes are entered at once, and Ctrl-C is one line instead of a long traceback.
"""

import os
import signal
import sys
from pathlib import Path

from .recipes import RECIPES, enter


def _stopped(_number: int, _frame: object) -> None:
    os.write(2, b"timm-dseq: stopped before it began\n")
    os._exit(130)


def ready() -> None:
    """From here on the command answers an interruption itself."""
    if signal.getsignal(signal.SIGINT) is _stopped:
        signal.signal(signal.SIGINT, signal.default_int_handler)


_MODULE = sys.argv[0] == "-m" and "-m timm_dseq" in " ".join(sys.orig_argv)  # python -m timm_dseq
if _MODULE or Path(sys.argv[0]).stem in ("timm-dseq", "timm-dseq-script"):
    if sys.argv[1:] and sys.argv[1] in RECIPES:
        sys.exit(enter(sys.argv[1], sys.argv[2:]))
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and nobody had it ignored
        signal.signal(signal.SIGINT, _stopped)
