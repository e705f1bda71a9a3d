"""Runs in places and with habits of their own, as the environment says.

HASTY: seconds a process waits for another. SLOW: seconds the export takes. APART: a folder in which each process
begins in one of its own, node-RANK, as on the disk of its node.
"""

import importlib
import os
import time
from datetime import timedelta


def main(arguments: list[str]) -> int:
    """pretrain.py."""
    script = importlib.import_module("pretrain")
    from common.system import launch

    if seconds := os.environ.get("HASTY"):
        launch.LONGEST_WAIT = timedelta(seconds=float(seconds))
    if seconds := os.environ.get("SLOW"):
        at_once = script.export
        script.export = lambda *given: (time.sleep(float(seconds)), at_once(*given))
    if folder := os.environ.get("APART"):
        os.chdir(f"{folder}/node-{os.environ['RANK']}")
    return script.main(arguments)
