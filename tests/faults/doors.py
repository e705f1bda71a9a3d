"""Every program through which a file of somebody else's comes in, each in a process that is forked from a warm one."""

import contextlib
import importlib
import os
import resource
from pathlib import Path

import pytest

from ..train.runs import FORKS, options, train

SECONDS = 60


def _enter(module: str, arguments: list[str], said: Path, most: int | None) -> None:
    os.chdir(said.parent)
    if most is not None:  # writing more fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    with (
        said.open("w") as out,
        said.with_suffix(".err").open("w") as err,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            code = importlib.import_module(module).main(arguments)
        except SystemExit as end:
            code = end.code
        except BaseException as error:  # a traceback, in a user's eyes
            print(f"Traceback: {error!r}", file=err)
            code = 1
    os._exit(code)


def enter(module: str, arguments: list[str], folder: Path, most: int | None = None) -> tuple[int | None, str, str]:
    """Exit code (None: it never ended), what went to stdout, and to stderr. The program runs in this folder.

    most: bytes that a file may have.
    """
    said = folder / "said.out"
    process = FORKS.Process(target=_enter, args=(module, [str(word) for word in arguments], said, most))
    process.start()
    process.join(SECONDS)
    code = process.exitcode
    if code is None:
        process.kill()
        process.join()
    return code, said.read_text(), said.with_suffix(".err").read_text()


def refused(found: tuple[int | None, str, str], *names: str) -> None:
    """Exit code 1 or 2, and one line on stderr, no traceback, that holds each of these names."""
    code, _, err = found
    assert code in (1, 2), found
    lines = [line for line in err.splitlines() if "Warning" not in line and not line.startswith("  ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err and "a fault of ours" not in err, err
    for name in names:
        assert name in lines[0], (name, lines[0])


def few_or_slow(names: str | tuple[str, ...], cases, few) -> pytest.MarkDecorator:
    """parametrize(names, cases); all but a few are slow: CI takes every seventh of those, `-m large` the others."""
    rest = [case for case in cases if case not in few]
    marks = {case: [pytest.mark.slow] + [pytest.mark.large] * (at % 7 > 0) for at, case in enumerate(rest)}
    return pytest.mark.parametrize(
        names,
        [pytest.param(*([case] if isinstance(case, str) else case), marks=marks.get(case, ())) for case in cases],
    )


def run_of(folder: Path, steps: int) -> Path:
    """The folder of a tiny run that has ended, its export and all."""
    code, said = train(folder / "run", max_steps=steps, watch__probe_every=0)
    assert code == 0, said
    return folder / "run"


def pretrain(folder: Path, **settings) -> tuple[str, list[str]]:
    quiet = {"watch__probe_every": 0, "max_steps": 1}
    return "pretrain", options(folder / "run", **{**quiet, **settings})


def convert(file: Path, folder: Path) -> tuple[str, list[str]]:
    return "timm_dseq.cli", ["convert", file, "--output", folder / "out"]


def explain(file: Path, folder: Path, photo: Path) -> tuple[str, list[str]]:
    return "timm_dseq.cli", ["explain", photo, "--model", file, "--output", folder / "out.png"]


def init(file: Path, folder: Path) -> tuple[str, list[str]]:
    return pretrain(folder, model__init=file)


def probe(file: Path | str, folder: Path, data: Path, **settings) -> tuple[str, list[str]]:
    own = {"output_dir": folder / "probe", "results": folder / "results.jsonl", "cache.folder": folder / "cache"}
    words = {"protocol": "knn", "knn.k": "[1]", "workers": 0, "img_size": 32, **own}
    return "probe", _options({"model": file, "data.path": data, **words}, settings)


def finetune(file: Path | str, folder: Path, data: Path, **settings) -> tuple[str, list[str]]:
    own = {"output_dir": folder / "tuned", "results": folder / "results.jsonl", "workers": 0, "img_size": 32}
    words = {"optim.batch_size": 4, "optim.epochs": 1, "optim.warmup_epochs": 0, **own}
    return "finetune", _options({"model": file, "data.path": data, **words}, settings)


def _options(words: dict, settings: dict) -> list[str]:
    """`optim__epochs` among the settings stands for optim.epochs."""
    more = {name.replace("__", "."): value for name, value in settings.items()}
    return [f"--{name}={value}" for name, value in {**words, **more}.items()]
