"""Weights of others, over real HTTP from a drive and an address on loopback: whatever these answer, what comes into the
store is whole and the right thing, or nothing does and one line says why."""

import hashlib
import io
import json
import pickle
import sys
import time
import zipfile

import pytest
import torch
from safetensors.torch import load_file

from timm_dseq import UserError
from timm_dseq.hub import download
from timm_dseq.hub.store import drive as drive_module
from timm_dseq.hub.store.folders import record, unfinished
from timm_dseq.hub.store.get import get, listing, remove

from ... import layouts
from .tiny_sources import FILE, META, META_FILE, OFFICIAL, only

each = pytest.mark.parametrize("name", [OFFICIAL, META])


def bytes_of(drive, name):
    return FILE if name == OFFICIAL else META_FILE, drive.files[FILE if name == OFFICIAL else META_FILE]


def holds(folder, content: bytes) -> bool:
    """Whether a folder of the store holds the target encoder of a checkpoint."""
    target = torch.load(io.BytesIO(content), weights_only=True)["target_encoder"]
    stored = load_file(folder / "model.safetensors")
    return all(torch.equal(tensor, stored[name.removeprefix("module.")]) for name, tensor in target.items())


@pytest.mark.parametrize("large", [False, True])
@each
def test_weights_arrive_whole_with_a_record_of_what_they_are(drive, store, bring, name, large):
    drive.large = large
    folder = bring(name)
    file, content = bytes_of(drive, name)
    assert holds(folder, content)
    said = record(folder)
    assert said["size"] == len(content) and said["sha256"] == hashlib.sha256(content).hexdigest()
    assert file in said["source"] and len(said["date"]) == 10
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "README.md", "source.json"}
    assert only(store) == [name]
    asked = len(drive.requests)
    bring(name)
    assert len(drive.requests) == asked


@each
def test_the_licence_is_said_once_on_the_screen_in_the_record_and_in_the_card(drive, store, unverified, name):
    lines = []
    get(name, say=lines.append)
    words = {OFFICIAL: "none is stated for the weights", META: "cc-by-nc-4.0"}[name]
    assert "\n".join(lines).count(words) == 1 and words in record(store / name)["license"]
    card = (store / name / "README.md").read_text()
    assert {OFFICIAL: "for the weights no licence is stated", META: "license: cc-by-nc-4.0"}[name] in card
    assert (META in card) == (name == META) and "IN1k or IN22k" not in card


def test_what_is_stored_of_meta_is_cropped_as_its_name_says(bring):
    folder = bring(META)
    assert json.loads((folder / "config.json").read_text())["pretrained_cfg"]["crop_pct"] == 0.9
    assert "resized to 248 " in (folder / "README.md").read_text()


@each
def test_a_connection_that_ends_early_is_gone_on_with(drive, bring, name):
    drive.fault = "cut"
    folder = bring(name)
    _, content = bytes_of(drive, name)
    (asked,) = drive.ranges()
    assert holds(folder, content) and 0 <= len(content) // 2 - int(asked[6:-1]) < 2**20  # gdown keeps whole pieces


@each
def test_one_that_always_ends_early_is_given_up_and_the_next_call_goes_on(drive, bring, refused, name):
    drive.fault, drive.cuts = "cut", -1
    said = refused(name)
    assert "the same command again, it goes on from there" in said and "--file PATH" in said
    tries = len(drive.ranges())
    assert tries == 4
    drive.fault = None
    folder = bring(name)
    _, content = bytes_of(drive, name)
    (last,) = drive.ranges()[tries:]
    assert holds(folder, content) and int(last[6:-1]) > 0.9 * len(content)


def other(content: bytes, name: str, tmp_path, longer: bool) -> bytes:
    """Another checkpoint of the same kind, of the same size or a longer one."""
    target = layouts.random_weights(layouts.encoder_shapes(class_token=name == OFFICIAL), 7)
    student = layouts.random_weights(layouts.encoder_shapes(depth=1, class_token=name == OFFICIAL), 8)
    predictor = layouts.random_weights(layouts.predictor_shapes(depth=2 if longer else 1), 9)
    save = layouts.save_official if name == OFFICIAL else layouts.save_ijepa
    made = save(tmp_path / bytes_of_name(name), target, student, predictor).read_bytes()
    assert (len(made) == len(content)) != longer
    return made


def bytes_of_name(name):
    return FILE if name == OFFICIAL else META_FILE


