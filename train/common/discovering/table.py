"""Records of maps → Markdown: one table of masks or of boxes, and one of scenes of several objects."""

from collections.abc import Sequence
from typing import Any

from .predictions import REGIONS
from .published import BOXES, MASKS, published

Record = dict[str, Any]


def tables(records: Sequence[Record], data: str) -> str:
    """All that there is to show of these records, in their order. data: the name or path of the data set."""
    boxed = any("corloc" in each for record in records for each in record["predictions"].values())
    parts = [_boxes(records, data) if boxed else _masks(records, data)]
    if any("scene" in record for record in records):
        parts.append(_scenes(records))
    return "\n\n".join(parts)


def _masks(records: Sequence[Record], data: str) -> str:
    rows = []
    for record in records:
        if not record["predictions"]:
            continue
        soft = [
            f"{record['max_f']:.1f}",
            *(f"{record[key]:.2f}" if key in record else "" for key in ("mae", "brightness")),
        ]
        for way, found in record["predictions"].items():
            iou = f"{found['iou']:.1f} [{_span(found['iou_interval'])}]"
            binary = [way, f"{found['f']:.1f}", iou, f"{found['random_iou']:.1f}", f"{found['accuracy']:.1f}"]
            rows.append([*_name(record), *soft, *binary])
            soft = ["", "", ""]
    for method, (max_f, iou, accuracy) in published(MASKS, data).items():
        rows.append([_published(method), "", f"{max_f}", "", "", "", "", f"{iou}", "", f"{accuracy}"])
    heads = ["model", "map", "maxF", "MAE", "brightness", "prediction", "F", "IoU", "IoU, random", "accuracy"]
    return markdown(heads, rows)


def _boxes(records: Sequence[Record], data: str) -> str:
    rows = []
    for record in records:
        for way, found in record["predictions"].items():
            corloc = f"{found['corloc']:.1f} [{_span(found['corloc_interval'])}]"
            rows.append([*_name(record), way, corloc, f"{found['random_corloc']:.1f}"])
    rows += [[_published(method), "", "", f"{figure}", ""] for method, figure in published(BOXES, data).items()]
    return markdown(["model", "map", "prediction", "CorLoc", "CorLoc, random"], rows)


def _scenes(records: Sequence[Record]) -> str:
    rows = []
    for record in records:
        if found := record.get("scene"):
            fg_ari = f"{found['fg_ari']:.1f} [{_span(found['fg_ari_interval'])}]"
            purity = [f"{found['purity']:.1f}", f"{found['random_purity']:.1f}"]
            rows.append([*_name(record), f"{record['regions']:.1f}", fg_ari, f"{found['ari']:.1f}", *purity])
    heads = ["model", "map", "regions", "foreground ARI", "full ARI", "purity", "purity, random"]
    return markdown(heads, rows)


def over_training(records: Sequence[Record]) -> str:
    """A row for each checkpoint, a column for each query: whether saliency finds objects better as training goes on."""
    queries = [*dict.fromkeys(record["map"] for record in records if record["weights"])]
    found: dict[str, dict[str, str]] = {}
    for record in records:
        if record["weights"]:
            found.setdefault(record["model"], {})[record["map"]] = f"{score(record)[1]:.1f}"
    rows = [[model, *(own.get(query, "") for query in queries)] for model, own in found.items()]
    return markdown([f"over training: {score(records[0])[0]}", *queries], rows)


def score(record: Record) -> tuple[str, float]:
    """The one figure that a map of a query is told by, and its name."""
    if "scene" in record:  # foreground ARI is high where large cuts separate what is far apart
        return "purity above random", record["scene"]["purity"] - record["scene"]["random_purity"]
    if "max_f" in record:
        return "maxF", record["max_f"]
    return "CorLoc of the ranked regions", record["predictions"][REGIONS]["corloc"]


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; what repeats in the first column is shown once, and columns that are empty are left out."""
    kept = [at for at in range(len(heads)) if any(row[at] for row in rows)]
    lines, last = [], None
    for row in rows:
        cells = [row[at] for at in kept]
        lines.append(["" if cells[0] == last else cells[0], *cells[1:]])
        last = cells[0]
    return "\n".join(f"| {' | '.join(line)} |" for line in [[heads[at] for at in kept], ["---"] * len(kept), *lines])


def _name(record: Record) -> list[str]:
    return [record["model"], record["map"]]


def _published(method: str) -> str:
    return f"*published, other resolution: {method}*"


def _span(interval: Sequence[float]) -> str:
    return "–".join(f"{bound:.1f}" for bound in interval)
