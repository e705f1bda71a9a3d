"""The store holds weights whole or not at all: two that ask at once, kills, disks that are full or only readable."""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections import namedtuple
from functools import partial

import pytest
import timm
import torch

from timm_dseq import UserError
from timm_dseq.hub.store import folders
from timm_dseq.hub.store.get import get, remove

from ...conftest import ROOT
from .test_get import bytes_of, each, holds
from .tiny_sources import META, META_FILE, OFFICIAL, only

CODE = """
import os, signal, sys
from tests.drive_server import redirected
from tests.hub.store import tiny_sources
from timm_dseq.cli import main
from timm_dseq.hub.store import folders, get

url, name, death = sys.argv[1:]
tiny_sources.register(f"{url}/plain/{tiny_sources.META_FILE}")
get.verify = lambda folder: {}

def kill(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

if death == "amid the conversion":
    sys.modules["timm_dseq.hub.convert"].save_tensors = kill
if death == "before its name":
    folders.publish = kill
with redirected(url):
    sys.exit(main(["get", name]))
"""


@pytest.fixture
def process(drive, store):
    """Start `timm-dseq get` in a process, with the test's store; it kills itself at the moment that is named."""
    started = []

    def process(name, death=""):
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "HF_ASSETS_CACHE": str(store.parents[2]), "PYTHONPATH": path}
        command = [sys.executable, "-c", CODE, drive.url, name, death]
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield process
    for one in started:
        if one.poll() is None:
            one.kill()
            one.communicate()


@pytest.mark.slow
def test_two_that_ask_at_once_bring_it_once(drive, store, process, unverified):
    drive.pause = 0.2
    other = process(OFFICIAL)
    while not list(store.glob(f".{OFFICIAL}/*.part")):
        time.sleep(0.05)
        assert other.poll() is None
    lines = []
    assert not get(OFFICIAL, say=lines.append)["new"]
    assert lines == [f"{OFFICIAL}: another process is at it, waiting for its end"]
    assert "now in the store" in other.communicate()[0] and other.returncode == 0
    assert holds(store / OFFICIAL, bytes_of(drive, OFFICIAL)[1]) and only(store) == [OFFICIAL]
    assert sum(path == "/uc" for path, _ in drive.requests) == 1


@pytest.mark.slow
@each
def test_a_kill_amid_the_download_costs_little_of_it(drive, store, process, bring, name):
    drive.pause = 0.3
    one = process(name)
    while not list(store.glob(f".{name}/*.part")) or next(store.glob(f".{name}/*.part")).stat().st_size < 8 * 2**20:
        time.sleep(0.05)
        assert one.poll() is None
    one.send_signal(signal.SIGKILL)
    one.wait()
    assert not folders.stored(name)
    drive.pause = 0.0
    folder = bring(name)
    (asked,) = drive.ranges()
    assert holds(folder, bytes_of(drive, name)[1]) and int(asked[6:-1]) >= 7 * 2**20 and only(store) == [name]


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["amid the conversion", "before its name"])
def test_a_kill_at_any_later_moment_leaves_nothing_half(drive, store, process, bring, moment):
    one = process(META, moment)
    one.communicate()
    assert one.returncode == -signal.SIGKILL
    _, content = bytes_of(drive, META)
    assert not folders.stored(META) and not (store / META).exists()
    asked = len(drive.requests)
    assert holds(bring(META), content)
    assert len(drive.requests) == asked  # all of it had arrived
    timm.create_model(META, pretrained=True)


def killed_before(change: int, work) -> bool:
    """Do it in a process that is killed before its n-th change of a file in the store; False if it makes fewer."""
    child = os.fork()
    if not child:
        changes = itertools.count(1)

        def look(event, arguments):
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            writes = writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
            if writes and next(changes) == change:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(look)
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] == signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize(
    "start", ["empty", pytest.param("damaged", marks=pytest.mark.large), pytest.param("whole", marks=pytest.mark.large)]
)
def test_after_a_kill_before_any_change_of_the_store_the_same_command_goes_on(drive, store, bring, tmp_path, start):
    """Brought from nothing, brought anew, and removed."""
    (tmp_path / META_FILE).write_bytes(drive.files[META_FILE])
    for change in itertools.count(1):
        folders.remove(META)
        if start != "empty":
            bring(META, tmp_path / META_FILE)
        if start == "damaged":
            (store / META / "model.safetensors").unlink()
        work = partial(remove, META) if start == "whole" else partial(get, META, tmp_path / META_FILE)
        if not killed_before(change, partial(work, say=lambda line: None)):
            break
        if folders.stored(META) and not folders.damage(store / META, thorough=True):
            timm.create_model(META, pretrained=True)
        assert holds(bring(META, tmp_path / META_FILE), drive.files[META_FILE]) and only(store) == [META]
    assert change > 4


