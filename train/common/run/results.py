"""Results: one JSON line for each number that was measured, and how far it can be trusted."""

import datetime
import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import timm
import torch

import timm_dseq
from timm_dseq import UserError

try:
    import fcntl
except ImportError:  # Windows, where two commands must not add to one file at the same time
    fcntl = None

RESAMPLES = 1000
TOP1 = "top-1 %"  # the metric of a record that names none; its value is then under "accuracy"


def summary(right: Sequence[torch.Tensor], seed: int = 0) -> dict[str, Any]:
    """Accuracies in per cent, their mean and standard deviation over seeds, and the 95 % interval over test images.

    The interval is a bootstrap of the images, each with the mean of its answers over the seeds.
    """
    each = [100 * answers.double().mean().item() for answers in right]
    accuracies = torch.tensor(each, dtype=torch.float64)
    low, high = interval(torch.stack([answers.double() for answers in right]).mean(0), seed)
    return {
        "accuracy": accuracies.mean().item(),
        "std": accuracies.std().item() if len(each) > 1 else None,
        "interval": [100 * low, 100 * high],
        "each": each,
    }


def figure(metric: str, value: float) -> dict[str, Any]:
    """One number that is no accuracy, such as box AP in per cent: it has neither seeds nor an interval."""
    return {"metric": metric, "value": value, "std": None, "interval": None, "each": [value]}


def changed(
    sections: Sequence[Any], recipe: dict[str, Any], left_out: Collection[str], args: dict[str, Any]
) -> dict[str, Any]:
    """Settings that are not the usual ones, as JSON has them, so that results of other settings are told apart.

    sections: dataclasses, whose own defaults are usual but for what the recipe sets, {"section.name": value}. left_out:
    names of those that decide nothing, or have a place in the record already. args: further arguments of the model.
    """

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    usual = {name: value for section in sections for name, value in vars(type(section)()).items()}
    usual |= {name.rpartition(".")[2]: value for name, value in recipe.items()}
    own = {name: value for section in sections for name, value in vars(section).items() if name not in left_out}
    found = {name: plain(value) for name, value in own.items() if plain(value) != plain(usual[name])}
    return {**found, **({"args": json.dumps(args, sort_keys=True)} if args else {})}


def metric(record: dict[str, Any]) -> str:
    """What a record measured."""
    return record.get("metric", TOP1)


def value(record: dict[str, Any]) -> float:
    """What came out."""
    return record["accuracy" if metric(record) == TOP1 else "value"]


