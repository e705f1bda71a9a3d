"""Every switch of a device and of a group of processes, in one place."""

import os
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from . import machine

# A process that waits so long waits for one that is gone. Work that one process does alone has to stay far below it.
LONGEST_WAIT = timedelta(hours=1)


def accelerator(**settings) -> Accelerator:
    """accelerate's Accelerator, on a device that is set up for batches of changing shapes."""
    if torch.cuda.is_available():
        # cuDNN makes a plan for every new shape of attention, for up to a second; batches differ in shape.
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.backends.cudnn.benchmark = True  # of the patch embedding, whose shape stays
        torch.set_float32_matmul_precision("high")  # TF32 where float32 is asked for
    # torch has a new name for it, accelerate only the old one
    warnings.filterwarnings("ignore", "`?broadcast_buffers", FutureWarning)
    handlers = [
        InitProcessGroupKwargs(timeout=LONGEST_WAIT),
        # the buffers are constants; gradients need no second copy
        DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
    ]
    made = Accelerator(kwargs_handlers=handlers, **settings)
    if made.device.type == "cpu" and (threads := machine.threads()):
        torch.set_num_threads(threads)
    return made


def exit_with(main: Callable[[], int]) -> NoReturn:
    """Run a script's `main` and exit with its code.

    Every launcher prints a traceback of its own where that is not 0, and a script has no way to tell it not to: so a
    line says above it what it is.
    """
    try:
        code = main()
    except SystemExit as end:  # a misspelt setting, or --help
        code = end.code
    launcher = machine.launcher()
    if code and launcher and os.environ.get("RANK", "0") == "0":
        mend = "; --quiet leaves it out" if launcher == "accelerate launch" else ""
        line = f"({launcher} prints a traceback for every exit code but 0, also for {code}{mend})"
        print(line, file=sys.stderr, flush=True)
    sys.exit(code)


def described(accelerator: Accelerator) -> str:
    """What a run computes on."""
    device, processes = accelerator.device, accelerator.num_processes
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        count = torch.get_num_threads()
        name = f"{device.type} with {count} thread{'s' * (count > 1)}"
    return name if processes == 1 else f"{processes} processes, each {name}"


def wait(device: torch.device) -> None:
    """Until the device has done all it was given: before a clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
