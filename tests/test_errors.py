"""The last line of defence: an error that nobody foresaw is one line, and its traceback is kept."""

import os
import re
import subprocess
import sys

import pytest
import torch

from timm_dseq import cli
from timm_dseq.errors import one_line


def said_of(error, folder=None):
    try:
        raise error
    except Exception as caught:
        return one_line(caught, folder)


def test_a_fault_is_one_line_that_names_the_file_of_its_traceback(tmp_path):
    line = said_of(ZeroDivisionError("by\nnought " * 100), tmp_path)
    assert "\n" not in line and line.startswith("a fault of ours (ZeroDivisionError: by nought by") and len(line) < 500
    (file,) = tmp_path.iterdir()
    assert f"its traceback is in {file}, please report it" in line
    assert "raise error" in file.read_text() and file.read_text().rstrip().endswith("nought")


@pytest.mark.parametrize(
    "said",
    [
        "[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:19370. Check the logs. GLHF!",
        "[gloo/transport/tcp/pair.cc:547] Read error [127.0.0.1]:1: Connection reset by peer",
        "NCCL error: remote process exited or there was a network error, NCCL version 2.27",
    ],
)
def test_a_process_that_lost_another_one_does_not_call_it_a_fault(said, tmp_path):
    assert said_of(RuntimeError(said), tmp_path) == "another process of this run has ended: the lines before say why."
    assert not [*tmp_path.iterdir()]
    assert "a fault of ours" in said_of(RuntimeError("Connection closed by peer"), tmp_path)


def test_without_a_folder_that_is_there_it_goes_where_temporary_files_go(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    line = said_of(KeyError("x"), tmp_path / "nowhere")
    assert re.search(rf"its traceback is in {tmp_path}/fault-\w+\.txt", line)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    assert "TIMM_DSEQ_DEBUG=1 shows its traceback" in said_of(KeyError("x"))


def test_it_is_printed_where_it_is_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TIMM_DSEQ_DEBUG", "1")
    said_of(KeyError("x"), tmp_path)
    assert "raise error" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
        RuntimeError("can't allocate memory"),
    ],
)
def test_too_little_memory_is_no_fault_of_ours(error, tmp_path):
    assert said_of(error, tmp_path) == "the memory is not enough: take a smaller batch, image or model."
    assert not [*tmp_path.iterdir()]


def test_a_command_ends_in_its_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(cli, "_check_words", lambda options: 1 / 0)
    assert cli.main(["models"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("timm-dseq models: a fault of ours (ZeroDivisionError: ") and said.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "redirected", "code", "says"),
    [
        (["models"], "> /dev/full", 1, "The output cannot be written (No space left on device)"),
        *((words, "| true", 141, "") for words in (["models"], ["get", "--list"])),
    ],
)
def test_output_that_cannot_be_written_is_one_line_and_one_that_nobody_reads_none(words, redirected, code, says):
    slow = f"import sys, time; from timm_dseq.cli import main; time.sleep(.5); sys.exit(main({words}))"
    command = ["bash", "-c", f'"$0" -c "$1" {redirected}; exit ${{PIPESTATUS[0]}}', sys.executable, slow]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == code and says in done.stderr and done.stderr.count("\n") == bool(says), done.stderr


@pytest.mark.slow
def test_letters_that_an_output_does_not_know_are_no_error():
    command = [sys.executable, "-m", "timm_dseq.cli", "models"]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}, timeout=60)
    assert done.returncode == 0 and b"224?224" in done.stdout, done.stderr


def test_the_command_alone_shows_its_help(capsys):
    assert cli.main([]) == 0
    assert "usage: timm-dseq" in capsys.readouterr().out
