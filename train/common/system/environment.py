"""What has to be settled before torch is loaded, which takes seconds: scripts import this file first."""

import io
import logging
import os
import signal
import sys
from pathlib import Path

# By default OpenMP's threads spin while they wait, and take the cores from the loader's workers.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Every batch has another number of tokens: segments that can grow keep the GPU's memory from fragmentation.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

for _stream in (sys.stdout, sys.stderr):
    if isinstance(_stream, io.TextIOWrapper):  # a terminal that knows few letters shows the others as "?"
        _stream.reconfigure(errors="replace")


# What other libraries say of themselves: a data set without a card is none the worse for it, and a bar in a file, where
# it cannot move, is a line for each of its steps.
logging.getLogger("huggingface_hub.repocard").setLevel(logging.ERROR)
if sys.stderr is None or not sys.stderr.isatty():
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def _stopped(_number: int, _frame) -> None:
    """Nothing has begun yet: a KeyboardInterrupt amid imports would be a long traceback."""
    os.write(2, f"{Path(sys.argv[0]).name}: stopped before it began.\n".encode())
    os._exit(75)


if Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parents[2]:  # one of our scripts, not a test
    for _name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, _name):
            signal.signal(getattr(signal, _name), _stopped)
