"""The log of a dense run and what its task shows → report.html: a chart of each number in the log, then the task's."""

from pathlib import Path

from ..run.log import records
from ..run.page import write_page

_NO_CHART = ("step", "samples", "skipped", "seconds", "memory_mib")
_LAST = {"lr": "Learning rate", "gradient_norm": "Gradient norm", "images_per_second": "Images per second"}


def write_report(output: Path, kind: str, summary: str, body: str) -> Path:
    """Write it for the run in this folder; returns its path. kind: of the run, in one word. summary, body: HTML."""
    lines = records(output / "log.jsonl")
    found = dict.fromkeys(name for line in lines for name in line if name not in _NO_CHART)
    names = [name for name in found if name not in _LAST] + [name for name in _LAST if name in found]
    charts = [
        (_LAST.get(name, name), [(name, [(x["step"], x[name]) for x in lines if x.get(name) is not None])])
        for name in names
    ]
    return write_page(output, kind, summary, charts, body)
