"""A file that cannot be written to its end, as on a full disk: one line, and nothing half-written is left."""

import pytest
from common.data.settings import Data
from common.data.source import open_source
from common.labels.labelled import open_labelled
from common.labels.settings import Labels
from PIL import Image

from ..train.tunings import colours
from . import doors

pytestmark = [pytest.mark.xdist_group("faults"), pytest.mark.timeout(120)]
KIB = 2**10


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The folder of a run's checkpoint."""
    return doors.run_of(tmp_path_factory.mktemp("whole"), steps=1) / "checkpoints" / "step-00000001"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = colours(tmp_path_factory.mktemp("colours") / "data", train=12, test=6)
    open_labelled(Labels(path=str(folder)))  # so that the disk is not full of what the library keeps of it
    open_source(Data(path=str(folder)))
    return folder


@pytest.fixture
def door(request, weights, data, tmp_path):
    """The arguments of a program, by its name in the table."""
    photo = tmp_path / "photo.png"
    Image.effect_noise((400, 400), 90).convert("RGB").save(photo)
    few = {"data__cache": tmp_path / "pixels", "optim__epochs": 2, "optim__warmup_epochs": 0}
    tiny = {"random": "true", "args": '{"depth": 1, "patch_size": 8}'}
    return {
        "convert": lambda: doors.convert(weights / "model.safetensors", tmp_path),
        "explain": lambda: doors.explain(weights, tmp_path, photo),
        "pretrain": lambda: doors.pretrain(tmp_path),
        "pictures": lambda: doors.pretrain(tmp_path, watch__pictures_every=1),
        "pixels": lambda: doors.pretrain(tmp_path, data__path=data, data__resident="true", **few),
        "probe": lambda: doors.probe("vit_tiny_patch16_224", tmp_path, data, **tiny),
        "heads": lambda: doors.probe("vit_tiny_patch16_224", tmp_path, data, **tiny, protocol="dseq", heads__epochs=1),
        "finetune": lambda: doors.finetune("vit_tiny_patch16_224", tmp_path, data, **tiny),
    }[request.node.callspec.params["name"]]()


# How many bytes a file may have, less than the program's largest one.
FULL = {
    "convert": (KIB, 2 * KIB, 3 * KIB, 10 * KIB, 100 * KIB, 1000 * KIB),
    "explain": (KIB, 4 * KIB),
    "pretrain": (4 * KIB, 16 * KIB, 100 * KIB, 1000 * KIB, 4000 * KIB),
    "pictures": (16 * KIB,),
    "pixels": (16 * KIB, 64 * KIB),
    "probe": (200, KIB, 3 * KIB),
    "heads": (KIB, 4 * KIB),
    "finetune": (4 * KIB, 100 * KIB, 1000 * KIB),
}
LEFT = {"step-*", ".unfinished*", "*.new", "*.partial", "out", "out.png", "export", "model.safetensors"}


@pytest.mark.parametrize(("name", "most"), [(name, most) for name, all_of in FULL.items() for most in all_of])
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(name, most, door, tmp_path):
    doors.refused(doors.enter(*door, tmp_path, most), "(")
    left = [path for pattern in LEFT for path in tmp_path.rglob(pattern)]
    assert not left, left
    assert not (tmp_path / "results.jsonl").exists() or (tmp_path / "results.jsonl").read_text().endswith("}\n")


@pytest.mark.parametrize("name", FULL)
def test_with_room_it_ends_well(name, door, tmp_path):
    """The control case."""
    code, out, err = doors.enter(*door, tmp_path, 2**30)
    assert code == 0, out + err
