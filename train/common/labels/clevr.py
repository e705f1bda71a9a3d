"""CLEVR's two labels, computed from scenes: how many objects there are, and how far the nearest one is."""

import bisect
import json
from pathlib import Path
from typing import Any

from timm_dseq import UserError

TASKS = {"count": 8, "distance": 6}  # and their classes
FEWEST = 3  # objects in a scene
NEAREST = (8.0, 8.5, 9.0, 9.5, 10.0)  # edges of the bins of the nearest object's depth
_MALFORMED = (ValueError, TypeError, KeyError, IndexError, AttributeError)


def label_of(objects: list[dict[str, Any]], task: str) -> int:
    """The class of a scene with these objects."""
    if task == "count":
        return len(objects) - FEWEST
    return bisect.bisect_left(NEAREST, min(thing["pixel_coords"][2] for thing in objects))


def labels_of(scenes: list[Any], task: str) -> list[int]:
    """Of scenes that are lists of objects or {"objects": […]}, as JSON or as it was read."""
    labels = []
    for row, scene in enumerate(scenes):
        try:
            scene = json.loads(scene) if isinstance(scene, str) else scene
            labels.append(label_of(scene["objects"] if isinstance(scene, dict) else scene, task))
        except _MALFORMED as error:
            raise UserError(
                f"row {row} holds no scene of CLEVR ({type(error).__name__}): check data.scenes."
            ) from error
    return labels


def scene_file(folder: Path, split: str) -> Path:
    """Where the official archive keeps the scenes of a split; its images are in images/SPLIT."""
    return folder / "scenes" / f"CLEVR_{split}_scenes.json"


def official(folder: Path, split: str, task: str) -> tuple[list[dict[str, Any]], list[int]]:
    """Rows and labels of a split of the official archive, unpacked."""
    path = scene_file(folder, split)
    try:
        scenes = json.loads(path.read_text(encoding="utf-8"))["scenes"]
        files = [str(folder / "images" / split / scene["image_filename"]) for scene in scenes]
    except (OSError, *_MALFORMED) as error:
        raise UserError(f"{path} holds no scenes of CLEVR ({type(error).__name__}): unpack it again.") from error
    return [{"image": {"bytes": None, "path": file}} for file in files], labels_of(scenes, task)
