"""Processes share their work out, and none waits for what another does alone."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from common.data.digests import Pictures, digests_of
from common.labels.labelled import open_labelled
from common.labels.settings import Labels
from common.pretraining.model import build
from common.pretraining.settings import parse
from safetensors.torch import load_file
from torch.multiprocessing import spawn

from ..runs import environments, launch, log_of, options, said_of, train, train_together
from ..tunings import colours


def runs_under(conditions, output, port, processes=2, **settings):
    """A run of several processes under tests/train/conditions.py: exit codes, and what they said."""
    arguments = options(Path(output.name) if "NODES" in conditions else output, **settings)
    script = "tests.train.conditions"
    runs = [launch(script, arguments, output, {**own, **conditions}) for own in environments(port, processes)]
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
    found = digests_of(source, 0, str(folder / "cache"), accelerator)
    first = len(read)
    again = digests_of(source, 0, str(folder / "cache"), accelerator)
    np.savez(folder / f"{rank}.npz", found=found, again=again, read=read[:first], read_again=len(read) - first)
    dist.destroy_process_group()


@pytest.mark.slow
def test_each_process_reads_its_share_of_the_images_for_duplicates(tmp_path, unused_port):
    colours(tmp_path / "data", train=63)
    spawn(digest, (unused_port, tmp_path), nprocs=2)
    ours, theirs = (np.load(tmp_path / f"{rank}.npz") for rank in (0, 1))
    source = open_labelled(Labels(path=str(tmp_path / "data"))).train
    alone = digests_of(source, 0, str(tmp_path / "own"), Accelerator())
    for each in (ours, theirs):
        assert np.array_equal(each["found"], alone) and np.array_equal(each["again"], alone)
        assert each["read_again"] == 0
    assert (len(ours["read"]), len(theirs["read"])) == (32, 31)
    assert sorted([*ours["read"], *theirs["read"]]) == list(range(63))


@pytest.mark.slow
@pytest.mark.xdist_group("runs")
def test_a_hand_over_may_take_longer_than_processes_wait_for_each_other(tmp_path, unused_port):
    output = tmp_path / "run"
    conditions = {"LONGEST_WAIT": "10", "EXPORT_TAKES": "15"}
    codes, said = runs_under(conditions, output, unused_port, max_steps=1, watch__probe_every=0)
    assert codes == [0, 0], said
    assert (output / "export" / "model.safetensors").is_file() and "timm-dseq verify" in said


PROBED = {"system__precision": "float64", "max_steps": 1, "watch__probe_images": 17, "watch__pictures_every": 1}


@pytest.mark.xdist_group("runs")
@pytest.mark.slow
def test_probes_of_two_processes_say_what_those_of_one_say(tmp_path, unused_port):
    """17 images: one process has more than the other, and is filled up."""
    code, said = train(tmp_path / "alone", **PROBED)
    assert code == 0, said
    codes, said = train_together(tmp_path / "together", unused_port, system__fsdp="true", **PROBED)
    assert codes == [0, 0], said
    (ours,), (theirs,) = log_of(tmp_path / "together"), log_of(tmp_path / "alone")
    for look in ("probe_before", "probe"):
        for mine, other in ((ours[look], theirs[look]), (ours[look].pop("student"), theirs[look].pop("student"))):
            figures = {name: value for name, value in mine.items() if name != "student"}
            assert figures == pytest.approx({name: other[name] for name in figures}, rel=1e-4), look
    assert said.count("after step 0: kNN") == said.count("after step 1: kNN") == 1
    pictures = [sorted((tmp_path / run / "pictures").iterdir()) for run in ("together", "alone")]
    assert [path.name for path in pictures[0]] == ["step-00000000.png", "step-00000001.png"]
    assert [path.read_bytes() for path in pictures[0]] == [path.read_bytes() for path in pictures[1]]


# What train/configs/vit_h16_448_in1k.yaml asks for, tiny.
HUGE = {
    "system__precision": "bf16",
    "system__fsdp": "true",
    "system__checkpointing": "true",
    "optim__accumulation": 2,
    "max_steps": 6,
    "watch__probe_every": 3,
    "watch__pictures_every": 3,
}


@pytest.mark.slow
@pytest.mark.xdist_group("runs")
def test_all_that_the_largest_model_asks_for_works_together(tmp_path, unused_port):
    output = tmp_path / "run"
    codes, said = train_together(output, unused_port, **HUGE)
    assert codes == [0, 0], said
    log = log_of(output)
    assert [line["step"] for line in log if "probe" in line] == [3, 6]
    assert all(line["loss"] is not None and not line["skipped"] for line in log)
    assert len(list((output / "pictures").iterdir())) == 3
    config, _ = parse([f"--config={output / 'config.yaml'}"])
    learning = {name for name, parameter in build(config).named_parameters() if parameter.requires_grad}
    steps = sorted((output / "checkpoints").iterdir())
    assert [step.name for step in steps] == ["step-00000003", "step-00000006"]
    for step in steps:
        moments = load_file(step / "optimizer.safetensors")
        assert moments.keys() == {f"{kind}.{name}" for kind in ("exp_avg", "exp_avg_sq", "step") for name in learning}
        weights = load_file(step / "model.safetensors")
        for name in learning:
            assert weights[name].dtype == moments[f"exp_avg.{name}"].dtype == torch.float32
            assert moments[f"exp_avg.{name}"].shape == weights[name].shape and moments[f"exp_avg_sq.{name}"].any()


@pytest.mark.xdist_group("runs")
@pytest.mark.parametrize("begun", [False, True], ids=["a run that begins", "a run that goes on"])
def test_a_disk_that_is_not_shared_is_named_by_all_and_nobody_hangs(begun, tmp_path, unused_port):
    """Two nodes with disks of their own: a relative path in two folders."""
    for node in ("node-0", "node-1"):
        (tmp_path / node).mkdir()
    output = tmp_path / "node-0" / "run"
    if begun:
        code, said = train(output, watch__probe_every=0, max_steps=2)
        assert code == 0, said
    codes, said = runs_under({"NODES": str(tmp_path)}, output, unused_port, watch__probe_every=0, max_steps=3)
    assert codes == [1, 1], said
    lines = [line for line in said.splitlines() if line.startswith("pretrain.py: ")]
    assert len(lines) == 2 and "Traceback" not in said
    for line in lines:
        assert line.startswith("pretrain.py: output_dir=run has to be on a disk that all nodes share")
