"""Every switch of a device and of a group of processes, in one place."""

import os
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from timm_dseq import UserError
from timm_dseq.errors import one_line

from . import machine
from .last_line import complain, repeat_behind
from .signals import STOPPED, Interrupted, end_with_parent, end_workers, interruptible, usual

# After so long a wait a process takes another one for dead. What one process does alone has to take far less.
LONGEST_WAIT = timedelta(hours=1)


def accelerator(**settings) -> Accelerator:
    """accelerate's Accelerator, on a device that is set up for batches whose shapes change."""
    if torch.cuda.is_available():
        # cuDNN spends up to a second on a plan for every new shape of attention, and every batch has a new one.
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.backends.cudnn.benchmark = True  # for the patch embedding, whose shape does not change
        torch.set_float32_matmul_precision("high")  # TF32 where float32 is asked for
    # torch has renamed this argument, accelerate still gives the old name
    warnings.filterwarnings("ignore", "`?broadcast_buffers", FutureWarning)
    handlers = [
        InitProcessGroupKwargs(timeout=LONGEST_WAIT),
        # the buffers are constants, so they need no broadcast; gradients need no second copy
        DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
    ]
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and not torch.accelerator.is_available():
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # or each process would be a run of its own
    made = Accelerator(kwargs_handlers=handlers, **settings)
    asked = max(world, machine.processes_asked())
    if asked != made.num_processes:
        raise UserError(
            f"{asked} processes were asked for and {made.num_processes} came about: start them by torchrun "
            f"--nproc_per_node {asked}, or ask for {made.num_processes}."
        )
    if machine.launcher():
        end_with_parent()
    if made.device.type == "cpu" and (threads := machine.threads()):
        torch.set_num_threads(threads)
    return made


def answer(program: str, parse: Callable[[], tuple[Any, str]], run: Callable[[Any, str], int]) -> int:
    """The exit code of a program that trains: what `run` returns, 1 for an error, 75 for a signal before step 1.

    parse: gives the settings, `output_dir` among them, and the same as YAML.
    """
    config = None
    try:
        config, text = parse()
        interruptible()
        return run(config, text)
    except Interrupted:
        complain(f"{program}: stopped amid its preparations: the same command goes on.")
        return STOPPED
    except Exception as error:
        complain(f"{program}: {one_line(error, config and config.output_dir)}")
        return 1


def answer_of(program: str, run: Callable[[], int], stopped: str = "") -> int:
    """The exit code of a program that trains no backbone: what `run` returns, 1 for an error, 130 for Ctrl-C.

    stopped: what is said then.
    """
    try:
        usual()
        return run()
    except KeyboardInterrupt:
        complain(" ".join(filter(None, [f"{program}: stopped.", stopped])))
        return 130
    except Exception as error:
        complain(f"{program}: {one_line(error)}")
        return 1


def exit_with(main: Callable[[], int]) -> NoReturn:
    """Run a script's `main` and exit with its code.

    If the code is not 0, launchers print a traceback of their own, which a script cannot prevent.
    """
    try:
        code = main()
    except SystemExit as end:  # a misspelt setting, or --help
        code = end.code
    launcher = machine.launcher()
    if code and launcher and os.environ.get("RANK", "0") == "0":
        stopped = "stopped and saved: the same command goes on" if code == STOPPED else "the run has failed"
        repeat_behind(launcher, f"{Path(sys.argv[0]).name}: {stopped}")
    if not end_workers():  # not even by SIGKILL, as when their disk has gone: Python would wait for them
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def described(accelerator: Accelerator) -> str:
    """The hardware of a run, in words."""
    device, processes = accelerator.device, accelerator.num_processes
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        count = torch.get_num_threads()
        name = f"{device.type} with {count} thread{'s' * (count > 1)}"
    return f"1 process, {name}" if processes == 1 else f"{processes} processes, each {name}"


def wait(device: torch.device) -> None:
    """Wait until the device has done all it was given, as before a clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
