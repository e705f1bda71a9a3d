"""Whatever cannot be opened as a data set of images is one line, before any long work."""

import os
import pickle
import tarfile
import threading
import time

import datasets
import numpy as np
import pytest
from common.data.framing import Framing
from common.data.opening import open_rows, opening
from common.data.opening import test_split as split_to_test
from common.data.scenes import Scenes
from common.data.settings import Data
from common.data.source import first_of_stream, open_source
from common.data.stream import Stream
from PIL import Image
from pyarrow import ArrowNotImplementedError
from yaml.constructor import ConstructorError

from timm_dseq import UserError
from timm_dseq.hub import download

from .test_source import encoded, parquet_of


def no_archive(folder):
    (folder / "data").mkdir()
    (folder / "data" / "train-0.tar").write_bytes(b"hello")
    return Data(path=str(folder / "data"))


def unpicklable(folder):
    """A shard with a member that `datasets` loads by torch."""
    (folder / "shards").mkdir()
    (folder / "0.pth").write_bytes(b"hello")
    with tarfile.open(folder / "shards" / "train-0.tar", "w") as tar:
        tar.add(folder / "0.pth", "0.pth")
    return Data(path=str(folder / "shards"))


def card_with_a_tag(folder):
    (folder / "data").mkdir()
    parquet_of(folder / "data" / "train-0.parquet")
    (folder / "data" / "README.md").write_text("---\nconfigs: !!python/object:os.system {}\n---\n")
    return Data(path=str(folder / "data"))


def numbers_as_images(folder):
    return Data(path=parquet_of(folder / "x.parquet", size=list(range(12))), image="size")


def several_images(folder, images=None):
    """`datasets` makes one image of a list, be it of numbers or of images."""
    kinds = {"image": datasets.List(datasets.Image())} if images is None else {}
    images = images or [[encoded(Image.new("RGB", (8, 8)), "PNG")] * 2] * 3
    features = datasets.Features(kinds) if kinds else None
    datasets.Dataset.from_dict({"image": images}, features=features).to_parquet(folder / "x.parquet")
    return Data(path=str(folder / "x.parquet"), image="image")


def numbers_called_image(folder):
    datasets.Dataset.from_dict({"image": [1, 2]}).to_parquet(folder / "x.parquet")
    return Data(path=str(folder / "x.parquet"))