Usage = namedtuple("Usage", "total used free")


def test_the_room_is_checked_before_the_bytes_come(drive, refused, bring, monkeypatch):
    for name in (OFFICIAL, META):
        _, content = bytes_of(drive, name)
        with monkeypatch.context() as patch:
            usage = Usage(0, 0, len(content) + 2**20)
            patch.setattr(folders.shutil, "disk_usage", lambda path, usage=usage: usage)
            said = refused(name)
        assert "has room for" in said and f"{name} takes" in said and "HF_HOME" in said
        bring(name)


def mounted(folder, *options):
    """Mount a small disk, as only root may."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root may make a disk")


@pytest.mark.parametrize("size", [10, 40])  # full amid the download, and amid the conversion
def test_a_disk_that_gets_full_is_named_and_what_has_arrived_stays(
    drive, store, unverified, quick, tmp_path, monkeypatch, size
):
    usage = Usage(0, 0, 10**12)  # another program takes the room only later
    mounted(tmp_path / "assets", "-o", f"size={size}m")
    try:
        for name in (OFFICIAL, META):
            with monkeypatch.context() as patch:
                patch.setattr(folders.shutil, "disk_usage", lambda path: usage)
                with pytest.raises(UserError, match=r"cannot be written \((No space left|.*)") as error:
                    get(name, say=lambda line: None)
            assert "\n" not in str(error.value) and not folders.stored(name)
            assert f"timm-dseq get --remove {name} frees it" in str(error.value)
            arrived = list(folders.unfinished(name).glob("download*"))
            assert arrived and max(path.stat().st_size for path in arrived) > 2**22
            subprocess.run(["mount", "-o", "remount,size=200m", tmp_path / "assets"], check=True)
            get(name, say=lambda line: None)
            assert holds(folders.store() / name, bytes_of(drive, name)[1])
            folders.remove(name)
            subprocess.run(["mount", "-o", f"remount,size={size}m", tmp_path / "assets"], check=True)
    finally:
        subprocess.run(["umount", "-l", str(tmp_path / "assets")], check=True)


def test_a_store_that_may_only_be_read_is_read_and_named_where_it_would_be_written(drive, unverified, store, tmp_path):
    mounted(tmp_path / "assets", "-o", "size=200m")
    try:
        get(OFFICIAL, say=lambda line: None)
        subprocess.run(["mount", "-o", "remount,ro", tmp_path / "assets"], check=True)
        drive.requests.clear()
        assert not get(OFFICIAL, say=lambda line: None)["new"]
        assert timm.create_model(OFFICIAL, pretrained=True)(torch.zeros(1, 3, 224, 224)).shape == (1, 192)
        for name, file in ((META, None), (META, tmp_path / META_FILE)):
            (tmp_path / META_FILE).write_bytes(drive.files[META_FILE])
            with pytest.raises(UserError, match=r"cannot be written \(Read-only file system\): set HF_HOME") as error:
                get(name, file, say=lambda line: None)
            assert "\n" not in str(error.value)
        assert not drive.requests
    finally:
        subprocess.run(["umount", "-l", str(tmp_path / "assets")], check=True)


def test_a_store_that_others_own_is_named(drive, unverified, store, monkeypatch):
    """As on a machine where one is not root."""

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(store / ".lock"))

    monkeypatch.setattr(folders, "WeakFileLock", denied)
    with pytest.raises(UserError, match=r"\.lock cannot be written \(Permission denied\): .*HF_HOME"):
        get(OFFICIAL, say=lambda line: None)
    assert not drive.requests
