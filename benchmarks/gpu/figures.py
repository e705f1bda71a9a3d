"""All that a GPU has to say about this project, in four minutes: is it right, and how fast is it.

    python benchmarks/gpu/figures.py --out out --data PACK
    python benchmarks/gpu/figures.py --out out --device cpu --quick                  # the rehearsal

Three sections, each a process of its own with its own time, so that one which fails or hangs loses itself alone: the
tests that need a GPU (tests/gpu), the step (benchmarks/step.py), and the loop (benchmarks/loop.py). out/figures.json
holds everything, with the goals; beside it lies what each section wrote and said.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"

# name → its share of the time; what one leaves the next may use
SHARES = {"tests": 0.3, "step": 0.4, "loop": 0.3}
MARGIN = 8.0  # seconds that a section gets to write down what it has, before it is ended


def commands(args: argparse.Namespace) -> dict[str, list[str]]:
    """What each section runs; `{seconds}` is what it has."""
    gpu, out = args.device == "cuda", args.out
    tests = [sys.executable, "-m", "pytest", str(ROOT / "tests" / "gpu"), "-n", "0", "-q", "-p", "no:cacheprovider"]
    tests += ["-m", "gpu" if gpu else "not gpu and not slow", f"--junitxml={out / 'tests.xml'}", "--durations=8"]
    tests += ["-x"] * args.quick
    where = [] if gpu else ["--cpu"]
    step = [sys.executable, str(BENCHMARKS / "step.py"), "--seconds={seconds}", f"--json={out / 'step.json'}", *where]
    step += ["--contenders", "dseq, two regions", "packed", "dense"]
    loop = [sys.executable, str(BENCHMARKS / "loop.py"), "--seconds={seconds}", f"--json={out / 'loop.json'}", *where]
    if args.data:
        loop += [f"--data.path={args.data}"]
    if args.quick:
        step += ["--only=ti16", "--batch=8", "--rounds=1", "--precision=no"]
        loop += ["--sizes=ti16", "--no-extras", "--optim.batch_size=8", "--data.workers=1", "--system.precision=no"]
    else:
        loop += ["--sizes=ti16,b16,s16", "--no-extras"]
    return {"tests": tests, "step": step, "loop": loop}


def run(name: str, command: list[str], out: Path, seconds: float) -> dict:
    """One section, ended when its time is over; what became of it."""
    begun = time.monotonic()
    words = [word.format(seconds=round(max(1.0, seconds * 0.6))) if "{seconds}" in word else word for word in command]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    with (out / f"{name}.log").open("w") as log:
        # a group of its own: its loader's workers end with it
        process = subprocess.Popen(
            words, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, start_new_session=True
        )
        try:
            process.wait(seconds)
            how = "done" if process.returncode == 0 else f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            how = f"ended after {seconds:.0f} s"
        if process.poll() is None:
            end(process)
    return {"ended": how, "seconds": time.monotonic() - begun}


def end(process: subprocess.Popen) -> None:
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(MARGIN)
            return
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return


def outcomes(path: Path) -> dict[str, str]:
    """Every test and what became of it, out of pytest's own XML."""
    if not path.is_file():
        return {}
    found = {}
    for case in ElementTree.parse(path).iter("testcase"):
        wrong = next((kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None), None)
        said = case.find(wrong).get("message", "").split("\n")[0][:200] if wrong else ""
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        found[name] = f"{wrong}: {said}" if wrong else "passed"
    return found


def gathered(out: Path, sections: dict[str, dict]) -> dict:
    """What all sections left, in one record."""
    record: dict = {"made_by": "benchmarks/gpu/figures.py", "sections": sections}
    record["tests"] = outcomes(out / "tests.xml")
    rows = []
    for name in ("step", "loop"):
        path = out / f"{name}.json"
        if path.is_file():
            record[name] = json.loads(path.read_text())
            rows += record[name]["rows"]
    return {**record, "rows": rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--data", type=Path, help="a folder of images for the loop (default: scenes drawn on the spot)")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--quick", action="store_true", help="one small size: a rehearsal")
    parser.add_argument("--seconds", type=float, default=235, help="for all of it")
    parser.add_argument("--sections", default=",".join(SHARES), help="by commas")
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.data = args.data and args.data.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    wanted = [name for name in args.sections.split(",") if name in SHARES]
    begun, sections, shares = time.monotonic(), {}, sum(SHARES[name] for name in wanted)
    for name in wanted:
        left = args.seconds - (time.monotonic() - begun)
        sections[name] = run(name, commands(args)[name], args.out, max(5.0, left * SHARES[name] / shares - MARGIN))
        shares -= SHARES[name]
        print(f"{name}: {sections[name]['ended']}, {sections[name]['seconds']:.0f} s", flush=True)
    record = gathered(args.out, sections)
    summary(record, args.out)
    return 0 if all(section["ended"] == "done" for section in sections.values()) else 1


def summary(record: dict, out: Path) -> None:
    """The tables that a person reads last, and the file."""
    sys.path.insert(0, str(BENCHMARKS))
    import measure

    record["goals"] = measure.judged(record["rows"])
    measure.write(out / "figures.json", record)
    bad = {name: how for name, how in record["tests"].items() if how.startswith(("failure", "error"))}
    counts = [sum(how.startswith(kind) for how in record["tests"].values()) for kind in ("passed", "skipped")]
    print(f"tests: {counts[0]} passed, {counts[1]} skipped, {len(bad)} failed")
    for name, how in bad.items():
        print(f"  {name}: {how}")
    measure.print_rows(record["rows"])
    measure.print_goals(record["goals"])
    nvidia = shutil.which("nvidia-smi")
    if nvidia:
        subprocess.run([nvidia, "--query-gpu=name,driver_version,clocks.sm,power.draw", "--format=csv"])


if __name__ == "__main__":
    sys.exit(main())
