"""What both programs share that export a folder for the Hub: its writing, parts of its card, what to do next."""

import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A path to write a folder to, which takes the place of `folder` when it is complete. What else is in it stays."""
    fresh = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    yield fresh
    for theirs in folder.iterdir() if folder.is_dir() else ():
        if theirs.name not in EXPORTED and not (fresh / theirs.name).exists():
            os.replace(theirs, fresh / theirs.name)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(fresh, folder)


def public_name(path: str) -> str:
    """How cards and results name data or weights: a name of the Hub as it is, a path on this machine by its last part,
    and so the path in ALIAS:PATH."""
    alias, colon, rest = path.partition(":")
    if colon and rest and "/" not in alias and not Path(path).exists():
        return f"{alias}:{public_name(rest)}"
    local = Path(path).exists() or Path(path).is_absolute() or path.startswith((".", "~"))
    return Path(path).resolve().name if local else path


def table(rows: dict[str, str]) -> str:
    """Markdown of two columns without heads."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


EXPORTED = {"README.md", "config.json", "model.safetensors", "pretraining.safetensors", "preprocessor_config.json"}
FOLDERS, FILES = ("checkpoints", "export", "pictures", "trackers"), ("config.yaml", "log.jsonl", "report.html")


def blocked(output: Path) -> str | None:
    """What lies where a run makes a folder, or a file, and is another; in words, to be said before the run."""
    for names, kind, there in ((FOLDERS, "folder", Path.is_dir), (FILES, "file", Path.is_file)):
        for path in (output / name for name in names):
            if os.path.lexists(path) and (path.is_symlink() or not there(path)):
                return f"{path} is in the way of a {kind} that the run makes: move it, or name another output_dir."
    return None


def next_steps(export: Path, trial: str) -> str:
    """What to do with a Hub-ready folder, to be pasted into a shell; trial: a line of Python that loads it."""
    folder, trial = shlex.quote(str(export)), shlex.quote(trial)
    return f"next:\n  timm-dseq verify {folder}\n  python -c {trial}\n  timm-dseq push {folder} ORGANISATION/NAME"
