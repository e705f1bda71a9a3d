"""Workers that never come back, as when their disk has gone: the run ends, and its process with it."""

import multiprocessing
import os
import re
import signal
import time

import numpy as np
import psutil
import pytest
from common.data import loading
from common.system import signals
from PIL import Image
from torch.utils.data import Dataset

from timm_dseq import UserError

from .. import runs


class Stuck(Dataset):
    """The third number never comes."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 2:
            time.sleep(3600)
        return index


def pretrain_on_a_disk_that_goes(gone, arguments, said):
    """A run whose workers hang in each read as soon as there is a file `gone`."""
    from common.data import decoded

    def measure(value, measure=decoded.measure):
        while gone.exists():
            time.sleep(1)
        return measure(value)

    decoded.measure = measure
    runs.child("pretrain", arguments, said, {})


def photos(folder, count=16):
    """A data set of images of noise."""
    (folder / "train").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        noise = rng.integers(0, 255, (48, 48, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "train" / f"{number}.png")
    return folder


def test_patience_has_an_end(monkeypatch):
    monkeypatch.setattr(loading, "LOOK", 0.5)
    monkeypatch.setattr(loading, "PATIENCE", 1.0)
    batches = loading.loaded(Stuck(), batch_size=1, num_workers=1)
    begun = time.monotonic()
    assert [next(batches).item(), next(batches).item()] == [0, 1]
    with pytest.raises(UserError, match=r"no image has arrived for 1 s.*data\.path"):
        next(batches)
    assert time.monotonic() - begun < 20 and not multiprocessing.active_children()


def test_a_slow_batch_is_waited_for(monkeypatch):
    monkeypatch.setattr(loading, "LOOK", 0.1)
    monkeypatch.setattr(time, "sleep", lambda _seconds, sleep=time.sleep: sleep(0.5))  # the workers are forks
    assert sorted(batch.item() for batch in loading.loaded(Stuck(), batch_size=1, num_workers=1)) == [*range(8)]


@pytest.mark.slow
@pytest.mark.xdist_group("runs")
def test_a_signal_ends_a_run_whose_worker_is_stuck_within_thirty_seconds(tmp_path):
    output, gone = tmp_path / "run", tmp_path / "gone"
    settings = {"data__path": photos(tmp_path / "photos"), "data__workers": 2, "optim__epochs": 1000}
    arguments = runs.options(output, **settings, watch__probe_every=0)
    process = runs.FORKS.Process(target=pretrain_on_a_disk_that_goes, args=(gone, arguments, runs.said_of(output)))
    process.start()
    while not re.search(r'"step": 5\b', (output / "log.jsonl").read_text() if (output / "log.jsonl").exists() else ""):
        assert process.is_alive(), runs.said_of(output).read_text()
        time.sleep(0.05)
    workers = psutil.Process(process.pid).children()
    assert workers
    gone.touch()
    time.sleep(1)
    asked = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    said = runs.said_of(output).read_text()
    assert process.exitcode == 1 and time.monotonic() - asked < 30, said
    assert re.search(r"pretrain.py: no image has arrived for \d+ s", said.splitlines()[-1]), said
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)


def test_a_worker_that_not_even_sigkill_ends_is_not_waited_for(monkeypatch):
    class Undead:
        daemon, killed = True, False

        def kill(self):
            self.killed = True

        def join(self, seconds):
            time.sleep(min(seconds, 0.1))

        def is_alive(self):
            return True

    undead = Undead()
    monkeypatch.setattr(multiprocessing, "active_children", lambda: [undead])
    assert not signals.end_workers(patience=0.1) and undead.killed
