"""From nothing to an exported, probed encoder, and one line that others can compare.

    python benchmarks/speedrun.py --photos ../shared/data/photos --judge ../shared/data/imagenette128
    … -- --optim.epochs 60 --optim.batch_size 256              # options of train/pretrain.py follow

Trains by train/configs/speedrun.yaml (a run that was stopped goes on), exports, and judges by train/probe.py: kNN on
the mean of the patches, logistic regression on the mean and the class token. The minutes are those of the steps.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "train" / "configs" / "speedrun.yaml"
JUDGES = {"knn": "mean", "logistic": "class+mean"}


def program(name: str, *options: object) -> None:
    """One of the programs in train/, in a process of its own; a failure ends this one."""
    done = subprocess.run([sys.executable, ROOT / "train" / f"{name}.py", *map(str, options)])
    if done.returncode:
        sys.exit(done.returncode)


def score(lines: list[dict], results: list[dict], device: str) -> str:
    """The line. lines: of the run's log. results: of the probes."""
    best = {result["protocol"]: result["accuracy"] for result in results}
    minutes = sum(line["seconds"] for line in lines) / 60
    return (
        f"speedrun: kNN {best['knn']:.1f} %, linear {best['logistic']:.1f} %, {minutes:.0f} minutes, "
        f"{lines[-1]['samples']:,} images, {device}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", required=True, help="images to learn from")
    parser.add_argument("--judge", required=True, help="labelled images, with a train and a test split")
    parser.add_argument("--output", type=Path, default=Path("runs/speedrun"))
    words = [*sys.argv[1:], "--"]
    options, rest = parser.parse_args(words[: words.index("--")]), words[words.index("--") + 1 : -1]
    program("pretrain", f"--config={CONFIG}", "--data.path", options.photos, "--output_dir", options.output, *rest)
    results = options.output / "results.jsonl"
    for protocol, view in JUDGES.items():
        judge = ("--model", options.output / "export", "--data", options.judge, "--protocol", protocol)
        program("probe", *judge, f"--views=[{view}]", "--results", results, "--output_dir", options.output / "probe")
    lines = [json.loads(line) for line in (options.output / "log.jsonl").read_text().splitlines()]
    records = [json.loads(line) for line in results.read_text().splitlines()]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    print(score(lines, records, device))


if __name__ == "__main__":
    main()
