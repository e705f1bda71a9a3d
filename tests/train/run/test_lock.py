"""One run in a folder: a second one is refused by name, and whatever ends the first one frees the folder."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from accelerate import Accelerator
from common.run import lock
from common.run.lock import locked

from timm_dseq import UserError

from ..runs import FORKS, log_of, said_of, start, train

pytestmark = pytest.mark.xdist_group("runs")


def _hold(folder, ready, child=False):
    with locked(folder, Accelerator(cpu=True)):
        if child:  # as a loader's worker, which lives on for a while
            worker = os.fork()
            if worker == 0:
                time.sleep(60)
                os._exit(0)
            ready.put(worker)
        ready.put("held")
        time.sleep(60)


def holder(folder, child=False):
    """A process that holds the folder, and what it says."""
    ready = FORKS.Queue()
    process = FORKS.Process(target=_hold, args=(folder, ready, child))
    process.start()
    return process, ready


def test_a_second_run_is_refused_with_the_first_one_named(tmp_path):
    process, ready = holder(tmp_path / "run")
    ready.get(timeout=60)
    with (
        pytest.raises(UserError, match=rf"run is in use by another run \(process {process.pid} on .*, since 20"),
        locked(tmp_path / "run", Accelerator(cpu=True)),
    ):
        pass
    process.kill()
    process.join()


def test_a_kill_frees_the_folder_at_once_though_a_child_lives_on(tmp_path):
    process, ready = holder(tmp_path / "run", child=True)
    worker = ready.get(timeout=60)
    ready.get(timeout=60)
    process.kill()
    process.join()
    begun = time.monotonic()
    try:
        with locked(tmp_path / "run", Accelerator(cpu=True)):
            assert time.monotonic() - begun < 1
            assert json.loads((tmp_path / "run" / lock.NAME).read_text())["process"] == os.getpid()
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_folder_that_was_made_for_nothing_is_gone_and_others_stay(tmp_path):
    with locked(tmp_path / "new", Accelerator(cpu=True)):
        assert (tmp_path / "new" / lock.NAME).exists()
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with locked(tmp_path / "old", Accelerator(cpu=True)):
        pass
    assert not [*(tmp_path / "old").iterdir()]
    with locked(tmp_path / "not at all", Accelerator(cpu=True), wanted=False):
        assert not (tmp_path / "not at all").exists()


def elsewhere(folder, beat):
    """The mark of a run on another host, which has no lock that is seen here."""
    folder.mkdir(exist_ok=True)
    owner = {"host": "elsewhere", "process": 7, "since": "2026-01-01", "beat": beat}
    with (folder / lock.NAME).open("r+b" if (folder / lock.NAME).exists() else "wb") as file:
        file.write(json.dumps(owner).encode().ljust(400))


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(lock, "WATCHED", 1.0)


def test_a_run_on_another_host_is_known_by_its_beat(tmp_path, impatient):
    folder, over = tmp_path / "run", threading.Event()

    def beats():
        beat = 0
        while not over.wait(0.05):
            elsewhere(folder, beat := beat + 1)

    elsewhere(folder, 0)
    thread = threading.Thread(target=beats)
    thread.start()
    try:
        with (
            pytest.raises(UserError, match="process 7 on elsewhere"),
            locked(folder, Accelerator(cpu=True)),
        ):
            pass
    finally:
        over.set()
        thread.join()


def test_one_that_died_on_another_host_is_waited_for_and_followed(tmp_path, impatient, capsys):
    elsewhere(tmp_path / "run", 3)
    with locked(tmp_path / "run", Accelerator(cpu=True)):
        assert json.loads((tmp_path / "run" / lock.NAME).read_text())["host"] != "elsewhere"
    assert "was last in use on elsewhere: waiting" in capsys.readouterr().out


def test_the_holder_shows_that_it_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    with locked(tmp_path / "run", Accelerator(cpu=True)):
        text = Path(tmp_path / "run" / lock.NAME).read_text
        # this process may not open and close the file itself: that would give the lock back
        process = FORKS.Process(target=_changes, args=(tmp_path / "run" / lock.NAME,))
        process.start()
        process.join(60)
        assert process.exitcode == 0, text


def _changes(path):
    first, end = path.read_text(), time.monotonic() + 20
    while path.read_text() == first:
        if time.monotonic() > end:
            raise SystemExit(1)
        time.sleep(0.05)


def test_two_runs_at_once_in_one_folder_are_one_run(tmp_path):
    output = tmp_path / "run"
    first = start(output)
    while not (output / "log.jsonl").exists():
        assert first.is_alive(), said_of(output).read_text()
        time.sleep(0.02)
    second = start(output)
    second.join(120)
    assert second.exitcode == 1
    assert "is in use by another run" in said_of(output).read_text()
    first.join(300)
    assert first.exitcode == 0
    train(tmp_path / "alone")
    assert log_of(output) == log_of(tmp_path / "alone")
    assert not (output / lock.NAME).exists()
