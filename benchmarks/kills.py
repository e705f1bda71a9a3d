"""Killed at random moments, does a run end as if nothing had happened? Its weights, moments and log, bit for bit.

    python benchmarks/kills.py 1000
    python benchmarks/kills.py 50 --processes 2      # one of them is killed; the other has to end by itself

A run of 20 tiny steps with a checkpoint every third is started, killed (SIGKILL), started again, and so on until it
ends, and is compared with one that nobody disturbed. Half of the kills come at any time, the others wait for a moment
that lasts only milliseconds: a checkpoint being written or removed, a line being added to the log, the export.
"""

import argparse
import collections
import random
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from rich.progress import Progress

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "train")]

from tests.train.runs import environments, log_of, said_of, start, tensors_of  # noqa: E402

ALONE = 60.0  # seconds in which a process whose partner was killed has to end


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def begun(output: Path, processes: int) -> list:
    """The processes of one run."""
    if processes == 1:
        return [start(output)]
    return [start(output, environment) for environment in environments(free_port(), processes)]


def written(output: Path) -> int:
    """Bytes of the log."""
    log = output / "log.jsonl"
    return log.stat().st_size if log.exists() else 0


def removed(output: Path) -> bool:
    """Whether a checkpoint lacks some of its files."""
    try:
        return any(len(list(path.iterdir())) < 4 for path in (output / "checkpoints").glob("step-*"))
    except FileNotFoundError:  # it is gone by now
        return True


def exported(output: Path) -> bool:
    """Whether the export is being written, or moved to its place."""
    return any(output.glob("export.*"))


def begun_checkpoint(output: Path) -> bool:
    """Whether a checkpoint is being written."""
    return any((output / "checkpoints").glob(".unfinished-*"))


def amid(output: Path, before: int) -> str:
    """What a run was doing when it was killed, by what it left. before: bytes of its log at the start."""
    if begun_checkpoint(output):
        return "a checkpoint"
    if removed(output):
        return "the removal of a checkpoint"
    if exported(output):
        return "the export"
    if written(output) == before:
        return "preparations"
    return "the end" if (output / "export").exists() else "the steps"


def wait_for(moment: Callable[[], bool], process: BaseProcess) -> None:
    """Until a moment has come, or the process has ended."""
    while process.exitcode is None and not moment():
        time.sleep(0.0002)


def waited(output: Path, process: BaseProcess, draw: random.Random, seconds: float, together: bool) -> None:
    """Until the process is to be killed, or has ended. Of several it is not killed before they have found each other:
    then only a launcher could tell the other one, which would wait for an hour."""
    if together:
        begun = time.time()
        lock = output / ".lock"
        wait_for(lambda: lock.exists() and lock.stat().st_mtime > begun, process)
    rare = draw.choice([None, None, None, begun_checkpoint, removed, exported, "an append"])
    process.join(draw.uniform(0.02, 1.0 if rare is None else 0.8) * seconds)
    if rare == "an append":
        before = written(output)
        wait_for(lambda: written(output) != before, process)
    elif rare:
        wait_for(lambda: rare(output), process)
        time.sleep(draw.uniform(0, 0.005))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kills", type=int)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw, places = random.Random(options.seed), collections.Counter()
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    whole = folder / "whole"
    for attempt in (folder / "first", whole):  # the first one waits for imports
        clock = time.monotonic()
        for process in begun(attempt, options.processes):
            process.join()
            assert process.exitcode == 0, said_of(attempt).read_text()
        seconds = time.monotonic() - clock
    expected, log = tensors_of(whole), log_of(whole)
    kills = runs = different = hung = 0
    with Progress() as progress:
        task = progress.add_task("kills", total=options.kills)
        while kills < options.kills:
            output = folder / f"run-{runs}"
            while True:
                before, processes = written(output), begun(output, options.processes)
                waited(output, processes[0], draw, seconds, together=options.processes > 1)
                if all(process.exitcode is not None for process in processes):
                    break
                draw.choice(processes).kill()
                end = time.monotonic() + ALONE
                for process in processes:
                    process.join(max(0.0, end - time.monotonic()))
                    if process.exitcode is None:
                        hung += 1
                        process.kill()
                        process.join()
                kills += 1
                places[amid(output, before)] += 1
                progress.update(task, completed=kills)
            runs += 1
            ours = tensors_of(output)
            same = ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in ours)
            if not same or log_of(output) != log or any(process.exitcode for process in processes):
                different += 1
                print(f"{output} differs: it stays there", flush=True)
            else:
                shutil.rmtree(output)
    where = ", ".join(f"{count} amid {place}" for place, count in places.most_common())
    print(f"{kills} kills of {runs} runs ({where}): {different} ended otherwise, {hung} processes had to be ended")
    if not different:
        shutil.rmtree(folder)
    return 1 if different or hung else 0


if __name__ == "__main__":
    sys.exit(main())
