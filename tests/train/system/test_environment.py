"""Before torch is loaded: signals amid imports, streams that are closed or know few letters."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TRAIN = Path(__file__).parents[3] / "train"


@pytest.mark.parametrize("script", ["pretrain.py", "probe.py", "finetune.py", "table.py"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_amid_the_imports_is_one_line(script, number):
    process = subprocess.Popen([sys.executable, TRAIN / script, "--help"], stderr=subprocess.PIPE, text=True)
    handles = Path(f"/proc/{process.pid}/status")
    end = time.monotonic() + 60
    while not int(handles.read_text().split("SigCgt:")[1].split()[0], 16) & 1 << (signal.SIGUSR1 - 1):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.002)
    os.kill(process.pid, number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75 and said == f"{script}: stopped before it began.\n", said


def test_a_terminal_of_few_letters_and_one_that_is_closed(tmp_path):
    results = tmp_path / "results.jsonl"
    results.write_text("")
    for words in (["PYTHONIOENCODING=ascii", sys.executable], [sys.executable]):
        command = f"{' '.join(map(str, words))} {TRAIN / 'table.py'} {results} >&-"
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120)
        assert "Traceback" not in done.stderr and "fault of ours" not in done.stderr, done.stderr
    code = (
        "import sys; sys.path.insert(0, 'train'); from common.system.screen import Screen; Screen(1, 0, True).say('x')"
    )
    done = subprocess.run(
        ["sh", "-c", f'{sys.executable} -c "{code}" >&-'],
        cwd=TRAIN.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
