"""Pixels decoded once: the same samples as the decoded path, through kills, full disks and broken files."""

import contextlib
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from common.data.decoded import Crops, collate
from common.data.framing import Framing
from common.data.order import DistributedBatchSampler
from common.data.resident import batches as resident
from common.data.resident import build as building
from common.data.resident import pixel_file as pixels
from common.data.resident.batches import Resident
from common.data.resident.build import build
from common.data.resident.pixel_file import PixelFile, working_side
from common.data.settings import Data
from common.data.source import open_source
from common.pretraining import batches as choice
from common.pretraining.batches import pixel_file
from common.pretraining.settings import Config, check, parse
from common.run.length import Length
from common.run.resume import Progress
from common.system.machine import free_memory
from PIL import Image
from safetensors import safe_open
from torch.utils.data import DataLoader

from timm_dseq import UserError

from ...far import FarDevice
from .. import runs
from .test_source import encoded

pytestmark = pytest.mark.xdist_group("runs")
SHAPES = [(64, 64), (64, 48), (50, 70), (90, 30)]  # height, width


def picture(index, shape=(64, 64)):
    """Soft noise of its own for each number, away from black and white."""
    draw = np.random.default_rng(index)
    small = Image.fromarray(draw.integers(64, 192, (9, 9, 3), dtype=np.uint8))
    return small.resize(shape[::-1], Image.Resampling.BICUBIC)


def data_set(path, count=40, shapes=SHAPES[:1], broken=(), first=0, cut=60):
    values = [encoded(picture(first + i, shapes[i % len(shapes)]), "PNG") for i in range(count)]
    for index in broken:
        values[index]["bytes"] = values[index]["bytes"][:cut]
    rows = datasets.Dataset.from_dict({"image": values}, features=datasets.Features({"image": datasets.Image()}))
    rows.to_parquet(path)
    return str(path)


@pytest.fixture
def settings(tmp_path):
    """Of a tiny run on 40 squares."""

    def of(path=None, **others):
        path = path or data_set(tmp_path / "x.parquet")
        options = {"data__path": path, "data__cache": tmp_path / "cache", "optim__epochs": 4, "data__resident": "true"}
        config, _ = parse(runs.options(tmp_path / "run", **{**options, **others}))
        return config

    return of


def place_of(config):
    source = open_source(config.data)
    side = config.data.resident_size or working_side(source, config.model.img_size)
    return PixelFile.of(source, side, config.data), source


def built(config):
    place, source = place_of(config)
    return build(place, source, config.data.workers, Accelerator(cpu=True)), source


def share(config, source, start=0, micro_batch=8, rank=0, processes=1):
    return DistributedBatchSampler(
        config.seed, len(source), config.optim.batch_size, micro_batch, rank, processes, start
    )


def framing_of(config):
    size, data = config.model.img_size, config.data
    return Framing(config.seed, size, data.crop_scale, data.flip, views=config.model.views, grid=(4, 4), share=0.5)


def resident_of(place, source, config, samples, device):
    return Resident(place, source, framing_of(config), samples, device)


def batches(config, **how):
    place, source = built(config)
    return resident_of(place, source, config, share(config, source, **how), torch.device("cpu"))


def decoded(config, source, **how):
    crops = Crops(source, framing_of(config))
    return iter(DataLoader(crops, batch_sampler=share(config, source, **how), collate_fn=collate))


def first(some, count):
    return list(itertools.islice(some, count))


@pytest.mark.parametrize("views", [0, 3])
def test_at_the_working_size_both_paths_give_the_same_samples_and_pixels_up_to_rounding(views, settings):
    config = settings(model__img_size=48, data__resident_size=64, data__flip=0.5, model__views=views)
    ours, theirs = (
        first(batches(config), 11),
        first(decoded(config, open_source(config.data)), 11),
    )  # two epochs and more
    for (own_pixels, samples, broken), (others, their_samples, their_broken) in zip(ours, theirs, strict=True):
        assert torch.equal(samples, their_samples) and samples.dtype == their_samples.dtype
        assert broken == their_broken == []
        assert own_pixels.keys() == others.keys() == ({"images", "pixels"} if views else {"images"})
        for name, own in own_pixels.items():
            assert own.shape == others[name].shape and own.dtype == torch.uint8
            off = (own.int() - others[name].int()).abs()
            assert off.max() <= 2 and (off > 1).float().mean() < 1e-4 and off.float().mean() < 0.05
        if views:
            assert own_pixels["pixels"].shape == (3 * len(samples), 3, 8 * 12, 12)