WRONG = {
    "a .tar that is none": no_archive,
    "a shard with a damaged pickle": unpicklable,
    "a card with a tag of YAML": card_with_a_tag,
    "no path": lambda folder: Data(path=""),
    "numbers as images": numbers_as_images,
    "numbers in a column called image": numbers_called_image,
    "several images in each row": lambda folder: several_images(folder),
    "pixels as lists of numbers": lambda folder: several_images(folder, [[[[0, 1, 2]]]] * 3),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize(
    "door",
    [
        open_source,
        lambda data: first_of_stream(data, 4),
        lambda data: next(Stream(data, Framing(0, 32, (0.5, 1.0)), 0, 1, 4)),
    ],
    ids=["numbered", "first of a stream", "stream"],
)
def test_a_data_set_that_cannot_be_opened_is_one_line(wrong, door, tmp_path):
    data = WRONG[wrong](tmp_path)
    data.workers = 0
    with pytest.raises(UserError) as error:
        door(data)
    assert "\n" not in str(error.value) and "data" in str(error.value)


@pytest.mark.parametrize("wrong", ["a .tar that is none", "a card with a tag of YAML"])
def test_looking_for_a_test_split_is_one_line_too(wrong, tmp_path, monkeypatch):
    data = WRONG[wrong](tmp_path)
    monkeypatch.setattr(datasets, "get_dataset_split_names", _raising(tarfile.ReadError("not a gzip file")))
    with pytest.raises(UserError, match=r"cannot be opened \(ReadError: not a gzip file\): check data\.path") as error:
        split_to_test(data.path, None)
    assert "\n" not in str(error.value)


class NetworkError(Exception):
    """As those of httpx: no OSError, no ValueError."""


def _raising(error):
    def function(*_, **__):
        raise error

    return function


@pytest.mark.parametrize(
    "error",
    [
        tarfile.ReadError("not a tar"),
        ConstructorError(None, None, "could not\ndetermine a constructor"),
        pickle.UnpicklingError("invalid load key"),
        IndexError("list index out of range"),
        NetworkError("Request URL is missing a protocol"),
        ArrowNotImplementedError("Unsupported cast"),
        KeyError("splits"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_datasets_raises_is_one_line_with_its_kind(error, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", _raising(error))
    with pytest.raises(
        UserError, match=rf"^lab/photos, split train, cannot be opened \({type(error).__name__}: "
    ) as one:
        open_source(Data(path="lab/photos"))
    assert "\n" not in str(one.value)


def test_an_end_that_is_asked_for_is_no_error_of_the_data():
    for ending in (KeyboardInterrupt, SystemExit):
        with pytest.raises(ending), opening("some data"):
            raise ending
    with pytest.raises(UserError, match="as it was"), opening("some data"):
        raise UserError("as it was")


@pytest.mark.parametrize("labels", [[0, None, 2], [0, -1, 2], [None, None, None]])
def test_images_without_a_label_are_counted_and_cost_no_more(labels, tmp_path):
    source = open_source(Data(path=parquet_of(tmp_path / "x.parquet", count=3, label=labels)))
    assert source.labels(range(3)).tolist() == [-1 if label is None else label for label in labels]
    missing = sum(label in (None, -1) for label in labels)
    assert source.label_fault() == f"{missing} images have no label (null or -1)"


def test_scenes_are_not_drawn_to_check_their_labels(monkeypatch):
    monkeypatch.setattr(Scenes, "__getitem__", lambda *_: pytest.fail("drawn"))
    assert open_source(Data(path="scenes")).label_fault() is None


@pytest.mark.parametrize("largest", [10**9, 2**62])
def test_a_label_far_beyond_any_number_of_classes_is_a_fault(largest, tmp_path):
    source = open_source(Data(path=parquet_of(tmp_path / "x.parquet", count=3, label=[0, 1, largest])))
    assert source.label_fault() == f"a label is {largest}, and classes are numbered from 0 to 99999 at most"


def test_a_label_that_its_names_do_not_cover_is_a_fault(tmp_path):
    source = open_source(Data(path=parquet_of(tmp_path / "x.parquet", count=3, label=[0, 1, 1])))
    assert source.label_fault() is None
    rows = source.rows.cast_column("label", datasets.ClassLabel(names=["a", "b"]))
    assert np.array_equal(open_source_of(rows, tmp_path).labels([0, 2]), [0, 1])


def open_source_of(rows, folder):
    rows.to_parquet(folder / "y.parquet")
    source = open_source(Data(path=str(folder / "y.parquet")))
    assert source.names == ("a", "b") and source.classes == 2 and source.label_fault() is None
    return source


@pytest.mark.timeout(60)  # a FIFO waits for ever for somebody who writes
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs")
def test_links_to_nothing_and_fifos_in_a_folder_are_counted_and_named(tmp_path, capsys):
    """`datasets` leaves them out, and a training set that shrinks in silence is no good."""
    folder = tmp_path / "train" / "cats"
    folder.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "whole.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    (folder / "linked.png").symlink_to(tmp_path / "outside.png")
    (folder / "notes.txt").symlink_to(tmp_path / "no-such-file")
    rows, _, _ = open_rows(Data(path=str(tmp_path)), "train")
    assert len(rows) == 2 and capsys.readouterr().out == ""
    os.mkfifo(folder / "pipe.jpg")
    (folder / "lost.JPG").symlink_to(tmp_path / "no-such-file")
    rows, _, _ = open_rows(Data(path=str(tmp_path)), "train")
    said = capsys.readouterr().out
    assert len(rows) == 2 and said.startswith("left out: 2 files of"), said
    assert "pipe.jpg" in said or "lost.JPG" in said
    odd = tmp_path / "train" / "cats\nand dogs"
    odd.mkdir()
    Image.new("RGB", (8, 8)).save(odd / "a.png")
    Image.new("RGB", (8, 8)).save(folder / ".hidden.png")  # nobody expects it to be taken
    rows, _, _ = open_rows(Data(path=str(tmp_path)), "train")
    said = capsys.readouterr().out
    lost = 5 - len(rows)
    assert said.startswith(f"left out: {lost} files") and said.count("\n") == 1, said


def test_a_folder_that_is_a_link_loses_nothing(tmp_path, capsys):
    folder = tmp_path / "there" / "train" / "cats"
    folder.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "whole.png")
    (tmp_path / "here").symlink_to(tmp_path / "there")
    rows, _, _ = open_rows(Data(path=str(tmp_path / "here")), "train")
    assert len(rows) == 1 and capsys.readouterr().out == ""


def rows_that_name(*paths):
    values = [{"bytes": None, "path": str(path)} for path in paths]
    return datasets.Dataset.from_dict({"image": values}, features=datasets.Features({"image": datasets.Image()}))


@pytest.fixture
def of_others(monkeypatch, tmp_path):
    """A function: from now on `lab/photos` on the Hub is this data set. Downloads lie in tmp_path / "cache"."""
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(tmp_path / "cache"))

    def of_others(rows):
        loaded = lambda *_, streaming=False, **__: rows.to_iterable_dataset() if streaming else rows  # noqa: E731
        monkeypatch.setattr(datasets, "load_dataset", loaded)
        return Data(path="lab/photos", image="image", workers=0)

    return of_others


def test_a_data_set_of_others_names_no_file_of_this_machine_as_its_image(tmp_path, of_others):
    """Pictures of a run are published: a hostile Parquet file could ask for any image of its user."""
    private, downloaded = tmp_path / "private.png", tmp_path / "cache" / "hub" / "a.png"
    downloaded.parent.mkdir(parents=True)
    for path in (private, downloaded):
        Image.new("RGB", (8, 8)).save(path)
    rows_that_name(private).to_parquet(tmp_path / "own.parquet")
    assert open_source(Data(path=str(tmp_path / "own.parquet"))).picture(0)  # what lies here may name what lies here
    assert open_source(of_others(rows_that_name(downloaded))).picture(0).size == (8, 8)
    for path in (private, tmp_path / "cache" / ".." / "private.png"):
        with pytest.raises(UserError, match=f"lab/photos names {path}, a file of this machine"):
            open_source(of_others(rows_that_name(downloaded, path)))


def test_a_stream_of_others_reads_no_file_of_this_machine(tmp_path, of_others):
    Image.new("RGB", (8, 8)).save(tmp_path / "private.png")
    data = of_others(rows_that_name(*[tmp_path / "private.png"] * 8))
    with pytest.raises(UserError, match=r"4 images in a row cannot be read, the first .*there is no image"):
        next(Stream(data, Framing(0, 32, (0.5, 1.0)), 0, 1, 4))


def test_a_hub_that_sends_nothing_more_of_a_data_set_is_left(monkeypatch):
    monkeypatch.setattr(download, "LONG", 0.5)
    monkeypatch.setattr(download, "_received", lambda: 0)
    given_up = threading.Event()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: given_up.wait())
    with pytest.raises(UserError, match=r"^lab/photos: nothing more arrived for 0\.5 s: check the network"):
        open_source(Data(path="lab/photos"))
    given_up.set()


def test_a_data_set_that_is_being_prepared_is_waited_for(monkeypatch, tmp_path):
    """Its preparation computes, and receives nothing."""
    rows = rows_that_name(tmp_path)
    monkeypatch.setattr(download, "LONG", 0.3)
    monkeypatch.setattr(download, "_received", lambda: 0)
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(tmp_path.parent))

    def computing(*_, **__):
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            pass
        return rows

    monkeypatch.setattr(datasets, "load_dataset", computing)
    assert len(open_source(Data(path="lab/photos"))) == 1


def test_words_are_names_of_classes(tmp_path):
    words = ["cow", "ant", None, "cow"]
    source = open_source(Data(path=worded(tmp_path / "x.parquet", words)))
    assert source.names == ("ant", "cow") and source.classes == 2
    assert source.labels(range(4)).tolist() == [1, 0, -1, 1]
    assert source.label_fault() == "1 images have no label (null or -1)"
    first = first_of_stream(Data(path=str(tmp_path / "x.parquet")), 4)
    assert first.names == ("ant", "cow") and first.all_labels().tolist() == [1, 0, -1, 1]


def test_captions_are_no_classes_unless_the_user_says_so(tmp_path):
    path = worded(tmp_path / "x.parquet", ["a red cow", "an ant", "two cows", "an ant"])
    assert open_source(Data(path=path)).label is None
    assert open_source(Data(path=path, label="label")).classes == 3


def worded(path, words):
    images = [encoded(Image.new("RGB", (8, 8)), "PNG")] * len(words)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    datasets.Dataset.from_dict({"image": images, "label": words}, features=features).to_parquet(path)
    return str(path)