@pytest.mark.parametrize("longer", [True, False])
@each
def test_two_versions_of_a_file_are_never_mixed(drive, bring, refused, tmp_path, name, longer):
    """The file changes between two calls. A drive tells but its size; the checksums in the file tell the rest."""
    drive.fault, drive.cuts = "cut", -1
    refused(name)
    drive.fault = None
    file, content = bytes_of(drive, name)
    drive.files[file] = other(content, name, tmp_path, longer)
    if name == OFFICIAL and not longer:
        assert "arrived damaged (its checksums" in refused(name)
    assert holds(bring(name), drive.files[file])


@each
def test_a_server_that_does_not_go_on_is_asked_anew(drive, bring, refused, name):
    drive.fault, drive.cuts = "cut", -1
    refused(name)
    drive.fault = "no range"
    if name == OFFICIAL:
        refused(name)
    assert holds(bring(name), bytes_of(drive, name)[1])


@each
def test_all_bytes_that_had_arrived_before_a_kill_are_not_asked_for_again(drive, store, bring, refused, name):
    drive.fault, drive.cuts = "cut", -1
    refused(name)
    drive.fault = None
    _, content = bytes_of(drive, name)
    (part,) = unfinished(name).glob("*.part")
    part.write_bytes(content)
    asked = len(drive.ranges())
    assert holds(bring(name), content) and len(drive.ranges()) == asked


@each
def test_a_byte_that_was_altered_on_the_way_is_noticed(drive, bring, refused, name):
    drive.fault = "flip"
    assert "arrived damaged (its checksums are not those that were saved with it), so it was removed" in refused(name)
    drive.fault = None
    assert holds(bring(name), bytes_of(drive, name)[1])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            "quota",
            r"does not hand the file out (Too many users have viewed or downloaded this file recently): wait a day",
        ),
        ("login", r"does not hand the file out (Cannot retrieve the public link"),
        ("gone", r"does not hand the file out (Cannot retrieve the public link"),
        ("closed", r"did not arrive whole (Failed to retrieve folder contents"),
        ("again", r"the drive sends pages and no file"),
    ],
)
def test_what_a_drive_says_instead_of_the_file_is_one_line_with_the_way_round(
    drive, refused, monkeypatch, fault, message
):
    monkeypatch.setattr(drive_module, "PAGES", 1)
    drive.fault = fault
    said = refused()
    assert message in said and drive_module.address("1folder") in said and "--file PATH" in said


def test_a_drive_from_which_nothing_came_promises_no_going_on(drive, refused):
    drive.fault = "closed"
    assert "goes on from there" not in refused()


def test_a_quota_page_does_not_cost_what_has_arrived(drive, bring, refused):
    drive.fault, drive.cuts = "cut", -1
    refused()
    drive.fault = "quota"
    refused()
    drive.fault = None
    asked = len(drive.ranges())
    bring()
    assert len(drive.ranges()) == asked + 1


@pytest.mark.parametrize(("fault", "message"), [("gone", "answers 404"), ("error", "answers 503")])
def test_what_an_address_answers_instead_of_the_file_is_one_line(drive, refused, fault, message):
    drive.fault = fault
    said = refused(META)
    assert message in said and META_FILE in said and "--file PATH" in said


def test_a_server_that_cannot_be_reached_is_one_line(drive, refused):
    drive.__exit__()
    for name in (OFFICIAL, META):
        assert "did not arrive whole" in refused(name)


@each
def test_a_drip_is_given_up_and_a_slow_server_is_not(drive, bring, refused, monkeypatch, name):
    monkeypatch.setattr(download, "PATIENCE", 1)
    monkeypatch.setattr(download, "LEAST", 10**9)  # others may be using the network
    drive.fault = "drip"
    begun = time.monotonic()
    assert "nothing more arrived for 1 s" in refused(name)
    assert time.monotonic() - begun < 20
    monkeypatch.setattr(download, "LEAST", 1)
    drive.fault = "slow"
    assert holds(bring(name), bytes_of(drive, name)[1]) and time.monotonic() - begun > 2


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (["readme.txt", FILE], FILE),
        (["jepa-latest.pth.tar"], "jepa-latest.pth.tar"),
        (["ijepa_vit_ti16.pth", "dseq_jepa_vit_ti16.pth"], "dseq_jepa_vit_ti16.pth"),
        (["DSeq-JEPA_ViT-B16.pth", "DSeq-JEPA_ViT-Ti16.pth"], "DSeq-JEPA_ViT-Ti16.pth"),
        ([], "the folder shows no file, it may be empty or no longer public"),
        (["readme.txt", "log.csv"], "the folder holds no checkpoint, but readme.txt, log.csv"),
        (["a.pth", "b.pth"], "the folder holds several checkpoints, and no name tells which is meant (a.pth, b.pth)"),
    ],
)
def test_the_checkpoint_is_found_by_its_name_or_the_names_are_shown(drive, bring, refused, names, taken):
    content = drive.files[FILE]
    drive.files = {name: content if name == taken else b"another file" for name in names}
    if taken in names:
        assert holds(bring(), content)
    else:
        said = refused()
        assert taken in said and "--file PATH" in said and drive_module.address("1folder") in said


