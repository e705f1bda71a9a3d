"""Each door's check is left out in a copy of the code, and a test that guards it fails."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IMAGES, WEIGHTS, DOWNLOAD = "timm_dseq/images.py", "timm_dseq/hub/weights.py", "timm_dseq/hub/download.py"
COMMANDS, RUN = "train/common/system/command_line.py", "train/common/run"
GET = "tests/hub/store/test_get.py"
UNREADABLE, DOWNLOADS, CASES = (
    "tests/train/data/test_unreadable.py",
    "tests/hub/test_download.py",
    "tests/train/system/test_command_line.py::test_what_is_no_file_of_settings_is_named_in_one_line",
)
# What is left out → the file, the code, what stands there instead, and the test that has to fail.
MUTANTS = {
    "images of any format": (
        IMAGES,
        "Image.open(_file(value), formats=_formats())",
        "Image.open(_file(value))",
        f"{UNREADABLE}::test_postscript_is_handed_to_no_other_program",
    ),
    "images of any size": (
        IMAGES,
        "if not 0 < image.width * image.height <= MOST_PIXELS",
        "if False",
        f"{UNREADABLE}::test_the_size_that_is_declared_is_bounded_whatever_pillow_is_told",
    ),
    "images that are no files": (
        IMAGES,
        'if not os.path.isfile(value["path"])',
        'if not os.path.lexists(value["path"])',
        f"{UNREADABLE} -k there_is_one_kind_of_error",
    ),
    "aliases in settings": (COMMANDS, "if self.check_event(yaml.AliasEvent)", "if False", CASES),
    "keys given twice": (COMMANDS, "if key.value in seen", "if False", CASES),
    "settings without bound": (COMMANDS, "or file.stat().st_size > _LONGEST", "", CASES),
    "objects in settings": (
        COMMANDS,
        "Plain = bool | int | float | str | list[bool | int | float | str] | None",
        "Plain = Any",
        "tests/train/pretraining/test_settings.py -k nothing_in_them_is_imported",
    ),
    "pickles": (
        WEIGHTS,
        "weights_only=True)\n",
        "weights_only=False)\n",
        'tests/faults/test_weights.py -k "damaged and runs and convert"',
    ),
    "weights of any type": (
        WEIGHTS,
        "if tensor.dtype not in",
        "if not tensor.dtype and tensor.dtype not in",
        'tests/faults/test_weights.py -k "whole and numbers and convert"',
    ),
    "weights that are not finite": (
        "timm_dseq/hub/load.py",
        "if not tensor.isfinite().all()",
        "if False",
        "tests/hub/test_load.py -k not_finite",
    ),
    "names that lead out of the cache": (
        DOWNLOAD,
        "if not path.resolve().is_relative_to(own.resolve())",
        "if False",
        f"{DOWNLOADS} -k leads_out_of_the_cache",
    ),
    "digests of downloads": (
        DOWNLOAD,
        "if sha256(blob) != blob.name",
        "if False",
        f"{DOWNLOADS} -k leaves_nothing_and_the_next_one_works",
    ),
    "patience with a server": (
        DOWNLOAD,
        "if now is not None and 0 <= now - before < LEAST * patience",
        "if False",
        f"{DOWNLOADS} -k drips",
    ),
    "checksums of what was brought": (
        "timm_dseq/hub/store/arrival.py",
        "if damaged:",
        "if False:",
        f"{GET} -k altered_on_the_way",
    ),
    "another kind of checkpoint": (
        "timm_dseq/hub/store/get.py",
        'if (done["kind"], stock) != (source.kind, registered(name))',
        "if False",
        f'{GET} -k "of_another_kind and other_format or wrong_file"',
    ),
    "versions that change amid a download": (
        "timm_dseq/hub/store/drive.py",
        "if before and total != total_before",
        "if False",
        f"{GET} -k never_mixed",
    ),
    "room for what is brought": (
        "timm_dseq/hub/store/folders.py",
        "if free < needed",
        "if False",
        "tests/hub/store/test_processes.py -k before_the_bytes_come",
    ),
    "digests of checkpoints": (
        "timm_dseq/hub/checkpoints.py",
        "if sha256(file) != digest",
        "if False",
        "tests/train/run/test_checkpoints.py -k passed_over",
    ),
    "shapes in checkpoints": (
        f"{RUN}/state.py",
        "if tensor.shape != shapes[name]",
        "if False",
        "tests/train/run/test_resume.py -k content_cannot_be",
    ),
    "counters in checkpoints": (
        f"{RUN}/resume.py",
        "(not isinstance(value, int) or value >= 0)",
        "True",
        "tests/train/run/test_resume.py -k content_cannot_be",
    ),
    "the lock": (
        f"{RUN}/lock.py",
        "fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "pass",
        "tests/train/run/test_lock.py -k second_run_is_refused",
    ),
    "room on the disk": (f"{RUN}/room.py", "if free < needed", "if False", "tests/train/run/test_room.py"),
    "lines that are cut off": (
        f"{RUN}/results.py",
        'if lines and not lines[-1].endswith("\\n")',
        "if False",
        "tests/train/run/test_results.py",
    ),
    "rows of features": (
        "train/common/probing/feature_cache.py",
        "1 + zlib.crc32(digest, zlib.crc32(row)) % 255",
        "1",
        "tests/train/probing/test_feature_cache.py -k damaged",
    ),
    "exports of another model": (
        "train/common/pretraining/export.py",
        "if not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)",
        "if False",
        "tests/train/pretraining/test_exportable.py -k refused_before",
    ),
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The code and its tests, to be changed and changed back."""
    folder = tmp_path_factory.mktemp("mutants")
    left_out = shutil.ignore_patterns("__pycache__", ".git", "runs", "*.safetensors")
    for part in ("timm_dseq", "train", "tests", "hub_configs", "benchmarks"):
        shutil.copytree(ROOT / part, folder / part, ignore=left_out)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


