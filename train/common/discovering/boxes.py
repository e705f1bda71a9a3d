"""Boxes of objects as data sets write them → corners (k, 4) in pixels: left, top, right, bottom.

A convention is never assumed: it is the only one in which all boxes of the data set lie in their images.
"""

import json
import xml.etree.ElementTree as xml
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torchvision.ops import box_convert, box_iou

from timm_dseq import UserError

FORMATS = ("xyxy", "xywh", "cxcywh")
SLACK = 1.0  # pixels that a box may lie outside its image, as rounding leaves it
Row = dict[str, Any]


def corners(boxes: torch.Tensor, form: str, sizes: torch.Tensor, relative: bool) -> torch.Tensor:
    """Boxes (k, 4) as they are written → corners (k, 4) in pixels. sizes (k, 2) or (2,): of the images, width first.

    relative: whether they are shares of the image.
    """
    return box_convert(boxes * torch.cat([sizes, sizes], dim=-1) if relative else boxes, form, "xyxy")


def degenerate(box: torch.Tensor) -> torch.Tensor:
    """Which corners (k, 4) enclose nothing: (k,) bool."""
    return ~(box[:, 2:] > box[:, :2]).all(1)


def outside(box: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Which corners (k, 4) do not lie in images of these sizes (k, 2): (k,) bool."""
    return (box[:, :2] < -SLACK).any(1) | (box[:, 2:] > sizes + SLACK).any(1)


def convention(
    every: Sequence[torch.Tensor], sizes: torch.Tensor, names: Sequence[str], asked: str | None = None
) -> tuple[str, bool]:
    """The format of all boxes, (k, 4) of each image, and whether they are shares of the image.

    sizes (n, 2): of the images, width first. names: of the images. asked: the format that a user names; it is checked,
    too.
    """
    boxes = torch.cat([*every])
    image = torch.arange(len(every)).repeat_interleave(torch.tensor([len(own) for own in every]))
    sizes, relative = sizes[image], bool(boxes.min() >= 0 and boxes.max() <= 1)
    wrong = {}
    for form in [asked] if asked else FORMATS:
        found = corners(boxes, form, sizes, relative)
        wrong[form] = degenerate(found) | outside(found, sizes)
    fitting = [form for form in wrong if not wrong[form].any()]
    if len(fitting) > 1:
        raise UserError(f"the boxes fit {' and '.join(fitting)} alike: name their way as data.box_format.")
    if not fitting:
        form = min(wrong, key=lambda form: int(wrong[form].sum()))
        at = int(wrong[form].nonzero()[0])
        shown, (width, height) = ", ".join(f"{x:g}" for x in boxes[at].tolist()), sizes[at].tolist()
        why = "encloses nothing" if degenerate(corners(boxes, form, sizes, relative))[at] else "lies outside"
        raise UserError(
            f"{names[image[at]]}: its box [{shown}], read as {form}, {why} (the image has {width:g}×{height:g} pixels; "
            f"{int(wrong[form].sum())} boxes of {len(boxes)} are so): mend them, or name their way as data.box_format."
        )
    return fitting[0], relative


def coco_rows(images: Path, file: Path) -> list[Row]:
    """Rows {"image", "boxes", "size"} of the images that a JSON file in COCO's format names; crowds are left out."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        boxes: dict[Any, list] = {image["id"]: [] for image in content["images"]}
        for one in content["annotations"]:
            if not one.get("iscrowd", 0):
                boxes[one["image_id"]].append([float(x) for x in one["bbox"]])
        found = [
            (images / image["file_name"], boxes[image["id"]], [image["width"], image["height"]])
            for image in content["images"]
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} holds no boxes in COCO's format ({type(error).__name__}: {error}).") from error
    return _rows(found)


def voc_rows(images: Path, folder: Path) -> list[Row]:
    """Rows {"image", "boxes", "size"} of the images that VOC's XML files describe; there the first pixel is 1."""
    found = []
    for file in sorted(folder.glob("*.xml")):
        try:
            text = file.read_text(encoding="utf-8")
            if "<!" in text:  # entities could grow without bound
                raise ValueError("it declares entities")
            tree = xml.fromstring(text)
            names = ("xmin", "ymin", "xmax", "ymax")
            boxes = [[float(one.find("bndbox").find(name).text) for name in names] for one in tree.iter("object")]
            boxes = [[left - 1, top - 1, right, bottom] for left, top, right, bottom in boxes]
            size = [int(tree.find("size").find(name).text) for name in ("width", "height")]
            found.append((images / Path(tree.find("filename").text).name, boxes, size))
        except (OSError, ValueError, xml.ParseError, AttributeError, TypeError) as error:
            raise UserError(f"{file} holds no boxes as VOC has them ({type(error).__name__}: {error}).") from error
    if not found:
        raise UserError(f"{folder} holds no XML files: name VOC's Annotations as data.boxes.")
    return _rows(found)


def _rows(found: list[tuple[Path, list, list]]) -> list[Row]:
    absent = [path for path, *_ in found if not path.is_file()]
    if absent:
        raise UserError(
            f"{absent[0]} does not exist ({len(absent)} of {len(found)} images): is data.path their folder?"
        )
    return [{"image": {"bytes": None, "path": str(path)}, "boxes": boxes, "size": size} for path, boxes, size in found]


def best_overlap(predicted: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """The greatest IoU of each predicted box (..., 4) with any true one (k, 4), corners in pixels: (...)."""
    return box_iou(predicted.view(-1, 4), truth).amax(1).view(predicted.shape[:-1])
