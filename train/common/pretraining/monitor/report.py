"""A run's log and pictures → one self-contained HTML page: curves as SVG, pictures embedded."""

import base64
import html
import io
from pathlib import Path
from typing import Any

from PIL import Image

from ...run.log import records

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 440, 190, 62, 24
_COLOURS = ("#e66100", "#1a85ff", "#009e73", "#cc3d8f", "#5d3a9b")
_MOST_POINTS = 400
_MOST_PICTURES = 8

Curve = tuple[str, list[tuple[float, float]]]  # its name and points


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
    charts = [
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
    drawn = "\n".join(_chart(title, curves) for title, curves in charts if any(points for _, points in curves))
    settings = html.escape((output / "config.yaml").read_text(encoding="utf-8"))
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
    page = _PAGE.format(
        name=html.escape(output.resolve().name),
        summary=summary,
        warning=warning,
        regions=f"<h2>Regions</h2>{regions}" if regions else "",
        charts=drawn,
        settings=settings,
    )
    path = output / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _probed(line: dict[str, Any], encoder: str, name: str) -> float | None:
    """A figure of one of the encoders; older logs have none of the student."""
    return (line["probe"] if encoder == "target" else line["probe"].get("student", {})).get(name)


def _chart(title: str, curves: list[Curve]) -> str:
    """One line chart."""
    curves = [(name, _thinned(points)) for name, points in curves if points]
    xs = [x for _, points in curves for x, _ in points]
    ys = [y for _, points in curves for _, y in points]
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
    if y1 == y0:
        y0, y1 = y0 - 0.5 * (abs(y0) or 1), y1 + 0.5 * (abs(y1) or 1)

    def at(x: float, y: float) -> tuple[float, float]:
        right, up = (x - x0) / max(x1 - x0, 1e-9), (y - y0) / (y1 - y0)
        return _LEFT + right * (_WIDTH - _LEFT - 8), 8 + (1 - up) * (_HEIGHT - 8 - _BOTTOM)

    marks = []
    for i in range(5):
        y = y0 + (y1 - y0) * i / 4
        height = at(x0, y)[1]
        marks.append(f'<line x1="{_LEFT}" x2="{_WIDTH - 8}" y1="{height:.1f}" y2="{height:.1f}" class="grid"/>')
        marks.append(f'<text x="{_LEFT - 6}" y="{height + 4:.1f}" text-anchor="end">{y:.3g}</text>')
    for x, anchor in ((x0, "start"), (x1, "end")):
        marks.append(f'<text x="{at(x, y0)[0]:.1f}" y="{_HEIGHT - 6}" text-anchor="{anchor}">step {x:,}</text>')
    legend = []
    for (name, points), colour in zip(curves, _COLOURS * 2, strict=False):
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in (at(x, y) for x, y in points))
        marks.append(f'<polyline points="{path}" stroke="{colour}"/>')
        if len(points) < 40:
            marks += [
                f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.5" fill="{colour}"/>' for a, b in (at(*p) for p in points)
            ]
        legend.append(f'<span><i style="background:{colour}"></i>{name}: {points[-1][1]:.4g}</span>')
    svg = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{title}">{"".join(marks)}</svg>'
    return f"<figure><figcaption>{title}</figcaption>{svg}<div class=legend>{''.join(legend)}</div></figure>"


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most _MOST_POINTS points, each the mean of a group of neighbours."""
    size = -(-len(points) // _MOST_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


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
        small = io.BytesIO()
        Image.open(path).convert("RGB").save(small, "JPEG", quality=85)
        data = base64.b64encode(small.getvalue()).decode()
        step = int(path.stem.removeprefix("step-"))
        words = f"After step {step:,}: image, saliency, ranked regions"
        image = f'<img alt="{words}" src="data:image/jpeg;base64,{data}">'
        parts.append(f"<figure><figcaption>{words}</figcaption>{image}</figure>")
    return "\n".join(parts)


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{name}: pretraining report</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; color: #181a20; max-width: 1000px; margin: 2em auto; padding: 0 1em }}
h1 {{ font-size: 1.5em; margin-bottom: 0 }} h2 {{ font-size: 1.15em; margin-top: 2em }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(400px, 100%), 1fr)); gap: 1.2em }}
figure {{ margin: 0 }} figcaption {{ font-weight: 600; margin: .6em 0 .2em }}
svg {{ width: 100% }} svg text {{ font: 11px system-ui, sans-serif; fill: #6e727c }}
polyline {{ fill: none; stroke-width: 1.6 }} .grid {{ stroke: #e4e5ea }}
.legend {{ font-size: .85em }} .legend span {{ margin-right: 1em; display: inline-block }}
.legend i {{ display: inline-block; width: .8em; height: .8em; margin-right: .35em; border-radius: 2px }}
img {{ max-width: 100%; border-radius: 4px }} pre {{ background: #f5f5f7; padding: 1em; overflow: auto }}
table {{ border-collapse: collapse }}
th, td {{ padding: .2em .8em; border-bottom: 1px solid #e4e5ea; text-align: right }}
th:first-child {{ text-align: left; font-weight: 500 }} .bad {{ color: #b00020; font-weight: 600 }}
</style>
<h1>{name}</h1><p>{summary}</p>{warning}
<div class="charts">{charts}</div>
{regions}
<h2>Settings</h2><pre>{settings}</pre>
</html>
"""
