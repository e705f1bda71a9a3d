"""Files of results → one Markdown table for each data set and protocol: `train/table.py FILE…`.

Of results of the same model, data, test images and settings only the newest is shown. The paper's results join those
of the same data set and protocol; protocols that end in -cached and subsets are not the paper's, and have tables of
their own.
"""

import common.system.environment  # noqa: F401, I001  # before torch is loaded

import sys
from collections.abc import Sequence
from typing import Any

from common.run import results

from timm_dseq.errors import one_line
from timm_dseq.hub import paper

# The paper's name of a task → alias of the data set, protocol and metric.
TASKS = {
    "ImageNet-1k, linear probe": ("imagenet", "dseq", results.TOP1),
    "ImageNet-1k, fine-tuned": ("imagenet", "finetune-mae", results.TOP1),
    "iNat21-mini, linear probe": ("inat21-mini", "dseq", results.TOP1),
    "CUB-200, linear probe": ("cub", "dseq", results.TOP1),
    "Stanford Cars, linear probe": ("cars", "dseq", results.TOP1),
    "CLEVR, count": ("clevr-count", "dseq", results.TOP1),
    "CLEVR, distance": ("clevr-distance", "dseq", results.TOP1),
    "COCO, box AP": ("coco", "mask-rcnn", "box AP"),
    "COCO, mask AP": ("coco", "mask-rcnn", "mask AP"),
    "ADE20K, mIoU": ("ade20k", "upernet", "mIoU"),
}
SAME_DATA = {"imagenet-wds": "imagenet"}
DENSE_SIZES = {"box AP": "1024", "mask AP": "1024", "mIoU": "512"}  # of the paper's images, by metric


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; returns the exit code: 0 done, 1 something the message names is wrong, 2 no file was given."""
    files = sys.argv[1:] if arguments is None else arguments
    if not files or {"-h", "--help"} & set(files):
        print("usage: table.py RESULTS.jsonl [MORE.jsonl …]")
        return 0 if files else 2
    try:
        print(tables(results.read(files)))
        return 0
    except Exception as error:
        print(f"table.py: {one_line(error)}", file=sys.stderr)
        return 1


def tables(records: list[dict[str, Any]]) -> str:
    """Markdown: a table for each data set, subset, split and protocol, a row for each model and choice of settings."""
    groups: dict[tuple, dict[tuple, dict]] = {}  # what a table is of → what a row is of → its newest record
    for record in records:
        table = (
            record["data"],
            record.get("data_digest", ""),
            record["label"],
            record["train"]["split"],
            record["train"]["subset"] or "",
            record["test"]["split"],
            record["protocol"],
            results.metric(record),
            *(record[part]["images"] for part in ("train", "test")),
            *(record[part].get("digest", "") for part in ("train", "test")),
            record["classes"],
        )
        row = (record["model"], record["weights"], *record["img_size"], record["view"], results.chosen(record))
        row += tuple(record["seeds"])
        groups.setdefault(table, {})[row] = record
    parts = []
    for table in sorted(groups, key=str):
        rows = sorted(groups[table].values(), key=lambda record: -results.value(record))
        parts.append("\n".join([_title(rows[0]), "", *_lines(rows)]))
    return "\n\n".join(parts)


def _title(record: dict[str, Any]) -> str:
    """What the table of this record is of."""
    train, test = record["train"], record["test"]
    subset = f" ({train['subset']})" if train["subset"] else ""
    title = (
        f"### {record['data']}, {record['protocol']}\n\n{record['classes']} classes ({record['label']}); learnt from "
        f"{train['images']:,} images of {train['split']}{subset}, tested on {test['images']:,} of {test['split']}"
    )
    shared = results.shared(record)
    return title + (f"; {shared} test images are also in the training images, pixel for pixel." if shared else ".")


def _lines(records: list[dict[str, Any]]) -> list[str]:
    columns = ["model", "size", "features", results.metric(records[0]), "95 % interval", "seeds", "choice"]
    rows = [_row(record) for record in records]
    if any("gain" in record for record in records):
        gains = ["gain of the crop", *map(results.shown_gain, records)]
        columns, *rows = [[*row[:5], gain, *row[5:]] for row, gain in zip([columns, *rows], gains, strict=True)]
    rows += [[*row, *[""] * (len(columns) - len(row))] for row in _paper(records[0])]
    return [_line(columns), _line(["---"] * len(columns)), *map(_line, rows)]


def _row(record: dict[str, Any]) -> list[str]:
    deviation = "" if record["std"] is None else f" ± {record['std']:.2f}"
    size = "×".join(str(side) for side in dict.fromkeys(record["img_size"]))
    return [
        f"{record['model']} ({record['parameters'] / 1e6:.1f} M)",
        size,
        record["view"],
        f"{results.value(record):.2f}{deviation}",
        results.shown_interval(record, "–"),
        str(len(record["each"])),
        results.chosen(record),
    ]


def _paper(record: dict[str, Any]) -> list[list[str]]:
    """The paper's results for the same data set and protocol."""
    alias = record["data"].partition(":")[0]
    which = (SAME_DATA.get(alias, alias), record["protocol"], results.metric(record))
    if record["train"]["subset"] or which not in TASKS.values():
        return []
    task = next(task for task, other in TASKS.items() if other == which)
    rows = []
    for architecture, tasks in paper.RESULTS.items():
        size = DENSE_SIZES.get(which[2]) or ("448" if architecture.endswith("448") else "224")
        for method, figure in zip(paper.METHODS, tasks.get(task, ()), strict=False):
            rows.append([f"{method}, {architecture.removeprefix('dseq_jepa_')} (paper)", size, "", figure, "", "", ""])
    return rows


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
