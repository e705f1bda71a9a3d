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
from common.system import last_line, launch

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


@pytest.mark.parametrize(
    ("environment", "code", "said", "line"),
    [
        (ACCELERATE, 75, None, "accelerate launch: test.py: stopped and saved: the same command goes on"),
        (ACCELERATE, 1, "test.py: x is wrong", "accelerate launch: test.py: x is wrong"),
        (ACCELERATE, 0, None, None),
        ({**TORCHRUN, "RANK": "0"}, 1, "test.py: x is wrong", "torchrun: test.py: x is wrong"),
        ({**TORCHRUN, "RANK": "1"}, 1, "test.py: x is wrong", None),  # one process speaks
        ({}, 75, None, None),  # without a launcher there is no traceback
    ],
)
def test_what_was_said_is_said_again_behind_a_launchers_traceback(environment, code, said, line, monkeypatch):
    again = []
    for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train/test.py"])
    monkeypatch.setattr(last_line, "_said", "")
    monkeypatch.setattr(
        launch, "repeat_behind", lambda launcher, otherwise: again.append(f"{launcher}: {last_line._said or otherwise}")
    )

    def main():
        if said:
            last_line.complain(said)
        return code

    for ending in (main, lambda: sys.exit(main())):
        with pytest.raises(SystemExit) as end:
            launch.exit_with(ending)
        assert end.value.code == code
    assert again == ([line] * 2 if line else [])


@pytest.mark.slow
@pytest.mark.parametrize("way", ["accelerate", "torchrun"])
def test_our_line_is_the_last_under_a_launcher(way, tmp_path):
    module = {
        "accelerate": ["accelerate.commands.launch", "--cpu", "--num_processes", "1"],
        "torchrun": ["torch.distributed.run", "--nproc_per_node", "1"],
    }[way]
    command = [sys.executable, "-m", *module, str(SCRIPT), "--optim.lr=abc"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" in done.stderr
    last = done.stderr.rstrip().splitlines()[-1]
    assert last.startswith("pretrain.py: optim.lr takes") and "prints one for every exit code but 0)" in last, last
