"""A checkpoint is whole or passed over, and nothing whole is lost to make room."""

import errno
import shutil
from pathlib import Path

import pytest
import torch
from common.run import checkpoints

from timm_dseq import UserError

from .. import TRAIN


def saved(step):
    return checkpoints.Saved({"w": torch.full((1000,), float(step))}, {"m": torch.ones(3)}, {"step": step})


def test_what_was_saved_is_what_is_read(tmp_path):
    path = checkpoints.save(tmp_path, 7, saved(7))
    assert path.name == "step-00000007"
    back = checkpoints.load(path)
    assert torch.equal(back.model["w"], torch.full((1000,), 7.0)) and back.state == {"step": 7}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000007"]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("file", "damage", "says"),
    [
        ("model.safetensors", truncate, "bytes instead of"),
        ("model.safetensors", flip, "SHA-256"),
        ("optimizer.safetensors", flip, "SHA-256"),
        ("state.json", truncate, "state.json has"),
        ("optimizer.safetensors", lambda path: path.unlink(), "optimizer.safetensors is missing"),
        ("manifest.json", truncate, "manifest.json is missing or damaged"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_and_said_why(file, damage, says, tmp_path):
    for step in (1, 2):
        checkpoints.save(tmp_path, step, saved(step))
    damage(checkpoints.path_of(tmp_path, 2) / file)
    path, passed_over = checkpoints.newest(tmp_path)
    assert path == checkpoints.path_of(tmp_path, 1)
    assert len(passed_over) == 1 and "step-00000002" in passed_over[0] and says in passed_over[0]
    checkpoints.save(tmp_path, 2, saved(2))  # done again, it takes the place of the damaged one
    assert checkpoints.newest(tmp_path) == (checkpoints.path_of(tmp_path, 2), [])


def test_the_newest_and_every_nth_stay(tmp_path):
    for step in range(1, 11):
        checkpoints.save(tmp_path, step, saved(step))
        checkpoints.prune(tmp_path, keep=2, keep_every=4)
    assert [checkpoints.number(path) for path in checkpoints.steps(tmp_path)] == [4, 8, 9, 10]


def test_a_full_disk_is_named_and_the_earlier_checkpoint_stays(tmp_path, monkeypatch):
    checkpoints.save(tmp_path, 1, saved(1))

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_tensors", full)
    with pytest.raises(UserError, match=r"step-00000002 cannot be written \(No space left on device"):
        checkpoints.save(tmp_path, 2, saved(2))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoints.newest(tmp_path)[0] == checkpoints.path_of(tmp_path, 1)


def test_a_disk_that_is_too_small_is_seen_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(UserError, match="no space left"):
        checkpoints.save(tmp_path, 1, saved(1))
    assert not list(tmp_path.iterdir())


def test_what_a_killed_save_left_is_swept_by_the_next(tmp_path):
    (tmp_path / ".unfinished-00000001").mkdir()
    (tmp_path / ".unfinished-00000001" / "model.safetensors").write_bytes(b"half")
    checkpoints.save(tmp_path, 2, saved(2))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


MEMORY = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
from common.run import checkpoints
from common.run.state import collect, restore

def own_mib():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("RssAnon")]
    return int(line.split()[1]) / 1024

def made():
    torch.manual_seed(0)
    model = torch.nn.ModuleList(torch.nn.Linear(1024, 1024) for _ in range(32))
    return model, torch.optim.AdamW(model.parameters())

folder = Path(sys.argv[2])
model, optimizer = made()
if sys.argv[3] == "save":
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()
    weights, moments = collect(model, optimizer, keep=True)
    checkpoints.save(folder, 1, checkpoints.Saved(weights, moments, {}))
else:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    before = own_mib()
    saved = checkpoints.load(folder / "step-00000001")
    restore(model, optimizer, saved.model, saved.optimizer)
    print(own_mib() - before)
    weights, moments = collect(model, optimizer, keep=True)
    assert all(torch.equal(weights[name], tensor) for name, tensor in saved.model.items())
    assert moments.keys() == saved.optimizer.keys()
    assert all(torch.equal(moments[name], tensor) for name, tensor in saved.optimizer.items())
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells whose memory it is")
def test_a_restore_takes_no_memory_beside_the_runs_own(run_python, tmp_path):
    """384 MiB, of which 256 are moments, which the optimiser holds afterwards: nothing else may be a process's own."""
    for what in ("save", "restore"):
        done = run_python(MEMORY, str(TRAIN), str(tmp_path), what)
        assert done.returncode == 0, done.stderr
    assert 250 < float(done.stdout) < 290
