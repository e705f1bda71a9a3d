"""pretrain.py under unusual conditions, which environment variables name.

LONGEST_WAIT: seconds that a process waits for the others. EXPORT_TAKES: seconds by which the export is slowed down.
NODES: a folder in which process RANK starts in node-RANK, as if each node had a disk of its own.
"""

import importlib
import os
import time
from datetime import timedelta


def main(arguments: list[str]) -> int:
    """Those of pretrain.py; returns its exit code."""
    script = importlib.import_module("pretrain")
    from common.system import launch

    if seconds := os.environ.get("LONGEST_WAIT"):
        launch.LONGEST_WAIT = timedelta(seconds=float(seconds))
    if seconds := os.environ.get("EXPORT_TAKES"):
        export = script.export
        script.export = lambda *given: (time.sleep(float(seconds)), export(*given))
    if folder := os.environ.get("NODES"):
        os.chdir(f"{folder}/node-{os.environ['RANK']}")
    return script.main(arguments)
