"""The log of a dense run → charts for its report: one for each number in the log."""

from pathlib import Path

from ..run.log import records
from ..run.report import charts

_NO_CHART = ("step", "samples", "skipped", "seconds", "memory_mib")
_LAST = {"lr": "Learning rate", "gradient_norm": "Gradient norm", "images_per_second": "Images per second"}


def log_charts(output: Path) -> str:
    """HTML, for the run in this folder."""
    lines = records(output / "log.jsonl")
    found = dict.fromkeys(name for line in lines for name in line if name not in _NO_CHART)
    names = [name for name in found if name not in _LAST] + [name for name in _LAST if name in found]
    points = {name: [(line["step"], line[name]) for line in lines if line.get(name) is not None] for name in names}
    return charts([(_LAST.get(name, name), [(name, points[name])]) for name in names])
