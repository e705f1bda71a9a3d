"""Signals: a run stops behind a step, and one to a whole job leaves loader workers alone wherever images are loaded."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from common.data.digests import digests_of
from common.system.signals import NUMBERS
from common.tuning.evaluation import correct_answers
from PIL import Image

from ..runs import said_of, start

TRAIN = Path(__file__).parents[3] / "train"
DATA = {"input_size": (3, 8, 8), "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}


class Signalled:
    """Two images; the loader's worker gets every signal while it reads them."""

    name, truth, label = "test", torch.zeros(2, dtype=torch.int64), "label"
    revision = ""
    main = os.getpid()

    def __len__(self):
        return 2

    def picture(self, index):
        assert os.getpid() != self.main
        for number in NUMBERS:
            os.kill(os.getpid(), number)
        return Image.new("RGB", (8, 8))

    def fingerprint(self):
        return "signalled"


def test_the_judgement_of_a_classifier_goes_on():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
    assert correct_answers(model, Signalled(), DATA, Accelerator(cpu=True), workers=1).shape == (2,)


def test_the_search_for_duplicates_goes_on(tmp_path):
    assert digests_of(Signalled(), 1, str(tmp_path), Accelerator(cpu=True)).shape == (2, 16)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_second_signal_ends_at_once_but_not_when_it_is_an_echo(run_python, number):
    code = """
import os, sys, time
from common.system import signals as stop
asked, number = stop.Stop(), int(sys.argv[1])
os.kill(os.getpid(), number)
assert asked.asked
os.kill(os.getpid(), number)
print("alive", flush=True)
later = time.monotonic() + stop.ECHO
stop.time = type("Clock", (), {"monotonic": lambda: later + 0.1})
os.kill(os.getpid(), number)
print("still alive", flush=True)
"""
    done = run_python(code, str(int(number)), PYTHONPATH=str(TRAIN))
    assert (done.returncode, done.stdout) == (-number, "alive\n"), done.stderr


@pytest.mark.parametrize("end", ["pass", "raise RuntimeError", "sys.exit(3)"])
def test_a_process_ends_though_something_still_holds_its_workers(end):
    code = f"""
import sys
import time
sys.path.insert(0, "train")
from common.system.signals import ignore_signals
from torch.utils.data import DataLoader
held = iter(DataLoader(range(100), num_workers=2, worker_init_fn=ignore_signals))
next(held)
{end}
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=TRAIN.parent, timeout=60, capture_output=True)
    assert done.returncode == {"pass": 0, "raise RuntimeError": 1, "sys.exit(3)": 3}[end]


def test_an_interruption_that_python_ignores_is_no_signal_lost(run_python):
    """What is raised in __del__, or in what runs after a fork, is printed and forgotten."""
    code = """
import os
import signal
from common.system import signals

class Signalled:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)

signals.interruptible()
Signalled()
print(signals.Stop().asked)
signals.interruptible()
print(signals.Stop().asked)
"""
    done = run_python(code, PYTHONPATH=str(TRAIN))
    assert done.stdout == "True\nFalse\n" and "Exception ignored" in done.stderr, done.stderr


def test_an_echo_does_not_interrupt_the_clean_up_and_a_later_signal_does(run_python):
    code = """
import os
import signal
from common.system import signals

signals.interruptible()
for moment in (100.0, 100.1, 104.0, 106.0):
    signals.time = type("Clock", (), {"monotonic": lambda: moment})
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        print("no", end=" ")
    except signals.Interrupted:
        print("yes", end=" ")
"""
    done = run_python(code, PYTHONPATH=str(TRAIN))
    assert done.stdout == "yes no no yes ", done.stderr


@pytest.mark.xdist_group("runs")
@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_before_the_first_step_ends_with_one_line_and_75(number, tmp_path):
    """While the file of pixels is built by workers."""
    output = tmp_path / "run"
    process = start(output, data__resident="true", data__cache=tmp_path / "cache", data__workers=1)
    while not list(tmp_path.glob("cache/*.marks")) or not any(next(tmp_path.glob("cache/*.marks")).read_bytes()):
        assert process.is_alive()
        time.sleep(0.02)
    os.kill(process.pid, number)
    process.join(60)
    said = said_of(output).read_text()
    assert process.exitcode == 75 and "Traceback" not in said, said
    assert said.splitlines()[-1] == "pretrain.py: stopped amid its preparations: the same command goes on."
