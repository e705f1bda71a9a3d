"""Damaged and strange files among images, at the doors of whole programs.

What each function makes of them is in tests/train/data/test_unreadable.py, whose files these are, and some more.
"""

import io
import os

import pytest
from PIL import Image

from timm_dseq.cli import main as command

from ..train import probes
from ..train.data.test_unreadable import DAMAGES as UNREADABLE
from ..train.data.test_unreadable import declaring, png
from . import doors

pytestmark = [pytest.mark.xdist_group("faults"), pytest.mark.timeout(120)]


def encoded(kind, **settings):
    """A picture with too many details to be short."""
    file = io.BytesIO()
    Image.effect_noise((96, 96), 90).convert("RGB").save(file, kind, **settings)
    return file.getvalue()


def of(content):
    return lambda path: path.write_bytes(content)


def cut(kind, part, **settings):
    return lambda path: path.write_bytes((content := encoded(kind, **settings))[: int(len(content) * part)])


def elsewhere(damage):
    """A file that the other tests know how to make."""
    return lambda path: (
        os.replace(made, path) if (made := UNREADABLE[damage](path.parent)["path"]) != str(path) else None
    )


STRANGE = {
    name: elsewhere(name)
    for name in UNREADABLE
    if name.startswith(("a", "Post", "no pixels")) and not name.startswith(("a path", "a null", "a number"))
}
DAMAGES = {
    **STRANGE,
    "null bytes": of(bytes(5000)),
    "a JPEG cut short": cut("JPEG", 0.5),
    "a JPEG of its header alone": cut("JPEG", 0.02),
    "a GIF cut short": cut("GIF", 0.5),
    "a TIFF cut short": cut("TIFF", 0.3),
    "a compressed TIFF cut short": cut("TIFF", 0.3, compression="tiff_lzw"),
    "a WebP cut short": cut("WEBP", 0.5),
    "a BMP cut short": cut("BMP", 0.5),
    "a PPM cut short": cut("PPM", 0.5),
    "a PPM that is none": of(b"P6\nx y\n255\n"),
    "a JPEG 2000 cut short": cut("JPEG2000", 0.2),
    "a PNG without an end of its numbers": of(declaring(2**31 - 1, 2**31 - 1)),
    "a PDF": of(b"%PDF-1.7\n1 0 obj << >> endobj\n"),
    "an SVG": of(b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'><script>1</script></svg>"),
    "a web page": of(b"<!DOCTYPE html><html><body>404</body></html>"),
    "an icon": of(b"\0\0\1\0\1\0\x10\x10\0\0\1\0\x20\0\xff\xff\xff\xff\x16\0\0\0"),
    "a zip": of(b"PK\x03\x04" + bytes(60)),
    "one byte": of(b"\x89"),
    "a link to itself": lambda path: path.symlink_to(path.name),
}
# What is no regular file is not listed as an image of a folder, so that nothing is broken.
NOT_LISTED = {"a folder", "a FIFO", "a device", "a dangling link", "a link to itself"}
FEW = {"a JPEG cut short", "a decompression bomb", "PostScript", "a FIFO", "null bytes", "a Git LFS pointer"}
every_damage = pytest.mark.parametrize("damage", DAMAGES)
few_or_slow = doors.few_or_slow("damage", DAMAGES, FEW)


def photos(folder, damage=None, damaged=1, whole=6):
    """A folder of images by class, some of them damaged."""
    for split in ("train", "validation"):
        for name in ("cat", "dog"):
            place = folder / split / name
            place.mkdir(parents=True)
            for index in range(whole):
                (place / f"{index}.png").write_bytes(png(index * 3 + (name == "dog")))
    for index in range(damaged if damage else 0):
        make_in(folder / "train" / "cat", damage, f"x{index}.png")
    return folder


def make_in(folder, damage, name):
    (folder / "making").mkdir()
    DAMAGES[damage](folder / "making" / "x.png")
    os.replace(folder / "making" / "x.png", folder / name)
    (folder / "making").rmdir()


@every_damage
def test_explain_refuses_it_and_names_it(damage, tmp_path, capsys):
    make_in(tmp_path, damage, "x.png")
    code = command(["explain", str(tmp_path / "x.png"), "--output", str(tmp_path / "out.png")])
    doors.refused((code, "", capsys.readouterr().err), "x.png")
    assert not (tmp_path / "out.png").exists()


@every_damage
def test_probe_names_it_before_any_result(damage, tmp_path):
    data = photos(tmp_path / "photos", damage)
    code, said = probes.probe(tmp_path, data, protocol="knn", knn__k="[1]")
    if damage in NOT_LISTED:
        assert code == 0, said
        return
    assert code == 1 and "x0.png" in said and "Traceback" not in said and "a fault of ours" not in said, said
    assert said.splitlines()[-1].startswith("probe.py: ") and said.count("probe.py: ") == 1, said
    assert not (tmp_path / "results.jsonl").exists()


@few_or_slow
def test_finetuning_names_it_before_its_first_step(damage, tmp_path):
    data = photos(tmp_path / "photos", damage)
    found = doors.enter(
        *doors.finetune("vit_tiny_patch16_224", tmp_path, data, random="true", args='{"depth": 1}'), tmp_path
    )
    if damage in NOT_LISTED:
        assert found[0] == 0, found
        return
    doors.refused(found, "x0.png")
    assert not (tmp_path / "results.jsonl").exists() and not [*tmp_path.rglob("step-*")]


@few_or_slow
def test_pretraining_on_nothing_else_is_refused(damage, tmp_path):
    data = photos(tmp_path / "photos", damage, damaged=8, whole=0)
    doors.refused(doors.enter(*doors.pretrain(tmp_path, data__path=data), tmp_path), "photos")
    assert not [*tmp_path.rglob("step-*")]


def test_pretraining_replaces_and_counts_all_of_them(tmp_path):
    data = photos(tmp_path / "photos", whole=30)
    for index, damage in enumerate(DAMAGES):
        make_in(data / "train" / "cat", damage, f"x{index}.png")
    settings = {"data__path": data, "data__max_broken": 0.9, "optim__epochs": 1, "optim__warmup_epochs": 0}
    code, out, err = doors.enter(*doors.pretrain(tmp_path, **settings, max_steps=50), tmp_path)
    assert code == 0 and not err, out + err
    named = (tmp_path / "run" / "unreadable.txt").read_text()
    lost = [damage for index, damage in enumerate(DAMAGES) if f"x{index}.png" not in named]
    assert {*lost} == NOT_LISTED, lost


def test_whole_images_are_taken(tmp_path, capsys):
    """The control case."""
    data = photos(tmp_path / "photos")
    assert command(["explain", str(data / "train" / "cat" / "1.png"), "--output", str(tmp_path / "out.png")]) == 0
    assert (tmp_path / "out.png").is_file()
    code, said = probes.probe(tmp_path, data, protocol="knn", knn__k="[1]")
    assert code == 0, said
    for door in (
        doors.finetune("vit_tiny_patch16_224", tmp_path, data, random="true", args='{"depth": 1}'),
        doors.pretrain(tmp_path, data__path=data, optim__epochs=1, optim__warmup_epochs=0),
    ):
        code, out, err = doors.enter(*door, tmp_path)
        assert code == 0, out + err
