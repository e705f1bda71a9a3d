"""The commands that users type, as they type them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from common.system import launch

from ..runs import options

SCRIPT = Path(__file__).parents[3] / "train" / "pretrain.py"


@pytest.mark.slow
@pytest.mark.xdist_group("runs")
@pytest.mark.parametrize(
    "launcher",
    [
        ["accelerate.commands.launch", "--cpu", "--num_processes", "1"],
        ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", "{port}"],
    ],
    ids=["accelerate, one process", "torchrun, two"],
)
def test_a_run_begins_under_each_launcher(launcher, tmp_path, unused_port):
    launcher = [part.format(port=unused_port) for part in launcher]
    ours = options(tmp_path / "run", max_steps=2, watch__probe_every=0, system__precision="auto")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if torch.cuda.is_available():
        environment["ACCELERATE_USE_CPU"] = "true"  # without a GPU it goes without saying
    done = subprocess.run(
        [sys.executable, "-m", *launcher, str(SCRIPT), *ours],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2]
    assert done.stdout.count("ready for the Hub") == 1  # one process speaks
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()
    cores = min(len(os.sched_getaffinity(0)), psutil.cpu_count(logical=False) or 1)
    threads = max(1, cores // (2 if "torch.distributed.run" in launcher else 1))
    assert f"cpu with {threads} thread" in done.stdout  # and not the one that launchers leave


@pytest.mark.xdist_group("runs")
def test_processes_that_do_not_come_about_are_not_made_do_without(tmp_path):
    launcher = ["accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command = [sys.executable, "-m", *launcher, str(SCRIPT), *options(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 1
    assert "pretrain.py: 2 processes were asked for and 1 came about: start them by torchrun" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.xdist_group("runs")
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_a_launcher_that_is_ended_leaves_a_checkpoint_and_no_orphan(number, tmp_path):
    output = tmp_path / "run"
    ours = options(output, optim__epochs=9, checkpoint__every=100_000, watch__probe_every=0)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", str(SCRIPT), *ours]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path)
    while not (output / "log.jsonl").exists():
        assert launcher.poll() is None
        time.sleep(0.05)
    (child,) = psutil.Process(launcher.pid).children()
    launcher.send_signal(number)
    launcher.wait(30)
    child.wait(30)
    (checkpoint,) = (output / "checkpoints").iterdir()
    last = json.loads((output / "log.jsonl").read_text().splitlines()[-1])["step"]
    assert checkpoint.name == f"step-{last:08d}" and last < 9000
    assert not (output / ".lock").exists()
    launcher.stdout.close()


ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no"}
TORCHRUN = {**ACCELERATE, "TORCHELASTIC_RUN_ID": "x"}
FOR_EVERY = "prints a traceback for every exit code but 0, also for"


@pytest.mark.parametrize(
    ("environment", "code", "line"),
    [
        (ACCELERATE, 75, f"accelerate launch {FOR_EVERY} 75; --quiet leaves it out"),
        (ACCELERATE, 0, ""),
        ({**TORCHRUN, "RANK": "0"}, 1, f"torchrun {FOR_EVERY} 1"),
        ({**TORCHRUN, "RANK": "1"}, 1, ""),  # one process speaks
        ({}, 75, ""),  # without a launcher there is no traceback
    ],
)
def test_a_line_explains_the_traceback_that_a_launcher_prints(environment, code, line, monkeypatch, capsys):
    for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for ending in (lambda: code, lambda: sys.exit(code)):
        with pytest.raises(SystemExit) as end:
            launch.exit_with(ending)
        assert end.value.code == code
        assert capsys.readouterr().err == (f"({line})\n" if line else "")


@pytest.mark.slow
def test_the_line_stands_between_the_message_and_the_traceback(tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", str(SCRIPT)]
    done = subprocess.run([*command, "--optim.lr=abc"], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 1
    message, line, traceback = (
        done.stderr.index(part) for part in ("pretrain.py: optim.lr takes", "(accelerate launch prints", "Traceback")
    )
    assert message < line < traceback
