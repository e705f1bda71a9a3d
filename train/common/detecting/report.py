"""A detection run as one HTML page: AP and loss curves, and predictions beside the truth."""

import colorsys
import html
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from timm_dseq.images import decode

from ..run.log import records
from ..run.report import charts, page, picture
from . import masks
from .annotated import Annotated
from .evaluation import Detection, truth

PARTS = ("objectness", "rpn_box_reg", "classifier", "box_reg", "mask")  # of the loss
SHOWN = 8  # images
SURE = 0.5  # score from which on a prediction is drawn
_SIDE = 480  # pixels of a picture's longer side


def write_report(output: Path, annotated: Annotated, found: list[Detection], figures: dict[str, float]) -> Path:
    """Write `report.html`; returns its path. found, figures: by `evaluate` at the end."""
    lines = records(output / "log.jsonl")
    parts = [name for name in (lines[0] if lines else ()) if name in PARTS]
    evaluated = [line for line in lines if "box_ap" in line]
    if lines and (not evaluated or evaluated[-1]["step"] < lines[-1]["step"]):
        evaluated.append({"step": lines[-1]["step"], **figures})

    def curve(name: str, of: list[dict]) -> tuple[str, list[tuple[float, float]]]:
        return name.replace("_", " "), [(line["step"], line[name]) for line in of if line.get(name) is not None]

    curves = [
        ("AP", [curve(name, evaluated) for name in ("box_ap", "mask_ap", "box_ap50", "mask_ap50")]),
        ("Loss", [curve(name, lines) for name in ("loss", *parts)]),
        ("Learning rate", [curve("lr", lines)]),
        ("Gradient norm", [curve("gradient_norm", lines)]),
        ("Images per second", [curve("images_per_second", lines)]),
    ]
    summary = f"{lines[-1]['step']:,} steps" if lines else "no steps"
    drawn = "\n".join(
        picture(f"{annotated.source.where(index)}: truth, and what was found with a score of {SURE:g} or more", sheet)
        for index, sheet in sheets(annotated, found)
    )
    body = f"{_table(figures)}{charts(curves)}<h2>Test images</h2>{drawn}"
    return page(output, "detection", f"{summary}; {html.escape(annotated.said())}", body)


def _table(figures: dict[str, float]) -> str:
    """AP of boxes and masks; −1, where there is nothing of a size, is left out."""
    names = list(dict.fromkeys(name.partition("_")[2] for name in figures))
    heads = "".join(f"<th>{name.replace('_', ' ')}</th>" for name in names)
    rows = ""
    for kind in dict.fromkeys(name.partition("_")[0] for name in figures):
        cells = [figures[f"{kind}_{name}"] for name in names]
        shown = "".join(f"<td>{100 * x:.1f}</td>" if x >= 0 else "<td></td>" for x in cells)
        rows += f"<tr><th>{kind}</th>{shown}</tr>"
    return f"<table><tr><th>%</th>{heads}</tr>{rows}</table>"


def sheets(annotated: Annotated, found: list[Detection]) -> list[tuple[int, Image.Image]]:
    """Some images, spread over the split: the truth on the left, the predictions on the right."""
    some = annotated.with_objects[:: max(1, len(annotated.with_objects) // SHOWN)][:SHOWN]
    true, sure = truth(annotated)["annotations"], [one for one in found if one["score"] >= SURE]
    pairs = []
    for index in some:
        image = annotated.source.read(index, decode)
        both = [drawn(image, [o for o in of if o["image_id"] == index], annotated.names) for of in (true, sure)]
        sheet = Image.new("RGB", (2 * both[0].width + 6, both[0].height), "white")
        for place, one in enumerate(both):
            sheet.paste(one, (place * (one.width + 6), 0))
        pairs.append((index, sheet))
    return pairs


def drawn(image: Image.Image, objects: list[Detection], names: tuple[str, ...]) -> Image.Image:
    """The image, _SIDE pixels at its longer side, with boxes, masks, names and scores; a colour for each class."""
    size = (image.height, image.width)
    scale = _SIDE / max(size)
    picture = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    for one in objects:
        if one.get("segmentation"):
            mask = Image.fromarray(115 * masks.bitmap(one["segmentation"], size)).resize(picture.size)
            picture.paste(_colour(one["category_id"]), (0, 0), mask)
    pen = ImageDraw.Draw(picture)
    for one in objects:
        left, top, width, height = (scale * x for x in one["bbox"])
        colour = _colour(one["category_id"])
        pen.rectangle([left, top, left + width, top + height], outline=colour, width=2)
        words = names[one["category_id"]] + (f" {one['score']:.2f}" if "score" in one else "")
        words += " (crowd)" * bool(one.get("iscrowd"))
        box = pen.textbbox((left + 2, top), words)
        pen.rectangle([box[0] - 2, box[1] - 1, box[2] + 2, box[3] + 1], fill=colour)
        pen.text((left + 2, top), words, fill="black" if np.dot(colour, (0.3, 0.6, 0.1)) > 110 else "white")
    return picture


def _colour(number: int) -> tuple[int, ...]:
    """Of a class; neighbours, and their neighbours, differ."""
    shade = ((0.75, 0.95), (0.5, 1.0), (1.0, 0.75))[number % 3]  # saturation and value
    return tuple(round(255 * x) for x in colorsys.hsv_to_rgb(0.37 * number % 1, *shade))