# Pytest in forks of a process that has imported what takes seconds, and nothing of the copy.
WARM = """
import json, os, sys
import accelerate, datasets, jsonargparse, pytest, timm, torch
for line in sys.stdin:
    said, words = json.loads(line)
    if not (child := os.fork()):
        file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1), os.dup2(file, 2)
        os._exit(pytest.main(words))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def outcome(copy):
    """A function: words of pytest's command line → exit code and words of pytest in the copy."""
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    options = ["-n", "0", "-q", "-x", "-p", "no:cacheprovider", "--timeout", "20"]
    said = copy / "said.txt"
    with subprocess.Popen([sys.executable, "-c", WARM], cwd=copy, env=environment, **pipes) as warm:

        def outcome(words):
            print(json.dumps([str(said), [*options, *shlex.split(words)]]), file=warm.stdin, flush=True)
            return int(warm.stdout.readline()), said.read_text()

        yield outcome
        warm.stdin.close()


@pytest.mark.slow
@pytest.mark.parametrize("left_out", MUTANTS)
def test_a_check_that_is_left_out_is_missed(left_out, copy, outcome):
    file, code, instead, words = MUTANTS[left_out]
    text = (copy / file).read_text()
    assert text.count(code) == 1, f"{file} has {text.count(code)} of {code}"
    (copy / file).write_text(text.replace(code, instead))
    try:
        exit_code, said = outcome(words)
    finally:
        (copy / file).write_text(text)
    assert exit_code == 1 and " failed" in said, said


@pytest.mark.slow
def test_nothing_left_out_is_fine(copy, outcome):
    """The control case, and the copy is what is tested."""
    where = copy / "tests" / "test_where.py"
    where.write_text("import timm_dseq\n\ndef test_where():\n    assert not timm_dseq.__file__\n")
    code, said = outcome("tests/train/run/test_results.py tests/train/run/test_room.py")
    assert code == 0 and " passed" in said, said
    assert str(copy / "timm_dseq" / "__init__.py") in outcome("tests/test_where.py")[1]
