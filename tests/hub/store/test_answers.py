"""What a server may send beside or instead of a file: it is measured, not unpacked, and named for what it is."""

import socket
import threading
import time

import pytest

from timm_dseq.hub import download
from timm_dseq.hub.store import arrival
from timm_dseq.hub.store.folders import record, unfinished
from timm_dseq.hub.store.get import get

from .test_get import bytes_of, each, holds, other
from .tiny_sources import FILE, META, META_FILE, OFFICIAL


def kept(name: str) -> int:
    """Bytes of a download that are kept."""
    return sum(path.stat().st_size for path in unfinished(name).glob("download*.part"))


@pytest.fixture
def traffic():
    """Other traffic of this machine."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        other_end = server.accept()[0]
    stop = threading.Event()

    def send():
        while not stop.is_set():
            one.sendall(bytes(2**16))

    def receive():
        while other_end.recv(2**16):
            pass

    threads = [threading.Thread(target=send), threading.Thread(target=receive)]
    for thread in threads:
        thread.start()
    yield
    stop.set()
    threads[0].join()
    one.close()
    threads[1].join()
    other_end.close()


@each
def test_a_drip_is_given_up_whatever_else_the_machine_receives(drive, refused, traffic, monkeypatch, name):
    monkeypatch.setattr(download, "PATIENCE", 2)
    drive.fault = "drip"
    begun = time.monotonic()
    assert "nothing more arrived for 2 s" in refused(name)
    assert time.monotonic() - begun < 20


@each
def test_a_body_without_end_fills_no_disk(drive, bring, refused, monkeypatch, name):
    monkeypatch.setattr(arrival, "ENCODERS", 1)
    drive.fault = "endless"
    said = refused(name)
    assert "no checkpoint of it is so large, so they were removed" in said and not kept(name)
    drive.fault = None
    bring(name)


@each
def test_what_is_packed_fills_no_disk_as_it_is_unpacked(drive, refused, monkeypatch, name):
    """Of an address nothing is unpacked; gdown does it, and the length that was announced is no measure then."""
    monkeypatch.setattr(arrival, "ENCODERS", 1)
    drive.files[bytes_of(drive, name)[0]] = bytes(2**25)
    drive.fault = "packed"
    said = refused(name)
    assert {OFFICIAL: "no checkpoint of it is so large", META: "packed the file (gzip)"}[name] in said and not kept(
        name
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\n<!DOCTYPE html><html>no</html>", "the server sent a web page (text/html) instead of the file"),
        (b"\x1f\x8b\x08\0\0\0", "the server sent a gzip archive instead of the file"),
        (b"", "the server sent an empty file (0 bytes) instead of the file"),
    ],
)
@each
def test_what_is_no_checkpoint_at_first_sight_is_named(drive, refused, tmp_path, name, content, words):
    drive.files[bytes_of(drive, name)[0]] = content
    assert words in refused(name)
    (tmp_path / "given").write_bytes(content)
    assert f"the file given is not {name} (it is a" in refused(name, tmp_path / "given")


def test_a_page_of_the_network_is_named_and_costs_nothing_that_has_arrived(drive, bring, refused):
    drive.fault, drive.cuts = "cut", -1
    refused(META)
    before = kept(META)
    drive.fault = "portal"
    assert "the server sent a web page (text/html) instead of the file" in refused(META) and kept(META) == before > 0
    drive.fault = None
    asked = len(drive.ranges())
    bring(META)
    assert len(drive.ranges()) == asked + 1


def test_a_part_of_a_file_of_another_length_is_not_gone_on_with(drive, bring, refused, tmp_path):
    """Though the server calls both by one name."""
    drive.version = '"one"'
    drive.fault, drive.cuts = "cut", -1
    refused(META)
    drive.fault = None
    drive.files[META_FILE] = other(drive.files[META_FILE], META, tmp_path, longer=True)
    assert holds(bring(META), drive.files[META_FILE])


def test_a_part_that_nobody_asked_for_is_refused(drive, refused):
    drive.fault = "unasked"
    assert "the server sent a part that was not asked for" in refused(META) and not kept(META)


def test_the_record_says_where_an_address_led_without_its_keys(drive, bring):
    drive.fault = "moved"
    said = record(bring(META))["source"]
    assert f"/plain/{META_FILE} (which led to {drive.url}/other/{META_FILE})" in said and "secret" not in said


@pytest.mark.parametrize(("fault", "words"), [("loop", "answers 302 ("), ("ftp", "it leads to ftp://127.0.0.1/x")])
def test_a_redirect_that_leads_nowhere_is_one_line(drive, refused, fault, words):
    drive.fault = fault
    said = refused(META)
    assert words in said and "\\n" not in said


def test_a_name_on_the_drive_reaches_no_terminal_raw(drive, store, unverified, capsys):
    drive.files = {f"\x1b[2J\x07{FILE}": drive.files[FILE]}
    get(OFFICIAL)
    said = record(store / OFFICIAL)["source"]
    assert "\x1b" not in capsys.readouterr().out + said and r"\x1b[2J" in said


def test_going_on_is_promised_only_where_it_can_be(drive, refused):
    drive.__exit__()
    for name in (OFFICIAL, META):
        said = refused(name)
        assert "give the same command again; or " in said and "goes on from there" not in said
