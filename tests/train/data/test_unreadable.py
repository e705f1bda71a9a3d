"""Every kind of damage at every door through which images come in: no traceback, no hang, no foreign program.

Pretraining takes the next image that can be read, and names the broken one. A result has to be of all images: there the
broken one is named, and the work ends.
"""

import contextlib
import hashlib
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from common.data.decoded import Crops
from common.data.digests import data_digest, digests_of
from common.data.framing import Framing
from common.data.order import DistributedBatchSampler
from common.data.resident.batches import Resident
from common.data.resident.build import build
from common.data.resident.pixel_file import PixelFile, working_side
from common.data.settings import Data
from common.data.source import Source
from common.data.stream import EncodedCrops, collate_readable
from common.data.unreadable import batches_of_all
from common.pretraining.monitor.images import Centres
from common.probing.feature_batches import RandomCrops
from common.probing.feature_cache import eval_transform
from common.tuning.augment import AugmentedImages
from common.tuning.evaluation import correct_answers
from PIL import EpsImagePlugin, Image

from timm_dseq import UserError
from timm_dseq.images import UnreadableImage, content, decode, measure, open_image

from .. import runs
from .test_source import encoded

AT = 3  # the row of the broken image
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
FRAMING = Framing(0, 32, (0.5, 1.0))
DATA = {"input_size": (3, 32, 32), "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}


def png(index=0, size=(40, 40)):
    return encoded(Image.new("RGB", size, (9 * index, 0, 99)), "PNG")["bytes"]


def declaring(width, height):
    """A PNG whose header declares that many pixels."""
    header = b"IHDR" + struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    return png()[:8] + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + png()[33:]


def file_of(content):
    return path_of(lambda path: path.write_bytes(content))


def path_of(make):
    def damaged(folder):
        make(folder / "x.png")
        return {"bytes": None, "path": str(folder / "x.png")}

    return damaged


def forbidden(path):
    path.write_bytes(png())
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("root may read every file")


def fifo(path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("there are none on Windows")
    os.mkfifo(path)


DAMAGES = {
    "an empty file": file_of(b""),
    "a file cut short": file_of(png()[:-30]),
    "a file of text": file_of(b"this is no image\n"),
    "a decompression bomb": file_of(declaring(20_000, 20_000)),
    "a bomb that Pillow only warns of": file_of(declaring(12_000, 12_000)),
    "a Git LFS pointer": file_of(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"),
    "a broken header": file_of(png()[:12] + b"????" + png()[16:]),
    "no pixels": file_of(b"GIF89a\0\0\0\0\0\0\0,\0\0\0\0\0\0\0\0\0\2\0;"),
    "PostScript": file_of(POSTSCRIPT),
    "no such path": path_of(lambda path: None),
    "a dangling link": path_of(lambda path: path.symlink_to("nowhere.png")),
    "a folder": path_of(lambda path: path.mkdir()),
    "a file that may not be read": path_of(forbidden),
    "a FIFO": path_of(fifo),
    "a device": path_of(lambda path: path.symlink_to("/dev/zero")),
    "a path with a NUL": lambda folder: {"bytes": None, "path": "x\0.png"},
    "a null image": lambda folder: None,
    "null bytes without a path": lambda folder: {"bytes": None, "path": None},
    "empty bytes without a path": lambda folder: {"bytes": b"", "path": None},
    "bytes of text": lambda folder: {"bytes": b"this is no image\n", "path": None},
    "a number": lambda folder: 7,
}
every_damage = pytest.mark.parametrize("damage", DAMAGES)
pytestmark = pytest.mark.timeout(120)  # a FIFO waits for ever for somebody who writes


@pytest.fixture
def source(damage, tmp_path):
    """Eight images with labels, of which number AT is damaged."""
    rows = [{"image": {"bytes": png(index), "path": None}} for index in range(8)]
    rows[AT]["image"] = DAMAGES[damage](tmp_path)
    return Source("some", rows, "image", "label", 2, torch.arange(8) % 2)


def decoded(source, index, folder):
    images, sample, broken = Crops(source, FRAMING)[0, index]
    return images["images"][0], sample, broken


def resident(source, index, folder):
    accelerator, data = Accelerator(cpu=True), Data(cache=str(folder / "cache"))
    file = build(PixelFile.of(source, working_side(source, 35), data), source, 0, accelerator)
    sampler = DistributedBatchSampler(0, len(source), len(source), len(source), 0, 1)
    images, samples, broken = next(Resident(file, source, FRAMING, sampler, accelerator.device))
    return images["images"][samples[:, 1] == index][0], index, broken if index == AT else []


def streamed(source, index, folder):
    items = [(source.rows[at]["image"], (0, at)) for at in range(index, 8)]
    images, samples, broken = collate_readable(EncodedCrops(Crops(None, FRAMING)).__getitems__(items))
    return images["images"][0], samples[0], broken


def monitored(source, index, folder):
    return Centres(source, range(len(source)), 32)[index]


@every_damage
@pytest.mark.parametrize("door", [decoded, resident, streamed, monitored])
def test_pretraining_takes_the_next_image_and_names_the_broken_one(door, damage, source, tmp_path):
    image, _, broken = door(source, AT, tmp_path)
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8
    assert image.float().mean((1, 2)).round().tolist() == [9 * (AT + 1), 0, 99]
    (line,) = broken
    assert f"row {AT}" in line or ".png: " in line or f"sample (0, {AT})" in line
    assert "\n" not in line and " at 0x" not in line  # no address: the same line in every run
    assert door(source, AT + 1, tmp_path)[2] == []


@every_damage
def test_a_fingerprint_is_the_same_each_time(damage, source):
    assert source.fingerprint() == source.fingerprint()


def duplicates(source, workers, folder):
    digests_of(source, workers, str(folder), Accelerator(cpu=True))


def features(source, workers, folder):
    samples = RandomCrops(source, (32, 32), "bicubic", 0)
    list(batches_of_all(samples, sampler=[(0, at) for at in range(8)], num_workers=workers))


def training(source, workers, folder):
    samples = AugmentedImages(source, eval_transform({**DATA, "crop_mode": "center"}), 0)
    list(batches_of_all(samples, sampler=[(0, at) for at in range(8)], num_workers=workers))


def scoring(source, workers, folder):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 2))
    correct_answers(model, source, DATA, Accelerator(cpu=True), workers)


@every_damage
@pytest.mark.parametrize("door", [duplicates, features, training, scoring])
def test_a_result_is_of_all_images_or_the_broken_one_is_named(door, damage, source, tmp_path):
    with pytest.raises(UserError, match=rf"row {AT}.*: mend or remove this image, a result has to be of all") as error:
        door(source, 0, tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("door", [duplicates, features, training, scoring])
def test_an_image_that_a_worker_cannot_read_is_no_traceback(door, tmp_path):
    rows = [{"image": {"bytes": png(index)[: 60 if index == AT else None], "path": None}} for index in range(8)]
    source = Source("some", rows, "image", "label", 2, torch.arange(8) % 2)
    with pytest.raises(UserError, match=rf"^row {AT}: \w+: [^\n]*: mend or remove this image") as error:
        door(source, 1, tmp_path)
    assert "Traceback" not in str(error.value)


@every_damage
def test_there_is_one_kind_of_error_in_one_line(damage, tmp_path):
    value = DAMAGES[damage](tmp_path)
    with pytest.raises(UnreadableImage) as error:
        decode(value)
    assert str(error.value) and "\n" not in str(error.value)
    for function in (measure, open_image, content):  # some of them do not see the damage
        with contextlib.suppress(UnreadableImage):
            function(value)


def test_postscript_is_handed_to_no_other_program(tmp_path, monkeypatch):
    for name in ("gs", "gswin32c", "gswin64c"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # it is looked for again
    (tmp_path / "x.jpg").write_bytes(POSTSCRIPT)
    with contextlib.suppress(Exception):
        Image.open(tmp_path / "x.jpg").load()
    assert (tmp_path / "ran").exists(), "Pillow alone would run it"
    (tmp_path / "ran").unlink()
    with pytest.raises(UnreadableImage, match="none of JPEG, PNG"):
        decode({"bytes": None, "path": str(tmp_path / "x.jpg")})
    assert not (tmp_path / "ran").exists()


def test_the_size_that_is_declared_is_bounded_whatever_pillow_is_told(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(UnreadableImage, match="20000 × 20000 pixels"):
        decode({"bytes": declaring(20_000, 20_000), "path": None})


def test_large_images_are_no_second_line_on_the_screen(run_python, tmp_path):
    (tmp_path / "large.png").write_bytes(declaring(12_000, 12_000))
    code = "from timm_dseq.images import open_image; print(open_image({'bytes': None, 'path': 'large.png'}).size)"
    done = run_python(code, PYTHONPATH=str(Path(__file__).parents[3] / "train"))
    assert (done.stdout, done.stderr) == ("(12000, 12000)\n", "")


def test_fingerprints_of_data_sets_without_a_broken_image_are_those_of_before():
    """Checkpoints, files of pixels and caches of features are found by them."""
    for count in (5, 16, 50):
        images = [png(index % 20) for index in range(count)]
        digest = hashlib.blake2b(str(count).encode(), digest_size=8)
        for index in range(0, count, max(1, count // 16)):
            digest.update(images[index])
        source = Source("some", [{"image": {"bytes": image, "path": None}} for image in images], "image", None, 0)
        assert source.fingerprint() == digest.hexdigest()
        assert data_digest(source) == hashlib.blake2b(f"{digest.hexdigest()} ".encode(), digest_size=8).hexdigest()
        about = json.dumps([digest.hexdigest(), "", count, 64, "image"])
        key = hashlib.blake2b(about.encode(), digest_size=8).hexdigest()
        assert PixelFile.of(source, 64, Data(cache="cache")).path == Path(f"cache/some-{key}.safetensors")


@pytest.mark.xdist_group("runs")
@pytest.mark.parametrize("streaming", ["false", "true"])
def test_a_folder_whose_first_image_is_broken_is_trained_on(streaming, tmp_path):
    for index in range(12):
        path = tmp_path / "photos" / "train" / ("cat" if index % 2 else "dog") / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(index))
    first = tmp_path / "photos" / "train" / "cat" / "01.png"
    first.write_bytes(b"this is no image\n")
    settings = {"data__path": tmp_path / "photos", "data__streaming": streaming, "data__max_broken": 1.0}
    settings |= {"optim__epochs": 2, "watch__probe_every": 1, "watch__pictures_every": 1}
    settings |= {"data__images": 12} if streaming == "true" else {}
    code, said = runs.train(tmp_path / "run", **settings)
    assert code == 0 and "Traceback" not in said, said
    assert f"an image that probes look at cannot be read and is replaced by another: {first}" in said
    assert f"an image that pictures show cannot be read and is replaced by another: {first}" in said
    assert str(first) in (tmp_path / "run" / "unreadable.txt").read_text()
    assert (tmp_path / "run" / "pictures" / "step-00000000.png").is_file()


@pytest.mark.parametrize(
    ("kind", "pixels", "grey"),
    [
        ("F", [[0.0, 0.5], [1.0, 0.25]], [0, 127, 255, 64]),  # shares
        ("F", [[0.0, 128.0], [255.0, 64.0]], [0, 128, 255, 64]),
        ("I", [[0, 128], [255, 64]], [0, 128, 255, 64]),
        ("I", [[0, 32896], [65535, 16448]], [0, 128, 255, 64]),
        ("I;16", [[0, 128], [255, 64]], [0, 0, 1, 0]),  # dark, and of 16 bits
    ],
)
def test_pixels_of_more_bits_are_seen_as_they_are(kind, pixels, grey, tmp_path):
    numbers = np.array(pixels, {"F": np.float32, "I": np.int32, "I;16": np.uint16}[kind])
    Image.fromarray(numbers).save(tmp_path / "x.tiff")
    found = decode({"bytes": None, "path": str(tmp_path / "x.tiff")})
    assert found.mode == "RGB"
    assert np.abs(np.asarray(found)[..., 0].ravel().astype(int) - grey).max() <= 1


@pytest.mark.parametrize("pixels", [[[-1.0, 1.0]], [[0.0, 1e6]]])
def test_pixels_of_no_known_range_are_named(pixels, tmp_path):
    Image.fromarray(np.array(pixels, np.float32)).save(tmp_path / "x.tiff")
    with pytest.raises(UnreadableImage, match="store 8 or 16 bits"):
        decode({"bytes": None, "path": str(tmp_path / "x.tiff")})
