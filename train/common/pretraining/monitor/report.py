"""A run's log and pictures → one self-contained HTML page: curves as SVG, pictures embedded."""

import html
from pathlib import Path
from typing import Any

from PIL import Image

from ...run.log import records
from ...run.report import Curve, charts, page, picture

_MOST_PICTURES = 8


def write_report(output: Path) -> Path:
    """Write `report.html` of the run in this folder; returns its path."""
    lines = records(output / "log.jsonl")
    places = max((len(line["loss_by_step"]) for line in lines), default=0)
    probes = [{"step": 0, "probe": line["probe_before"]} for line in lines[:1] if "probe_before" in line]
    probes += [line for line in lines if "probe" in line]

    def curve(name: str, value, of: list[dict[str, Any]] = lines) -> Curve:
        points = [(line["step"], value(line)) for line in of]
        return name, [(x, y) for x, y in points if y is not None]

    names = lines[0].get("losses", {}) if lines else {}  # older logs have none
    parts = [curve(name, lambda line, name=name: line["losses"][name]) for name in names if len(names) > 1]
    curves = [
        ("Loss", [curve("loss", lambda line: line["loss"]), *parts]),
        (
            "Loss by place in the sequence",
            [curve(f"step {k + 1}", lambda line, k=k: line["loss_by_step"][k]) for k in range(places)],
        ),
        (
            "Probes",
            [
                curve(f"{name} of the {encoder}", lambda line, of=(encoder, name): _probed(line, *of), probes)
                for encoder in ("target", "student")
                for name in ("knn", "linear")
            ],
        ),
        (
            "RankMe: dimensions in use",
            [
                curve("target, images", lambda line: line["probe"]["rank_me"], probes),
                curve("target, tokens", lambda line: line["probe"].get("rank_me_tokens"), probes),
                curve("student, images", lambda line: _probed(line, "student", "rank_me"), probes),
            ],
        ),
        (
            "Variance of the tokens: shares",
            [
                curve("the image's mean", lambda line: line["probe"].get("share_image"), probes),
                curve("the place", lambda line: line["probe"].get("share_place"), probes),
            ],
        ),
        ("Feature spread over images", [curve("std", lambda line: line["probe"]["feature_std"], probes)]),
        (
            "Regions",
            [
                curve("found per image", lambda line: line["regions_found"]),
                curve("share of images on regions", lambda line: line["region_share"]),
                curve("lambda", lambda line: line["lambda"]),
            ],
        ),
        ("Learning rate", [curve("lr", lambda line: line["lr"])]),
        ("Gradient norm", [curve("norm", lambda line: line["gradient_norm"])]),
        ("Images per second", [curve("images/s", lambda line: line["images_per_second"])]),
    ]
    last = lines[-1] if lines else {"step": 0, "samples": 0, "broken": 0}
    skipped = sum(line["skipped"] for line in lines)
    summary = (
        f"{last['step']:,} steps, {last['samples']:,} images seen, {last['broken']} unreadable, "
        f"{skipped} steps skipped because they were not finite"
    )
    collapsed = [line for line in probes if "collapse" in line["probe"]]
    warning = "".join(
        f"<p class=bad>After step {line['step']} {html.escape(line['probe']['collapse'])}.</p>"
        for line in collapsed[:1]
    )
    fallen = [line for line in probes if "phase" in line["probe"]]
    warning += "".join(
        f"<p>After step {line['step']} {html.escape(line['probe']['phase'])}. Latent prediction begins with such a "
        "fall, and climbs out of it within some thousand steps.</p>"
        for line in fallen[-1:]
    )
    regions = _histogram(lines) + _pictures(output)
    parts = warning, charts(curves), f"<h2>Regions</h2>{regions}" if regions else ""
    return page(output, "pretraining", summary, "\n".join(parts))


def _probed(line: dict[str, Any], encoder: str, name: str) -> float | None:
    """A figure of one of the encoders; older logs have none of the student."""
    return (line["probe"] if encoder == "target" else line["probe"].get("student", {})).get(name)


def _histogram(lines: list[dict[str, Any]]) -> str:
    """A table: how many regions images had in the first and the last tenth of the run."""
    tenth = max(1, len(lines) // 10)
    rows = []
    for name, part in (("first tenth of the run", lines[:tenth]), ("last tenth", lines[-tenth:])):
        counts = [sum(column) for column in zip(*(line["region_counts"] for line in part), strict=True)]
        if sum(counts):
            cells = "".join(f"<td>{count / sum(counts):.0%}</td>" for count in counts)
            rows.append(f"<tr><th>{name}</th>{cells}</tr>")
    if not rows:
        return ""
    heads = "".join(f"<th>{i}</th>" for i in range(len(counts)))
    return f"<table><tr><th>regions found in an image</th>{heads}</tr>{''.join(rows)}</table>"


def _pictures(output: Path) -> str:
    """The sheets of pictures over the run, evenly spaced if they are many."""
    paths = sorted((output / "pictures").glob("step-*.png"))
    if len(paths) > _MOST_PICTURES:
        paths = [paths[round(i * (len(paths) - 1) / (_MOST_PICTURES - 1))] for i in range(_MOST_PICTURES)]
    parts = []
    for path in paths:
        step = int(path.stem.removeprefix("step-"))
        parts.append(picture(f"After step {step:,}: image, saliency, ranked regions", Image.open(path)))
    return "\n".join(parts)