class _TouchesAFile:
    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize(
    "kind",
    [
        *("page", "bomb", "other format", "nothing"),
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("archive", "list", "other model", "head")),
    ],
)
@each
def test_a_file_of_another_kind_is_named_and_not_kept(drive, bring, refused, tmp_path, name, kind):
    file, content = bytes_of(drive, name)
    made = tmp_path / "made"
    shapes = layouts.encoder_shapes(class_token=name == OFFICIAL)
    save = layouts.save_official if name == OFFICIAL else layouts.save_ijepa
    if kind == "page":
        made.write_text("<html>no</html>" * 1000)
    elif kind == "archive":
        with zipfile.ZipFile(made, "w") as archive:
            archive.writestr("a.txt", "text")
    elif kind == "bomb":
        made.write_bytes(pickle.dumps(_TouchesAFile(tmp_path / "touched")))
    elif kind == "list":
        torch.save([1, 2], made)
    elif kind == "other model":
        weights = layouts.random_weights(layouts.encoder_shapes(384, class_token=name == OFFICIAL), 1)
        save(made, weights, weights, {})
    elif kind == "other format":
        made.write_bytes(drive.files[META_FILE if name == OFFICIAL else FILE])
    elif kind == "head":
        weights = layouts.random_weights({**shapes, "head.weight": (5, 192), "head.bias": (5,)}, 1)
        save(made, weights, weights, {})
    else:
        made.write_bytes(b"")
    drive.files[file] = made.read_bytes()
    said = refused(name)
    assert f"is not {name}" in said and "--file PATH" in said, said
    assert not (tmp_path / "touched").exists() and not list(unfinished(name).glob("download*"))
    drive.files[file] = content
    assert holds(bring(name), content)


@each
def test_a_file_that_was_brought_by_hand_needs_no_network(drive, bring, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "gdown", None)
    file, content = bytes_of(drive, name)
    (tmp_path / file).write_bytes(content)
    folder = bring(name, tmp_path / file)
    assert holds(folder, content) and not drive.requests
    assert record(folder)["source"] == f"the file {file}" and (tmp_path / file).read_bytes() == content


def test_a_wrong_file_by_hand_is_named_and_costs_neither_it_nor_what_has_arrived(drive, bring, refused, tmp_path):
    assert "nowhere.pth is no file" in refused(file=tmp_path / "nowhere.pth")
    drive.fault, drive.cuts = "cut", -1
    refused()
    wrong = tmp_path / META_FILE
    wrong.write_bytes(drive.files[META_FILE])
    assert f"the file {META_FILE} is not {OFFICIAL}, but holds vit_tiny_patch16_224" in refused(file=wrong)
    assert wrong.is_file() and list(unfinished(OFFICIAL).glob("*.part"))


def test_without_gdown_the_line_names_both_ways(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "gdown", None)
    said = refused()
    assert "pip install 'timm-dseq[drive]'" in said and drive_module.address("1folder") in said and "--file" in said


def test_what_fails_its_checks_is_not_stored(drive, store, monkeypatch):
    monkeypatch.setattr(
        "timm_dseq.hub.store.get.verify", lambda folder: {"stock timm": {"ok": False, "seen": "difference 0.1"}}
    )
    with pytest.raises(UserError, match=r"does not load as it should \(stock timm: difference 0.1\)"):
        get(OFFICIAL, say=lambda line: None)
    assert only(store) == [f".{OFFICIAL}"]


def test_what_is_here_is_listed_and_removed(drive, store, bring, refused):
    assert {row["name"]: row["folder"] for row in listing()}[OFFICIAL] is None
    folder = bring()
    drive.fault, drive.cuts = "cut", -1
    with pytest.raises(UserError):
        bring(META)
    here = {row["name"]: row for row in listing()}
    assert here[OFFICIAL]["folder"] == str(folder) and here[OFFICIAL]["record"]["size"] > 0 and not here[META]["folder"]
    for name in (OFFICIAL, META):
        assert remove(name)["freed"] > 10**7
        with pytest.raises(UserError, match="is not in the store"):
            remove(name)
    assert only(store) == []


def test_a_name_that_cannot_be_brought_gets_a_hint():
    for call in (get, remove):
        with pytest.raises(UserError, match=r"maybe dseq_jepa_vit_b16.in1k_official.*: timm-dseq get --list"):
            call("dseq_jepa_vit_b16.in1k_offical")
