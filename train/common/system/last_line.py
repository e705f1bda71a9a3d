"""What a program says when it fails, as the last line that its user reads, also where a launcher has the last word.

`accelerate launch` and torchrun print a traceback of their own behind the line of a process that failed. So the line is
said once more, when they have gone.
"""

import os
import subprocess
import sys

_said = ""
_REPEAT = """
import os, sys, time
launcher, line, end = int(sys.argv[1]), sys.argv[2], time.monotonic() + 30
try:
    while time.monotonic() < end:
        os.kill(launcher, 0)
        time.sleep(0.02)
except OSError:
    pass
try:
    print(line, file=sys.stderr, flush=True)
except OSError:
    pass
"""


def complain(line: str) -> None:
    """Print why a program fails."""
    global _said
    _said = line
    print(line, file=sys.stderr, flush=True)


def repeat_behind(launcher: str, otherwise: str) -> None:
    """When the launcher, this process's parent, has ended: the line that was said last, or `otherwise`."""
    line = f"{_said or otherwise} (the traceback is of {launcher}, which prints one for every exit code but 0)"
    words = [sys.executable, "-S", "-E", "-c", _REPEAT, str(os.getppid()), line]
    subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
