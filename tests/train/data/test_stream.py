"""A stream's micro-batches: the same from workers as from none, whole where an image is broken, and no worker stays."""

import gc
import multiprocessing

import datasets
import pytest
import torch
from common.data import stream
from common.data.framing import Framing
from common.pretraining.settings import parse

from timm_dseq import UserError
from timm_dseq.images import UnreadableImage

from ..run.test_resume import shards

datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.1  # it waits 5 s at each end of a stream, for pyarrow's threads


def same_pixels(ours, theirs):
    return ours.keys() == theirs.keys() == {"images", "pixels"} and all(torch.equal(ours[k], theirs[k]) for k in ours)


def streams(folder, workers, processes=1, rank=0, state=None):
    config, _ = parse(
        [f"--data.path={folder}", "--data.streaming=true", "--model.img_size=32", f"--data.workers={workers}"]
    )
    framing = Framing(config.seed, config.model.img_size, config.data.crop_scale, views=2, grid=(4, 4))
    return stream.Stream(config.data, framing, rank, processes, 5, state)


@pytest.mark.slow
def test_workers_change_no_sample_and_a_state_in_their_midst_goes_on_with_the_next(tmp_path):
    folder = shards(tmp_path)
    here, there = streams(folder, 0), streams(folder, 2)
    seen = []
    for _ in range(12):
        (images, samples, _), (others, same, _) = next(here), next(there)
        assert same_pixels(images, others) and torch.equal(samples, same)
        assert here.state == there.state
        seen.append((images, samples, there.state))
    again = streams(folder, 2, state=seen[4][2])
    for images, samples, _ in seen[5:]:
        others, same, _ = next(again)
        assert same_pixels(images, others) and torch.equal(samples, same)


@pytest.mark.parametrize("workers", [0, 1])
def test_images_none_of_which_can_be_read_end_the_stream_in_one_line(workers, tmp_path, monkeypatch):
    def damaged(self, value, draws):
        raise UnreadableImage("OSError: cannot identify image file")

    monkeypatch.setattr(stream.Crops, "crop", damaged)  # which workers inherit
    with pytest.raises(UserError, match=r"5 images in a row cannot be read, the .*: is data.image right") as error:
        next(streams(shards(tmp_path), workers))
    assert "\n" not in str(error.value)


def test_what_cannot_be_read_is_replaced_in_its_micro_batch():
    first, third = ({"images": torch.full((1, 3, 2, 2), value)} for value in (1, 3))
    lost = ({}, (0, 8), ["eight.png: damaged"])
    images, samples, broken = stream.collate_readable([(first, (0, 7), []), lost, (third, (0, 9), [])])
    assert images["images"][:, 0, 0, 0].tolist() == [1, 3, 3]
    assert samples.tolist() == [[0, 7], [0, 9], [0, 9]] and broken == ["eight.png: damaged"]


def test_no_worker_outlives_its_stream(tmp_path):
    """They hear no signal: the interpreter would wait for them for ever at its end."""
    before = set(multiprocessing.active_children())
    gc.disable()
    try:
        read = streams(shards(tmp_path), 2)
        next(read)
        assert len(set(multiprocessing.active_children()) - before) == 2
        del read
        assert not set(multiprocessing.active_children()) - before
    finally:
        gc.enable()


@pytest.mark.parametrize(("processes", "says"), [(2, 0), (4, 1), (1, 0)])
def test_shards_that_cannot_be_dealt_out_evenly_are_told_once(processes, says, tmp_path, capsys):
    for rank in range(processes):
        streams(shards(tmp_path), 0, processes, rank)
    said = capsys.readouterr().out
    assert said.count("has 6 shards, no multiple of 4 processes: each process reads all of them") == says
    assert said.count("\n") == says
