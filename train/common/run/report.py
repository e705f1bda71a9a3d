"""One self-contained HTML page about a run: curves as SVG, pictures embedded."""

import base64
import html
import io
from pathlib import Path

from PIL import Image

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 440, 190, 62, 24
_COLOURS = ("#e66100", "#1a85ff", "#009e73", "#cc3d8f", "#5d3a9b")
_MOST_POINTS = 400

Curve = tuple[str, list[tuple[float, float]]]  # its name and points


def page(output: Path, kind: str, summary: str, body: str) -> Path:
    """Write `report.html` of the run in this folder, with its settings; returns its path.

    kind: of the run, in a word. summary: in words. body: HTML.
    """
    settings = html.escape((output / "config.yaml").read_text(encoding="utf-8"))
    name, path = html.escape(output.resolve().name), output / "report.html"
    text = _PAGE.format(name=name, kind=kind, summary=summary, body=body, settings=settings)
    path.write_text(text, encoding="utf-8")
    return path


def picture(words: str, image: Image.Image) -> str:
    """An image with a caption."""
    small = io.BytesIO()
    image.convert("RGB").save(small, "JPEG", quality=85)
    data = base64.b64encode(small.getvalue()).decode()
    words = html.escape(words)
    return f'<figure><figcaption>{words}</figcaption><img alt="{words}" src="data:image/jpeg;base64,{data}"></figure>'


def charts(titled: list[tuple[str, list[Curve]]]) -> str:
    """Line charts side by side; one without any points is left out."""
    drawn = "\n".join(_chart(title, curves) for title, curves in titled if any(points for _, points in curves))
    return f'<div class="charts">{drawn}</div>'


def _chart(title: str, curves: list[Curve]) -> str:
    """One line chart."""
    last = [points[-1][1] for _, points in curves if points]
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
    for (name, points), colour, value in zip(curves, _COLOURS * 2, last, strict=False):
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in (at(x, y) for x, y in points))
        marks.append(f'<polyline points="{path}" stroke="{colour}"/>')
        if len(points) < 40:
            marks += [
                f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.5" fill="{colour}"/>' for a, b in (at(*p) for p in points)
            ]
        legend.append(f'<span><i style="background:{colour}"></i>{name}: {value:.4g}</span>')
    svg = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{title}">{"".join(marks)}</svg>'
    return f"<figure><figcaption>{title}</figcaption>{svg}<div class=legend>{''.join(legend)}</div></figure>"


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most _MOST_POINTS points, each the mean of a group of neighbours."""
    size = -(-len(points) // _MOST_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{name}: {kind} report</title>
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
<h1>{name}</h1><p>{summary}</p>
{body}
<h2>Settings</h2><pre>{settings}</pre>
</html>
"""
