"""Before torch is loaded: signals amid imports, streams that are closed or know few letters."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ..discovering.scenes import TINY, as_parquet, squares

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


def test_a_data_set_without_a_card_and_one_that_is_read_for_the_first_time_leave_no_words_of_others(tmp_path):
    images, masks, _ = squares(3)
    (tmp_path / "data").mkdir()
    as_parquet(tmp_path / "data" / "test.parquet", images, masks)
    (tmp_path / "data" / "README.md").write_text("Squares.")
    settings = {**TINY, "data.path": tmp_path / "data", "results": tmp_path / "r.jsonl", "pictures": 0}
    words = [f"--{name}={value}" for name, value in settings.items()]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(TRAIN.parent)}
    command = [sys.executable, TRAIN / "discover.py", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0 and done.stderr == "", done.stderr
