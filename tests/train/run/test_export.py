"""What leaves the machine tells nothing of it, and a folder is complete or not there."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from common.run.export import blocked, next_steps, public_name, replacing


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("ILSVRC/imagenet-1k", "ILSVRC/imagenet-1k"),
        ("scenes", "scenes"),
        ("{here}", "birds"),
        ("{here}/", "birds"),
        (".", "birds"),
        ("./", "birds"),
        ("../birds", "birds"),
        ("{here}/train.parquet", "train.parquet"),
        ("{here}/gone", "gone"),
        ("~/gone", "gone"),
        ("cub:{here}", "cub:birds"),
        ("imagenet:../birds", "imagenet:birds"),
        ("cub", "cub"),
    ],
)
def test_a_card_names_the_folder_and_not_the_way_there(path, name, tmp_path, monkeypatch):
    here = tmp_path / "birds"
    here.mkdir()
    (here / "train.parquet").write_text("")
    monkeypatch.chdir(here)
    assert public_name(path.format(here=here)) == name


def test_a_folder_takes_its_place_when_it_is_complete(tmp_path):
    for content in ("first", "second"):
        with replacing(tmp_path / "export") as fresh:
            fresh.mkdir()
            (fresh / "file").write_text(content)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "export") as fresh:
        fresh.mkdir()
        raise ZeroDivisionError
    assert (tmp_path / "export" / "file").read_text() == "second"


def leaks(folder: Path, *secrets: object) -> list[str]:
    """Files of a folder that hold one of these words, in their text or their header."""
    wanted = re.compile("|".join(rf"(?<!\w){re.escape(str(secret))}(?!\w)" for secret in secrets).encode())
    return [path.name for path in folder.iterdir() if wanted.search(readable(path))]


def readable(path: Path) -> bytes:
    """All of a file but tensors."""
    content = path.read_bytes()
    return content[8:][: int.from_bytes(content[:8], "little")] if path.suffix == ".safetensors" else content


def test_what_else_lies_in_the_folder_stays(tmp_path):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "mine.txt").write_text("mine")
    (tmp_path / "export" / "model.safetensors").write_text("of before")
    (tmp_path / "export" / "config.json").write_text("of before")
    with replacing(tmp_path / "export") as fresh:
        fresh.mkdir()
        (fresh / "model.safetensors").write_text("new")
    found = {path.name: path.read_text() for path in (tmp_path / "export").iterdir()}
    assert found == {"mine.txt": "mine", "model.safetensors": "new"}


@pytest.mark.parametrize("name", ["export", "pictures", "log.jsonl"])
def test_a_link_in_the_place_of_what_a_run_makes_is_in_the_way(name, tmp_path):
    assert blocked(tmp_path) is None
    (tmp_path / "real").mkdir()
    (tmp_path / name).symlink_to("real" if name != "log.jsonl" else "nowhere")
    assert f"{name} is in the way" in blocked(tmp_path)


@pytest.mark.parametrize("folder", ["run", "my run", "it's", 'a "b" $HOME `c`'])
def test_what_to_do_next_can_be_pasted_into_a_shell(folder):
    trial = f"print({json.dumps(folder)})"
    verify, trial, push = next_steps(Path(folder), trial).splitlines()[1:]
    assert shlex.split(verify) == ["timm-dseq", "verify", folder]
    assert shlex.split(push) == ["timm-dseq", "push", folder, "ORGANISATION/NAME"]
    said = subprocess.run(trial.replace("python", sys.executable, 1), shell=True, capture_output=True, text=True)
    assert said.stdout == f"{folder}\n", said.stderr
