"""docs/releasing.md, rehearsed: its commands, from a run's export to pretrained=True on a fresh machine, and back."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ..conftest import ROOT

DOC = (ROOT / "docs" / "releasing.md").read_text()
NAME = "dseq_jepa_vit_ti16.in1k"
REPO = f"lab/{NAME}"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOC, re.DOTALL)


@pytest.fixture
def shell(tmp_path):
    """Run a block of the document on a machine with an empty cache; returns the finished process."""

    def shell(block: str, machine: str, package: Path = ROOT, **words: str) -> subprocess.CompletedProcess:
        for word, meant in {"RUN/export": "run/export", "ORGANISATION": "lab", "NAME": NAME, **words}.items():
            block = block.replace(word, meant)
        environment = {
            **os.environ,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": str(package),
            "HF_HOME": str(tmp_path / machine),
        }
        return subprocess.run(
            ["bash", "-ec", block], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300
        )

    return shell


@pytest.mark.slow
def test_a_release_and_its_end(hub, complete, shell, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    hub.token = "hf_writer"
    shutil.copytree(complete, tmp_path / "run" / "export")
    push, tag, load, back = blocks("bash")

    pushed = shell(push, "ours")
    assert pushed.returncode == 0 and "ok    arrived" in pushed.stdout, pushed.stderr
    (commit,) = re.findall(r"/commit/(\w+)", pushed.stdout)
    tagged = shell(tag, "ours", COMMIT=commit)
    assert tagged.returncode == 0, tagged.stderr
    assert hub.repos[REPO].branches["v1"] == commit == hub.repos[REPO].branches["main"]

    package = tmp_path / "package"
    shutil.copytree(ROOT / "timm_dseq", package / "timm_dseq", ignore=shutil.ignore_patterns("__pycache__"))
    (line,) = blocks("python")
    line = line.replace("ORGANISATION", "lab").replace("NAME", NAME).replace("COMMIT", commit)
    source = package / "timm_dseq" / "dseq_jepa.py"
    before = source.read_text()
    assert before.count("PUBLISHED: dict[str, str] = {}") == 1
    source.write_text(before.replace("PUBLISHED: dict[str, str] = {}", line.strip()))

    monkeypatch.delenv("HF_TOKEN")
    hub.repos[REPO].commit("main", {"model.safetensors": b"pushed over the release"}, "spoil")
    hub.requests.clear()
    asked = f"/{REPO}/resolve/{commit}/model.safetensors"
    loaded = shell(load, "theirs", package)
    assert loaded.returncode == 0, loaded.stderr
    assert hub.downloads() == 1 and ("GET", asked) in hub.requests
    (file,) = (tmp_path / "theirs").rglob("model.safetensors")
    digest = hashlib.sha256((tmp_path / "run" / "export" / "model.safetensors").read_bytes()).hexdigest()
    assert hashlib.sha256(file.read_bytes()).hexdigest() == digest == file.resolve().name

    hub.fault = "flip"
    damaged = shell(load, "another", package)
    assert damaged.returncode and "arrived damaged (its SHA-256 is not the announced one)" in damaged.stderr
    hub.fault = None

    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    taken = shell(back, "ours")
    assert taken.returncode == 0, taken.stderr
    monkeypatch.delenv("HF_TOKEN")
    assert "v1" not in hub.repos[REPO].branches and hub.repos[REPO].private
    assert "no such repository, or a private one" in shell(load, "late", package).stderr.splitlines()[-1]
    assert shell(load, "theirs", package).returncode == 0  # from the cache
    source.write_text(before)
    assert f"No weights of {NAME} are here" in shell(load, "new", package).stderr.splitlines()[-1]
