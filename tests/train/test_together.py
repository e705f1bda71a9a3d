"""Processes share their work out, and none waits for what another does alone."""

import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from common.extract import Pictures, digests_of
from common.labelled import Labels, open_labelled
from common.probing import Cache
from torch.multiprocessing import spawn

from .runs import environments, launch, options, said_of
from .tunings import colours


def odd_runs(output, port, odd, processes=2, **settings):
    """Runs of tests/train/odd.py: exit codes, and what they said."""
    arguments = options(output, **settings)
    runs = [launch("tests.train.odd", arguments, output, {**own, **odd}) for own in environments(port, processes)]
    for run in runs:
        run.join(300)
    return [run.exitcode for run in runs], said_of(output).read_text()


def digest(rank, port, folder):
    os.environ |= environments(port, 2)[rank]
    torch.set_num_threads(1)
    read, read_one = [], Pictures.__getitem__
    Pictures.__getitem__ = lambda self, index: (read.append(index), read_one(self, index))[1]
    accelerator = Accelerator()
    source = open_labelled(Labels(path=str(folder / "data"))).train
    found = digests_of(source, 0, Cache(str(folder / "cache")), accelerator)
    first = len(read)
    again = digests_of(source, 0, Cache(str(folder / "cache")), accelerator)
    np.savez(folder / f"{rank}.npz", found=found, again=again, read=read[:first], read_again=len(read) - first)
    dist.destroy_process_group()


def test_each_process_reads_its_share_of_the_images_for_duplicates(tmp_path, unused_port):
    colours(tmp_path / "data", train=63)
    spawn(digest, (unused_port, tmp_path), nprocs=2)
    ours, theirs = (np.load(tmp_path / f"{rank}.npz") for rank in (0, 1))
    source = open_labelled(Labels(path=str(tmp_path / "data"))).train
    alone = digests_of(source, 0, Cache(str(tmp_path / "own")), Accelerator())
    for each in (ours, theirs):
        assert np.array_equal(each["found"], alone) and np.array_equal(each["again"], alone)
        assert each["read_again"] == 0
    assert (len(ours["read"]), len(theirs["read"])) == (32, 31)
    assert sorted([*ours["read"], *theirs["read"]]) == list(range(63))


@pytest.mark.xdist_group("runs")
def test_a_hand_over_may_take_longer_than_processes_wait_for_each_other(tmp_path, unused_port):
    output = tmp_path / "run"
    odd = {"HASTY": "10", "SLOW": "15"}
    codes, said = odd_runs(output, unused_port, odd, max_steps=1, watch__probe_every=0)
    assert codes == [0, 0], said
    assert (output / "export" / "model.safetensors").is_file() and "timm-dseq verify" in said
