"""Files of boxes as data sets have them → rows of images and boxes; and how much boxes overlap."""

import json
import xml.etree.ElementTree as xml
from pathlib import Path
from typing import Any

import torch
from torchvision.ops import box_iou

from timm_dseq import UserError

Row = dict[str, Any]


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
