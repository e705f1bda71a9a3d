"""Workers are as many as a process has cores, and a /dev/shm that is too small for them is told with the mend."""

import shutil

import pytest
from common.pretraining import settings as pretraining
from common.probing import settings as probing
from common.system import machine
from common.tuning import settings as tuning

from ..probes import options as probe_options
from ..tunings import options as tuning_options


@pytest.mark.parametrize(
    ("cores", "processes", "workers"), [(2, "1", 2), (96, "8", 12), (96, "1", 16), (4, "8", 1), (1, "1", 1)]
)
def test_workers_are_the_cores_of_the_process(cores, processes, workers, monkeypatch, tmp_path):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: range(cores))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert machine.workers(None) == workers and machine.workers(0) == 0 and machine.workers(40) == 40
    assert pretraining.parse(["--model.img_size=224", "--data.workers=null"])[0].data.workers == workers
    assert pretraining.parse(["--data.workers=3"])[0].data.workers == 3
    assert tuning.parse(tuning_options(tmp_path, tmp_path, workers=None))[0].workers == workers
    assert probing.parse(probe_options(tmp_path, tmp_path, workers=None)).workers == workers
    assert probing.parse(probe_options(tmp_path, tmp_path, workers=3)).workers == 3


@pytest.mark.parametrize(
    ("told", "processes", "threads"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1"}, "1", 8),  # accelerate's own 1
        ({"TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "1"}, "4", 2),  # torchrun's
        ({"TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "1"}, "32", 1),
        ({"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "3"}, "1", None),  # the user's
        ({"OMP_NUM_THREADS": "1"}, "1", None),  # the user's, without a launcher
        ({}, "1", None),
    ],
)
def test_the_one_thread_that_launchers_leave_becomes_a_share_of_the_cores(told, processes, threads, monkeypatch):
    for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**told, "LOCAL_WORLD_SIZE": processes}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: range(16))
    monkeypatch.setattr(machine.psutil, "cpu_count", lambda logical: 8)
    assert machine.threads() == threads


def test_a_shared_memory_that_is_too_small_is_told_with_the_mend(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "_SHARED", tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**26, 0, 2**26))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    line = machine.short_of_memory(12, 256 * 3 * 224**2)
    assert "fill 7056 MiB" in line and "has 64 free" in line and "--shm-size=7g" in line and "\n" not in line
    assert machine.short_of_memory(0, 2**30) is None  # no worker, nothing to hand over
    assert machine.short_of_memory(1, 2**22) is None  # it fits, just
    monkeypatch.setattr(machine, "_SHARED", tmp_path / "nowhere")
    assert machine.short_of_memory(12, 2**30) is None