def test_images_of_other_shapes_are_framed_as_in_the_decoded_path(settings, tmp_path):
    """The boxes are those of the original image: half a pixel of error would be seen in noise that soft."""
    config = settings(data_set(tmp_path / "y.parquet", shapes=SHAPES), data__resident_size=64)
    ours, theirs = first(batches(config), 5), first(decoded(config, open_source(config.data)), 5)
    for (own, _, _), (others, _, _) in zip(ours, theirs, strict=True):
        assert (own["images"].int() - others["images"].int()).abs().float().mean((1, 2, 3)).max() < 1.5


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("start", [0, 24, 40, 72])
def test_processes_and_a_start_amid_an_epoch_change_no_bit(settings, processes, start):
    config = settings(model__views=2)
    whole = first(batches(config), 16)
    parts = [
        batches(config, start=start, micro_batch=8 // processes, rank=rank, processes=processes)
        for rank in range(processes)
    ]
    for every, samples, _ in whole[start // 8 :]:
        own = [next(part) for part in parts]
        for name in ("images", "pixels"):
            assert torch.equal(torch.cat([part[0][name] for part in own]), every[name])
        assert torch.equal(torch.cat([part[1] for part in own]), samples)


def test_what_cannot_be_read_is_replaced_and_named_as_in_the_decoded_path(settings, tmp_path):
    config = settings(data_set(tmp_path / "y.parquet", shapes=SHAPES, broken=(0, 7, 8, 9, 38, 39)))
    for ours, theirs in zip(
        first(batches(config), 10), first(decoded(config, open_source(config.data)), 10), strict=True
    ):
        assert torch.equal(ours[1], theirs[1]) and ours[2] == theirs[2]
        assert (ours[0]["images"].int() - theirs[0]["images"].int()).abs().float().mean((1, 2, 3)).max() < 3


def test_a_run_counts_broken_images_alike_in_both_paths(tmp_path):
    path = data_set(tmp_path / "y.parquet", broken=range(0, 40, 3))
    settings = {"data__path": path, "optim__epochs": 4, "data__max_broken": 0.5, "watch__probe_every": 0}
    found = {}
    for name in ("true", "false"):
        code, said = runs.train(tmp_path / name, data__resident=name, data__cache=tmp_path / "cache", **settings)
        assert code == 0, said
        log = runs.log_of(tmp_path / name)
        found[name] = ([line["broken"] for line in log], (tmp_path / name / "unreadable.txt").read_text())
        assert ("resident: 40 images at 55 px" in said) == (name == "true")
    assert found["true"] == found["false"] and found["true"][0][-1] > 40


@pytest.mark.parametrize(("cut", "says"), [(60, "100 images in a row cannot be read, the first row 0"), (9, "none of")])
def test_a_data_set_of_nothing_but_broken_images_ends_at_once(cut, says, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(building, "CHUNK", 50)
    config = settings(data_set(tmp_path / "y.parquet", count=400, broken=range(400), cut=cut))
    with pytest.raises(UserError, match=says):
        chosen(config)
    if cut == 60:
        assert sum(place_of(config)[0].marks.read_bytes()) < 4
    else:
        assert "none of 64 can be read" in chosen(settings(config.data.path, data__resident="auto"))[2]


def test_images_in_a_row_that_cannot_be_read_end_a_run():
    sizes = np.array([[1, 1]] * 3 + [[0, 0]] * 99 + [[2, 2]])
    where = SimpleNamespace(where=lambda i: f"row {i}:")
    assert resident._readable(sizes, where)[:5].tolist() == [0, 1, 2, 102, 102]
    assert resident._readable(np.roll(sizes, 50, 0), where)[[0, 49, 50, 102]].tolist() == [49, 49, 50, 49 + 0]
    with pytest.raises(UserError, match="100 images in a row cannot be read, the first row 3:"):
        resident._readable(np.insert(sizes, 4, 0, axis=0), where)


def test_a_step_does_not_loop_over_images(settings, tmp_path):
    """As many calls of Python functions for 64 images as for 512."""
    config = settings(
        data_set(tmp_path / "y.parquet", count=1100, shapes=SHAPES), optim__batch_size=512, model__views=2
    )
    calls = {}
    for size in (64, 512):
        some = batches(config, micro_batch=size)
        next(some)  # what is cached is cached
        count = itertools.count()
        sys.setprofile(lambda frame, event, _, count=count: next(count) if event.endswith("call") else None)
        try:
            batch, _, _ = next(some)
        finally:
            sys.setprofile(None)
        assert len(batch["images"]) == size
        calls[size] = next(count)
    assert calls[64] == calls[512]


@pytest.mark.parametrize("room", [2**40, 2**10], ids=["on the device", "in the mapped file"])
def test_batches_on_a_device_are_those_of_the_host_and_nothing_waits(room, settings, tmp_path, monkeypatch):
    config = settings(data_set(tmp_path / "y.parquet", shapes=SHAPES), model__views=2)
    place, source = built(config)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (room, room))
    device, empty = FarDevice(), torch.empty

    def pinned(*args, pin_memory=False, **kwargs):
        tensor = empty(*args, **kwargs)
        if pin_memory:
            device.pinned[tensor] = True
        return tensor

    monkeypatch.setattr(torch, "empty", pinned)  # for the thread that reads ahead
    with device:
        some = resident_of(place, source, config, share(config, source), torch.device("cuda"))
        next(some)
        device.waits.clear()  # the pixels were sent once
        batch, samples, _ = next(some)
        assert {own.device.type for own in batch.values()} == {"cuda"} and ("on the device" in some.describe()) == (
            room > 2**20
        )
    assert not device.crossings and not device.waits, (device.crossings, device.waits)
    (_, (theirs, their_samples, _)) = first(batches(config), 2)
    assert torch.equal(samples, their_samples)
    assert all(torch.equal(batch[name], theirs[name]) for name in ("images", "pixels"))


def test_a_file_is_safetensors_with_untouched_squares(settings):
    config = settings(data__resident_size=64)
    place, source = built(config)
    with safe_open(place.path, "pt") as file:
        images, sizes = file.get_tensor("images"), file.get_tensor("sizes")
        assert file.metadata()["side"] == "64"
    assert images.shape == (40, 3, 64, 64) and images.dtype == torch.uint8
    assert sizes.tolist() == [[64, 64]] * 40
    for index in (0, 17, 39):
        assert np.array_equal(images[index].permute(1, 2, 0), np.asarray(source.picture(index)))
    assert {path.suffix for path in place.path.parent.iterdir()} <= {".safetensors", ".lock"}


def test_workers_change_no_byte_of_the_file(settings, monkeypatch):
    monkeypatch.setattr(building, "CHUNK", 7)
    contents, path = [], settings().data.path
    for workers in (0, 2):
        place, _ = built(settings(path, data__workers=workers))
        contents.append(place.path.read_bytes())
        place.path.unlink()
    assert contents[0] == contents[1]


def test_the_working_side_follows_crops_and_images(tmp_path):
    source = open_source(Data(path=data_set(tmp_path / "y.parquet", shapes=[(64, 48), (100, 80)], broken=(1, 2))))
    assert [working_side(source, size) for size in (48, 56, 84, 87, 88, 224)] == [55, 64, 96, 100, 100, 100]


def _build(path, cache, seconds, workers, said):
    """A build in chunks of two images, in a process of its own; it says which file it builds, and when it is built."""
    building.CHUNK, building.SECONDS = 2, 0.0
    own = building.decode

    def slow(*args):
        time.sleep(seconds)
        return own(*args)

    building.decode = slow
    with said.open("w") as file, contextlib.redirect_stdout(file):
        data = Data(path=path, cache=str(cache))
        source = open_source(data)
        place = PixelFile.of(source, 64, data)
        print(place.path, flush=True)
        build(place, source, workers, Accelerator(cpu=True))
        print("built", flush=True)


def builder(path, cache, seconds, workers=0):
    """The process, and the file of what it says."""
    cache.mkdir(exist_ok=True)
    said = cache.parent / f"said-{next(_NUMBERS)}"
    process = runs.FORKS.Process(target=_build, args=(path, cache, seconds, workers, said))
    process.start()
    return process, said


def said_by(process, said):
    process.join(120)
    return said.read_text()


_NUMBERS = itertools.count()


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_build_that_is_killed_goes_on_and_never_leaves_half_a_file(tmp_path, workers):
    path, cache = data_set(tmp_path / "x.parquet"), tmp_path / "cache"
    said = said_by(*builder(path, tmp_path / "other", 0))
    assert said.endswith("built\n"), said
    file = Path(said.splitlines()[0])
    done = []
    for _ in range(3):
        process, _ = builder(path, cache, 0.1, workers)
        marks = cache / file.with_suffix(".marks").name
        while not marks.exists() or sum(marks.read_bytes()) < len(done) * 3 + 3:
            assert process.is_alive()
            time.sleep(0.02)
        process.kill()
        process.join()
        done.append(sum(marks.read_bytes()))
        assert not (cache / file.name).exists()
    assert done == sorted(done)
    said = said_by(*builder(path, cache, 0, workers))
    assert said.endswith("built\n") and f"image {40 - 2 * done[-1]}/{40 - 2 * done[-1]}" in said, said
    assert (cache / file.name).read_bytes() == file.read_bytes()
    assert not marks.exists() and not marks.with_suffix(".part").exists()


@pytest.mark.slow
def test_two_runs_that_build_at_once_give_one_whole_file(tmp_path):
    path, cache = data_set(tmp_path / "x.parquet"), tmp_path / "cache"
    open_source(Data(path=path))  # `datasets` has its own copy ready
    both = [builder(path, cache, 0.1) for _ in range(2)]
    said = [said_by(*one) for one in both]
    assert all(text.endswith("built\n") for text in said), said
    assert sum("decoding 40 images" in text for text in said) == 1
    assert sum("waiting for another process" in text for text in said) == 1
    assert len(list(cache.glob("*.safetensors"))) == 1 and not list(cache.glob("*.part"))


def test_marks_without_their_file_count_for_nothing(settings):
    config = settings()
    place, _ = built(config)
    whole = place.path.read_bytes()
    place.path.unlink()
    place.marks.write_bytes(b"\1")
    assert built(config)[0].path.read_bytes() == whole
    place.path.unlink()
    place.unfinished.write_bytes(whole[:-1])
    place.marks.write_bytes(b"\1")
    assert built(config)[0].path.read_bytes() == whole


def test_a_disk_without_room_is_one_line_before_anything_is_written(settings, monkeypatch):
    config = settings()
    monkeypatch.setattr(pixels.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(
        UserError, match=r"needs 0\.0 GiB and the disk has .* name another folder with data\.cache"
    ) as error:
        built(config)
    assert "\n" not in str(error.value)
    assert not list(Path(config.data.cache).glob("*.part"))


def test_a_disk_that_fills_up_is_one_line_and_the_build_goes_on_with_room(settings, tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("only root may make a small disk to fill")
    try:
        monkeypatch.setattr(building, "CHUNK", 4)
        monkeypatch.setattr(building, "SECONDS", 0.0)
        config = settings(data__cache=disk)
        with monkeypatch.context() as patch:
            patch.setattr(pixels.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**40))
            with pytest.raises(UserError, match=r"cannot be written \(No space left on device"):
                built(config)
        place, _ = place_of(config)
        assert 0 < sum(place.marks.read_bytes()) < 10 and not place.path.exists()
        subprocess.run(["mount", "-o", "remount,size=2m", str(disk)], check=True)
        built(config)[0].read()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_that_cannot_be_written_is_one_line(settings, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .* name another with data\.cache"):
        built(settings(data__cache=tmp_path / "file"))


def test_a_file_cut_short_and_one_of_other_data_are_named(settings, tmp_path):
    config = settings()
    place, _ = built(config)
    whole = place.path.read_bytes()
    for content, says in (
        (whole[:-1], "bytes: delete it, and it is built again"),
        (whole[:20], "other data than its name says: delete it"),
        (b"", "other data than its name says: delete it"),
    ):
        place.path.write_bytes(content)
        code, said = runs.train(
            tmp_path / "run",
            data__path=config.data.path,
            data__cache=config.data.cache,
            data__resident="true",
            optim__epochs=4,
            watch__probe_every=0,
        )
        assert code == 1 and says in said and str(place.path) in said and "Traceback" not in said, said
    other, _ = built(settings(data_set(tmp_path / "y.parquet", first=40)))
    assert other.path != place.path
    os.replace(other.path, place.path)
    with pytest.raises(UserError, match="other data than its name says: delete it"):
        place.read()


def test_another_data_set_or_size_is_another_file(settings, tmp_path):
    configs = [settings(), settings(data__resident_size=60), settings(data_set(tmp_path / "y.parquet", first=1))]
    assert len({place_of(config)[0].path for config in configs}) == 3
    assert place_of(configs[0])[0].path == place_of(configs[0])[0].path


def chosen(config, **done):
    source = open_source(config.data)
    progress = Progress(chosen=done)
    length = Length.of(config.optim, len(source), 1)
    place, why = pixel_file(config, source, length, progress, Accelerator(cpu=True))
    return progress.chosen.get("resident"), place, why


def test_auto_takes_what_fits_and_says_why_not(settings, monkeypatch):
    assert chosen(settings(data__resident="auto"))[0] == 55
    side, place, why = chosen(settings(data__resident="auto", optim__epochs=1))
    assert (side, place) == (0, None) and "none comes twice" in why
    assert chosen(settings(data__resident="false"))[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(choice, "free_memory", lambda: 2 * 40 * 3 * 55**2)
        assert "of memory are free" in chosen(settings(data__resident="auto"))[2]
    for path in Path(settings().data.cache).glob("*"):
        path.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(pixels.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        assert "more than the disk of" in chosen(settings(data__resident="auto"))[2]
    assert 2**20 < free_memory() < 2**50


def test_a_run_that_goes_on_keeps_what_it_chose(settings, monkeypatch):
    monkeypatch.setattr(choice, "free_memory", lambda: 0)
    assert chosen(settings(data__resident="auto"), resident=40)[1].side == 40
    monkeypatch.undo()
    assert chosen(settings(data__resident="auto"), resident=0)[1] is None


def test_a_dry_run_takes_a_file_and_builds_none(settings):
    config = settings(dry_run="true")
    assert chosen(config)[1] is None and not Path(config.data.cache).exists()
    built(config)
    assert chosen(config)[1] is not None


def test_a_stream_cannot_be_resident():
    config = Config(data=Data(streaming=True, resident=True))
    with pytest.raises(UserError, match=r"data\.resident=true .* data\.streaming"):
        check(config)


RUN = {
    "optim__epochs": 4,
    "watch__probe_every": 0,
    "data__resident": "auto",
    "data__flip": 0.5,
    "data__color_jitter": 0.3,
}


@pytest.mark.slow
def test_a_resident_run_that_is_killed_ends_bit_for_bit_like_the_whole_one(tmp_path):
    settings = {**RUN, "data__path": data_set(tmp_path / "x.parquet", shapes=SHAPES), "data__cache": tmp_path / "cache"}
    code, said = runs.train(tmp_path / "whole", **settings)
    assert code == 0 and "resident: 40 images at 55 px" in said, said
    output, kills = tmp_path / "run", 0
    for steps in (2, 7, 11, 17):
        process = runs.start(output, **settings)
        while process.exitcode is None and (
            not (output / "log.jsonl").exists() or len((output / "log.jsonl").read_text().splitlines()) < steps
        ):
            time.sleep(0.01)
        kills += process.exitcode is None
        process.kill()
        process.join()
    assert kills >= 2
    code, said = runs.train(output, **settings)
    assert code == 0, said
    assert runs.log_of(output) == runs.log_of(tmp_path / "whole")
    ours, theirs = runs.tensors_of(output), runs.tensors_of(tmp_path / "whole")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_two_processes_build_one_file_and_learn_what_one_does(tmp_path, unused_port):
    path = data_set(tmp_path / "x.parquet", count=150, shapes=SHAPES)
    settings = {**RUN, "data__path": path, "optim__epochs": 1.5, "system__precision": "float64"}
    code, said = runs.train(tmp_path / "alone", data__cache=tmp_path / "one", **settings)
    assert code == 0 and "resident: 150 images" in said, said
    codes, said = runs.train_together(tmp_path / "both", unused_port, data__cache=tmp_path / "two", **settings)
    assert codes == [0, 0], said
    (one,), (two,) = ((tmp_path / name).glob("*.safetensors") for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    ours, theirs = runs.log_of(tmp_path / "both"), runs.log_of(tmp_path / "alone")
    for line, other in zip(ours, theirs, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-9)
    ours, theirs = runs.tensors_of(tmp_path / "both"), runs.tensors_of(tmp_path / "alone")
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-9, atol=1e-9, msg=name)


def test_flips_and_colours_are_the_same_in_both_paths(tmp_path):
    """Squares at their own size: what is learned differs by interpolation's rounding alone, not by a flip."""
    settings = {**RUN, "data__path": data_set(tmp_path / "x.parquet"), "data__cache": tmp_path / "cache"}
    settings |= {"data__resident_size": 64, "max_steps": 6}
    logs = {}
    for name, how in {"true": {}, "false": {}, "plain": {"data__flip": 0.0, "data__color_jitter": 0.0}}.items():
        code, said = runs.train(tmp_path / name, **{**settings, "data__resident": name.replace("plain", "true"), **how})
        assert code == 0, said
        logs[name] = [line["loss"] for line in runs.log_of(tmp_path / name)]
    assert logs["true"] == pytest.approx(logs["false"], rel=3e-3)
    assert logs["true"] != pytest.approx(logs["plain"], rel=3e-3)
