"""What stands in the store under a name, and is not as `get` left it: it blocks nothing, and is mended or removed."""

import json
import os
import shutil
from pathlib import Path

import pytest
import timm

from timm_dseq import UserError
from timm_dseq.cli import main
from timm_dseq.hub.store import folders
from timm_dseq.hub.store.get import get, listing, remove

from .test_get import bytes_of, holds
from .tiny_sources import FILE, OFFICIAL, only


def test_what_a_killed_removal_leaves_blocks_nothing(drive, store, bring):
    bring().rename(folders.unfinished(OFFICIAL))
    assert holds(bring(), bytes_of(drive, OFFICIAL)[1]) and only(store) == [OFFICIAL]
    bring().rename(folders.unfinished(OFFICIAL))
    assert remove(OFFICIAL)["freed"] > 2**24 and only(store) == []


def without_record(entry):
    entry.mkdir()
    (entry / "model.safetensors").write_bytes(b"what")


@pytest.mark.parametrize(
    "make", [without_record, lambda entry: entry.write_bytes(b"what"), lambda entry: entry.symlink_to("nowhere")]
)
@pytest.mark.parametrize("unfinished", [False, True])
def test_what_is_no_entry_is_replaced_or_removed(drive, store, bring, make, unfinished):
    place = folders.unfinished(OFFICIAL) if unfinished else store / OFFICIAL
    make(place)
    assert holds(bring(), bytes_of(drive, OFFICIAL)[1]) and only(store) == [OFFICIAL]
    remove(OFFICIAL)
    make(place)
    remove(OFFICIAL)
    assert only(store) == []


def test_an_entry_on_another_disk_is_used_and_only_the_link_is_removed(drive, store, bring, tmp_path, capsys):
    elsewhere = tmp_path / "large"
    shutil.move(bring(), elsewhere)
    (store / OFFICIAL).symlink_to(elsewhere)
    asked = len(drive.requests)
    bring()
    assert len(drive.requests) == asked
    timm.create_model(OFFICIAL, pretrained=True)
    assert (
        main(["get", "--remove", OFFICIAL]) == 0 and f"what it leads to, {elsewhere}, stays" in capsys.readouterr().out
    )
    assert only(store) == [] and len(list(elsewhere.iterdir())) == 4
    folders.unfinished(OFFICIAL).symlink_to(elsewhere)  # as a kill amid that leaves it
    bring()
    assert only(store) == [OFFICIAL] and len(list(elsewhere.iterdir())) == 4


def shorten(file):
    file.write_bytes(file.read_bytes()[: 10**6])


def alter(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("harm", [shorten, alter, lambda file: file.unlink()])
def test_weights_that_were_damaged_are_brought_anew(drive, store, bring, harm):
    said = folders.record(bring())["weights"]
    file = store / OFFICIAL / "model.safetensors"
    assert said["size"] == file.stat().st_size
    harm(file)
    lines = []
    assert get(OFFICIAL, say=lines.append)["new"] and "is damaged in the store, so it is brought anew" in lines[0]
    assert holds(store / OFFICIAL, bytes_of(drive, OFFICIAL)[1]) and only(store) == [OFFICIAL]


def test_weights_of_another_size_are_seen_as_they_are_loaded(drive, bring):
    record = folders.record(folder := bring())
    record["weights"]["size"] += 1
    (folder / "source.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(UserError, match=f"not as it was stored.*timm-dseq get {OFFICIAL} brings it anew"):
        timm.create_model(OFFICIAL, pretrained=True)


@pytest.mark.parametrize("text", ["[]", "1", "{", "[" * 10**5, '{"weights": []}', '{"name": 1, "new": 2}'])
def test_a_record_of_any_content_is_no_fault(drive, store, bring, capsys, text):
    (bring() / "source.json").write_text(text, encoding="utf-8")
    timm.create_model(OFFICIAL, pretrained=True)
    assert main(["get", OFFICIAL]) == 0 and "already in the store" in capsys.readouterr().out
    assert {row["name"]: row["folder"] for row in listing()}[OFFICIAL] == str(store / OFFICIAL)


@pytest.mark.parametrize("home", ["", "relative/assets"])
def test_a_store_that_would_move_with_the_working_directory_is_refused(drive, monkeypatch, tmp_path, home):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", home)
    assert folders.stored(OFFICIAL) is None
    with pytest.raises(UserError, match=r"HF_HOME or HF_ASSETS_CACHE makes .* no whole path"):
        get(OFFICIAL, say=print)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["-", "folder", "fifo"])
def test_a_file_that_is_none_is_named_before_anything_is_done(drive, store, unverified, tmp_path, kind):
    file = Path("-") if kind == "-" else tmp_path / kind
    if kind == "folder":
        file.mkdir()
    if kind == "fifo":
        os.mkfifo(file)
    with pytest.raises(UserError, match="is no file: give the checkpoint"):
        get(OFFICIAL, file, say=print)
    assert only(store) == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--remove"], "no NAME.TAG is given"),
        (["--file", FILE], "no NAME.TAG is given"),
        ([OFFICIAL, "--list"], "--list shows all: give it alone"),
        (["--list", "--remove"], "--list shows all: give it alone"),
        ([OFFICIAL, "--remove", "--file", FILE], "--remove takes no --file"),
    ],
)
def test_words_that_do_not_go_together_are_an_error(store, drive, capsys, words, says):
    assert main(["get", *words]) == 1
    printed = capsys.readouterr()
    assert says in printed.err and not printed.out and only(store) == []
