"""A disk that is too small is named before a run begins; what a run has there already is counted."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from common.run import checkpoints, room

from timm_dseq import UserError

from ..runs import tensors_of, train

MIB = 2**20


@pytest.fixture
def disk(monkeypatch):
    """A disk with so much room."""

    def make(free):
        monkeypatch.setattr(room.shutil, "disk_usage", lambda place: SimpleNamespace(free=free))

    return make


@pytest.fixture
def trained():
    """One MiB of weights, of which half is trained."""
    model = torch.nn.ModuleDict({name: torch.nn.Linear(512, 256, bias=False) for name in ("student", "target")})
    return model, torch.optim.AdamW(model["student"].parameters())


@pytest.mark.parametrize(("keep", "needed"), [(1, 5 * MIB), (2, 7 * MIB), (10, 23 * MIB)])
def test_what_is_needed_is_every_checkpoint_that_stays_one_more_and_the_export(keep, needed, disk, trained, tmp_path):
    disk(needed)
    room.check_room(tmp_path / "run", tmp_path / "run/checkpoints", *trained, keep)
    disk(needed - 1)
    with pytest.raises(UserError, match=rf"has room for {needed // MIB} MiB, and {keep + 1} checkpoints .* take"):
        room.check_room(tmp_path / "run", tmp_path / "run/checkpoints", *trained, keep)


def test_checkpoints_that_are_there_take_no_more_room(disk, trained, tmp_path):
    checkpoints.save(tmp_path, 3, checkpoints.Saved({"w": torch.zeros(MIB // 4)}, {}, {}))
    disk(6 * MIB)
    room.check_room(tmp_path, tmp_path, *trained, keep=2)
    shutil.rmtree(tmp_path / "step-00000003")
    with pytest.raises(UserError, match="lower checkpoint"):
        room.check_room(tmp_path, tmp_path, *trained, keep=2)


@pytest.mark.xdist_group("runs")
def test_a_run_asks_before_it_writes_and_so_does_its_dry_run(tmp_path):
    code, said = train(tmp_path / "whole", max_steps=1, watch__probe_every=0)
    assert code == 0, said
    taken = sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(tmp_path / "whole").values())
    keep = 2 * shutil.disk_usage(tmp_path).free // taken
    for dry_run in ("false", "true"):
        code, said = train(tmp_path / "run", checkpoint__keep=keep, dry_run=dry_run)
        assert code == 1 and "lower checkpoint.keep" in said and "Traceback" not in said, said
        assert not (tmp_path / "run" / "config.yaml").exists()
