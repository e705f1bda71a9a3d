"""AP equals pycocotools' on random cases and on real annotations, however many processes predict."""

import contextlib
import copy
import io
import json
from pathlib import Path

import numpy as np
import pytest
from common.data.source import Source
from common.detecting import masks
from common.detecting.annotated import Annotated, Objects
from common.detecting.evaluation import SUMMARY, as_coco, average_precision, truth
from common.detecting.reading.opening import open_annotated
from common.detecting.settings import Annotations
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

DATA = Path(__file__).parents[4] / "shared" / "data"


def pycocotools_figures(annotations: dict, found: list[dict], kinds=("box", "mask")) -> dict[str, float]:
    figures = {}
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO()
        reference.dataset = copy.deepcopy(annotations)
        reference.createIndex()
        for name, kind in (("box", "bbox"), ("mask", "segm")):
            if name not in kinds:
                continue
            evaluator = COCOeval(reference, reference.loadRes(copy.deepcopy(found)), kind)
            evaluator.evaluate()
            evaluator.accumulate()
            evaluator.summarize()
            figures |= {f"{name}_{part}": x for part, x in zip(SUMMARY, evaluator.stats, strict=False)}
    return figures


def disturbed(annotations: dict, seed: int) -> list[dict]:
    """Detections: the truth moved, some with a wrong class, some twice, some missing, some of nothing; tied scores."""
    draw, found = np.random.default_rng(seed), []
    sizes = {image["id"]: (image["height"], image["width"]) for image in annotations["images"]}
    classes = [one["id"] for one in annotations["categories"]]
    for one in annotations["annotations"]:
        for _ in range(draw.choice([0, 1, 1, 1, 2])):
            height, width = sizes[one["image_id"]]
            box = np.array(one["bbox"]) + draw.normal(0, 0.08, 4) * np.tile(one["bbox"][2:], 2)
            box = [*np.clip(box[:2], 0, None), *np.clip(box[2:], 1, None)]
            bits = np.zeros((height, width), np.uint8)
            left, top, right, bottom = (int(x) for x in (box[0], box[1], box[0] + box[2], box[1] + box[3]))
            bits[top:bottom, left:right] = 1
            if "segmentation" in one and draw.random() < 0.7:
                bits &= np.roll(masks.bitmap(one["segmentation"], (height, width)), draw.integers(-3, 4), 1)
            label = one["category_id"] if draw.random() < 0.85 else int(draw.choice(classes))
            score = round(float(draw.random()), int(draw.integers(1, 4)))
            code = masks.code(bits)
            entry = {"image_id": one["image_id"], "category_id": label, "bbox": [float(x) for x in box], "score": score}
            found.append({**entry, "segmentation": code})
    return found


def random_annotated(seed: int) -> Annotated:
    """Images with objects of all sizes, crowds among them; one without any."""
    draw, objects, sizes = np.random.default_rng(seed), [], []
    for index in range(12):
        height, width = (int(x) for x in draw.integers(60, 400, 2))
        count = 0 if index == 3 else int(draw.integers(1, 9))
        first = draw.random((count, 2)) * (width - 20, height - 20)
        sides = draw.choice([8, 30, 150], (count, 1)) * draw.uniform(0.5, 1, (count, 2))
        boxes = np.concatenate([first, first + sides], 1)
        boxes = boxes.clip(0, [width, height] * 2)
        bits = np.zeros((count, height, width), np.uint8)
        for at, (left, top, right, bottom) in enumerate(boxes.astype(int)):
            bits[at, top:bottom, left:right] = draw.random((bottom - top, right - left)) < 0.9
        areas = bits.sum((1, 2)).astype(float)
        codes = [masks.code(one) for one in bits]
        objects.append(Objects(boxes, draw.integers(0, 3, count), draw.random(count) < 0.15, areas, codes))
        sizes.append((height, width))
    return Annotated(Source("x", [], "image", None, 0), objects, ("a", "b", "c"), (1, 5, 9), "test", sizes, range(12))


@pytest.mark.parametrize("seed", range(6))
def test_random_cases_give_what_pycocotools_gives(seed):
    annotated = random_annotated(seed)
    annotations = truth(annotated)
    found = disturbed(annotations, seed)
    ours, theirs = average_precision(annotated, found), pycocotools_figures(annotations, found)
    assert ours.keys() == theirs.keys() == {f"{kind}_{part}" for kind in ("box", "mask") for part in SUMMARY}
    assert ours == pytest.approx(theirs, abs=1e-12)
    assert 0.05 < ours["box_ap"] < 0.95


def test_boxes_only_and_nothing_found():
    annotated = random_annotated(0)
    found = [{k: v for k, v in one.items() if k != "segmentation"} for one in disturbed(truth(annotated), 0)]
    ours = average_precision(annotated, found)
    assert ours == pytest.approx(pycocotools_figures(truth(annotated), found, ["box"]), abs=1e-12)
    assert average_precision(annotated, [])["box_ap"] == 0.0


@pytest.mark.skipif(not (DATA / "coco200").is_dir(), reason="needs ../shared/data/coco200")
def test_real_annotations_give_what_pycocotools_gives_on_their_own_file():
    """Read by pycocotools from the file itself, with its own ids; ours went through our reader and back."""
    _, test = open_annotated(Annotations(path=str(DATA / "coco200")))
    annotations = json.loads((DATA / "coco200" / "instances_val.json").read_text())
    assert len(annotations["categories"]) == len(test.names) and test.ids != tuple(range(len(test.ids)))
    found = disturbed(annotations, 1)
    number = {image["id"]: place for place, image in enumerate(annotations["images"])}
    label = {id_: place for place, id_ in enumerate(test.ids)}
    own = [{**one, "image_id": number[one["image_id"]], "category_id": label[one["category_id"]]} for one in found]
    theirs = pycocotools_figures(annotations, found)
    assert average_precision(test, own) == pytest.approx(theirs, abs=1e-12)
    back = json.loads(json.dumps(as_coco(test, own)))  # as written to detections.json
    assert pycocotools_figures(annotations, back) == theirs