def interval(answers: torch.Tensor, seed: int = 0) -> tuple[float, float]:
    """The middle 95 % of the mean of (n,) values under resampling."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.stack(
        [answers[torch.randint(len(answers), (len(answers),), generator=generator)].mean() for _ in range(RESAMPLES)]
    )
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return low, high


def check(path: str | Path) -> None:
    """Refuse, before long work, a file that results could not be added to at its end. Nothing is written."""
    path = Path(path)
    nearest = next(each for each in (path, *path.absolute().parents) if each.exists())
    reason = None
    if path.is_dir() or path.is_fifo():
        reason = f"it is a {'folder' if path.is_dir() else 'FIFO'}"
    elif path.is_symlink() and nearest != path and path.name == Path(os.path.realpath(path)).name:
        reason = "it is a link to itself"
    elif nearest != path and not nearest.is_dir():
        reason = f"{nearest} is no folder"
    elif not os.access(nearest, os.W_OK):
        reason = "Permission denied"
    if reason:
        raise UserError(f"results={path} cannot be written ({reason}): name another file.")


def append(path: str | Path, records: Sequence[dict[str, Any]]) -> None:
    """Add records that the file does not hold yet. Several commands may add to it at the same time."""
    path = Path(path)
    stamp = {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {"torch": torch.__version__, "timm": timm.__version__, "timm_dseq": timm_dseq.__version__},
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+", encoding="utf-8", errors="surrogateescape") as file:  # foreign bytes stay as they are
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            lines = file.readlines()
            if lines and not lines[-1].endswith("\n"):  # a kill cut it off: what is added would be lost with it
                file.truncate(sum(len(line.encode("utf-8", "surrogateescape")) for line in lines[:-1]))
                print(f"{path}: its last line was cut off, and is removed", flush=True)
            known = [_unstamped(line, stamp) for line in lines]
            new = [record for record in records if json.loads(json.dumps(record)) not in known]
            file.write("".join(json.dumps({**record, **stamp}) + "\n" for record in new))
    except OSError as error:
        raise UserError(f"results={path} cannot be written ({error.strerror}): name another file.") from error


def _unstamped(line: str, stamp: dict[str, Any]) -> dict[str, Any] | None:
    """The record of a line without its time and versions; None where it is no record."""
    try:
        return {name: value for name, value in json.loads(line).items() if name not in stamp}
    except (ValueError, AttributeError, RecursionError):
        return None


def read(paths: Sequence[str | Path]) -> list[dict[str, Any]]:
    """The records of several files."""
    records = []
    for path in map(Path, paths):
        if not path.is_file():
            raise UserError(f"{path} is no file of results.")
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is no file of results, which are lines of JSON.") from error
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number}, is no JSON: remove it.") from error
            if whose := _tabled_elsewhere(record):
                raise UserError(f"{path}, line {number}, is a result of {whose}: leave this file out.")
            if not _is_result(record):
                raise UserError(f"{path}, line {number}, is no result of these programs: remove it.")
            records.append(record)
    return records


def _tabled_elsewhere(record: Any) -> str | None:
    """Whose result it is, and what shows it, where that is no table of these; None where it is."""
    if isinstance(record, dict) and {"map", "predictions"} <= record.keys():
        return "discover.py, which prints its own tables when the same command is given again"
    if isinstance(record, dict) and {"order", "deletion", "insertion"} <= record.keys():
        return "faithfulness.py, which prints its own table"
    return None


def _is_result(record: Any) -> bool:
    """Whether a line holds all that tables show."""
    try:
        line(record)
        train, test = record["train"], record["test"]
        texts = [record[name] for name in ("data", "label", "protocol", "model", "weights", "view")] + [metric(record)]
        texts += [train["split"], test["split"], train["subset"] or "", shown_gain(record)]
        texts += [record.get("data_digest", ""), train.get("digest", ""), test.get("digest", "")]
        numbers = [train["images"], test["images"], record["classes"], record["parameters"], value(record)]
        numbers += [*record["img_size"], *record["seeds"], shared(record)]
    except (KeyError, TypeError, ValueError, AttributeError):
        return False
    return all(isinstance(x, str) for x in texts) and all(isinstance(x, (int, float)) for x in numbers)


def line(record: dict[str, Any]) -> str:
    """A record as a line on the screen."""
    unit = "%" if metric(record) == TOP1 else metric(record)
    deviation = "" if record["std"] is None else f" ± {record['std']:.2f} over {len(record['each'])} seeds"
    interval = f" [{shown_interval(record, ', ')}]" if record["interval"] else ""
    choice = chosen(record)
    return (
        f"{record['protocol']:<14} {record['view']:<12} {value(record):.2f} {unit}{deviation}{interval}"
        f"{'  ' * bool(choice)}{choice}"
    )


def shared(record: dict[str, Any]) -> int:
    """Test images that are known to be among the training images, too."""
    return record["duplicates"]["train_test"] if record["duplicates"] is not None else 0


def shown_interval(record: dict[str, Any], between: str) -> str:
    """The two ends of a record's interval; nothing where it has none."""
    return between.join(f"{end:.2f}" for end in record["interval"] or ())


def shown_gain(record: dict[str, Any]) -> str:
    """The points that the salient crop gained over the same without it, and their interval; nothing where none was."""
    if "gain" not in record:
        return ""
    low, high = record["gain"]["interval"]
    return f"{record['gain']['points']:+.2f} [{low:+.2f}, {high:+.2f}]"


def chosen(record: dict[str, Any]) -> str:
    """The settings of a record as words, and the precision where it is not float32."""

    def shown(value: Any) -> str:
        if isinstance(value, list):
            return " / ".join(map(shown, value))
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    parts = [f"{name} {shown(value)}" for name, value in record["settings"].items()]
    return ", ".join(parts + [record["precision"]] * (record["precision"] != "no"))
