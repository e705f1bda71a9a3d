"""Small annotated data sets on the disk: COCO folders of drawn scenes, and Parquet files."""

import io
import json
from functools import cache
from pathlib import Path

import datasets
import numpy as np
from common.data.scenes import FORMS, Scenes
from faster_coco_eval.core import mask as coco
from PIL import Image

IDS = (1, 3, 4, 70, 71, 90)  # of the forms, with gaps


@cache
def drawn(split: str, index: int) -> tuple[Image.Image, list[tuple[str, np.ndarray]]]:
    """A scene, and of each shape its form and mask (128, 128) bool."""
    row, shapes = Scenes(split).drawn(index)
    return row["image"], [(form, np.array(mask) > 0) for form, mask in shapes]


def content_of(split: str, count: int) -> tuple[dict, list[Image.Image]]:
    """COCO's JSON of scenes, boxes and areas from the masks by numpy, and the pictures."""
    content = {"images": [], "annotations": [], "categories": []}
    content["categories"] = [{"id": id_, "name": form} for id_, form in zip(IDS, FORMS, strict=True)]
    pictures = []
    for index in range(count):
        picture, shapes = drawn(split, index)
        image = {"id": 100 + 7 * index, "file_name": f"{index:03}.png", "width": 128, "height": 128}
        content["images"].append(image)
        pictures.append(picture)
        for form, bits in shapes:
            (ys, xs), code = np.nonzero(bits), coco.encode(np.asfortranarray(bits.astype(np.uint8)))
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": image["id"],
                    "category_id": IDS[FORMS.index(form)],
                    "bbox": [float(x) for x in (xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1)],
                    "area": int(bits.sum()),
                    "iscrowd": 0,
                    "segmentation": {"size": code["size"], "counts": code["counts"].decode()},
                }
            )
    return content, pictures


def coco_folder(folder: Path, train: int = 8, val: int = 4, change=None) -> Path:
    """instances_train.json, train/, instances_val.json, val/. change: what a test does to the training JSON."""
    for split, drawn, count in (("train", "train", train), ("val", "test", val)):
        content, pictures = content_of(drawn, count)
        (folder / split).mkdir(parents=True, exist_ok=True)
        for image, picture in zip(content["images"], pictures, strict=True):
            picture.save(folder / split / image["file_name"])
        if change and split == "train":
            changed = change(content)
            content = content if changed is None else changed
        (folder / f"instances_{split}.json").write_text(json.dumps(content))
    return folder


def parquet_folder(
    folder: Path, convert=lambda box: box, area: bool = False, names: bool = True, count: int = 8
) -> Path:
    """train.parquet and test.parquet with a column of objects. convert: left, top, width, height in 128 × 128 → box."""
    folder.mkdir(parents=True, exist_ok=True)
    number = datasets.ClassLabel(names=list(FORMS)) if names else datasets.Value("int64")
    box = datasets.Sequence(datasets.Value("float64"))
    objects = {"bbox": datasets.Sequence(box), "category": datasets.Sequence(number)}
    if area:
        objects["area"] = datasets.Sequence(datasets.Value("float64"))
    for split in ("train", "test"):
        content, pictures = content_of(split, count)
        rows = {"image": [], "objects": []}
        for image, picture in zip(content["images"], pictures, strict=True):
            file = io.BytesIO()
            picture.save(file, "PNG")
            rows["image"].append({"bytes": file.getvalue(), "path": None})
            own = [one for one in content["annotations"] if one["image_id"] == image["id"]]
            entry = {
                "bbox": [convert(one["bbox"]) for one in own],
                "category": [IDS.index(one["category_id"]) for one in own],
            }
            if area:
                entry["area"] = [one["bbox"][2] * one["bbox"][3] for one in own]
            rows["objects"].append(entry)
        kinds = datasets.Features({"image": datasets.Image(), "objects": objects})
        datasets.Dataset.from_dict(rows, features=kinds).to_parquet(folder / f"{split}.parquet")
    return folder
