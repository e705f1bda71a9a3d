"""CLEVR's two labels, computed from scenes: how many objects there are, and how far the nearest one is."""

import bisect
import json
from pathlib import Path
from typing import Any

from timm_dseq import UserError

TASKS = {"count": 8, "distance": 6}  # and their classes
FEWEST = 3  # objects in a scene
NEAREST = (8.0, 8.5, 9.0, 9.5, 10.0)  # edges of the bins of the nearest object's depth


def label_of(objects: list[dict[str, Any]], task: str) -> int:
    """The class of a scene with these objects."""
    if task == "count":
        return len(objects) - FEWEST
    return bisect.bisect_left(NEAREST, min(thing["pixel_coords"][2] for thing in objects))


def labels_of(scenes: list[str], task: str) -> list[int]:
    """Of a column that holds each scene as JSON, a list of objects or {"objects": […]}."""
    labels = []
    for row, text in enumerate(scenes):
        try:
            scene = json.loads(text) if isinstance(text, str) else text
            labels.append(label_of(scene["objects"] if isinstance(scene, dict) else scene, task))
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise UserError(
                f"row {row} holds no scene of CLEVR ({type(error).__name__}): check data.scenes."
            ) from error
    return labels


def scene_file(folder: Path, split: str) -> Path:
    """Where the official archive keeps the scenes of a split; its images are in images/SPLIT."""
    return folder / "scenes" / f"CLEVR_{split}_scenes.json"


def official(folder: Path, split: str, task: str) -> tuple[list[dict[str, Any]], list[int]]:
    """Rows and labels of a split of the official archive, unpacked."""
    scenes = json.loads(scene_file(folder, split).read_text())["scenes"]
    rows = [
        {"image": {"bytes": None, "path": str(folder / "images" / split / scene["image_filename"])}} for scene in scenes
    ]
    return rows, labels_of(scenes, task)
