"""`log.jsonl`: one JSON line a step, each once and in order, whatever was killed in between."""

import json
import os
from pathlib import Path
from typing import Any


def records(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; one that was cut off by a kill is left out, with all behind it."""
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def reopened(path: Path, last_step: int):
    """The log, open for more, without the lines of steps that will be done again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [line for line in records(path) if line["step"] <= last_step] if path.exists() else []
    fresh = path.with_suffix(".new")
    fresh.write_text("".join(json.dumps(line) + "\n" for line in kept))
    os.replace(fresh, path)
    return path.open("a")
