"""Average precision of boxes and masks as COCO defines it, of a detector on annotated images.

Each process predicts its share of the images; one of them compares all predictions with the truth.
"""

import contextlib
import io
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from faster_coco_eval import COCO, COCOeval_faster
from torch import nn
from torch.utils.data import Dataset, Subset

from ..data.unreadable import batches_of_all
from ..system.screen import Screen
from . import masks
from .annotated import Annotated

# COCO's names of what the evaluator gives, in its order, for boxes and for masks.
SUMMARY = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar100")
KINDS = {"box": "bbox", "mask": "segm"}  # our name → COCO's

Detection = dict[str, Any]  # image_id, category_id (an index of names), bbox (x, y, w, h), score, segmentation


class WholeImages(Dataset):
    """`images[index]`: the index and the pixels (3, H, W) uint8."""

    def __init__(self, annotated: Annotated) -> None:
        self.annotated = annotated

    def __len__(self) -> int:
        return len(self.annotated)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        pixels = np.array(self.annotated.picture(index))
        return index, torch.from_numpy(pixels).permute(2, 0, 1)


def evaluate(
    model: nn.Module, annotated: Annotated, accelerator: Accelerator, workers: int
) -> tuple[dict[str, float], list[Detection]]:
    """Box and mask AP, each from 0 to 1, and all detections. All processes have to call it."""
    found = gather_object(predictions(model, annotated, accelerator, workers))
    figures = [average_precision(annotated, found) if accelerator.is_main_process else None]
    broadcast_object_list(figures)
    return figures[0], found


@torch.inference_mode()
def predictions(model: nn.Module, annotated: Annotated, accelerator: Accelerator, workers: int) -> list[Detection]:
    """This process's share of all detections."""
    model.eval()
    found, device = [], accelerator.device
    share = range(accelerator.process_index, len(annotated), accelerator.num_processes)
    screen = Screen(len(share), 0, accelerator.is_main_process, unit="image")
    images = Subset(WholeImages(annotated), share)
    for done, (index, pixels) in enumerate(batches_of_all(images, _only, batch_size=1, num_workers=workers), 1):
        with accelerator.autocast():
            (output,) = model([pixels.to(device, non_blocking=True)])
        found += detections(index, output)
        screen.show(done, "evaluating")
    screen.close()
    return found


def _only(items: list) -> Any:
    return items[0]


def detections(image: int, output: dict[str, torch.Tensor]) -> list[Detection]:
    """A detector's output for one image, as COCO writes it."""
    boxes = output["boxes"].float().cpu().numpy()
    boxes[:, 2:] -= boxes[:, :2]
    found = [
        {"image_id": image, "category_id": label - 1, "bbox": box, "score": score}
        for box, label, score in zip(
            boxes.tolist(), output["labels"].tolist(), output["scores"].float().tolist(), strict=True
        )
    ]
    if "masks" in output:
        for one, mask in zip(found, (output["masks"][:, 0] > 0.5).cpu().numpy(), strict=True):
            one["segmentation"] = masks.code(mask)
    return found


def as_coco(annotated: Annotated, found: list[Detection]) -> list[dict[str, Any]]:
    """Detections with the ids of the file that the annotations come from, as COCO's tools and servers take them."""
    return [
        {
            **one,
            "image_id": annotated.keys[one["image_id"]],
            "category_id": annotated.ids[one["category_id"]],
            **({"segmentation": _text(one["segmentation"])} if "segmentation" in one else {}),
        }
        for one in found
    ]


def _text(code: dict[str, Any]) -> dict[str, Any]:
    return {"size": list(map(int, code["size"])), "counts": code["counts"].decode()}


def truth(annotated: Annotated) -> dict[str, list[dict[str, Any]]]:
    """The annotations in COCO's format, images by their number and classes by their index."""
    images, annotations = [], []
    for index, objects in enumerate(annotated.objects):
        height, width = annotated.sizes[index] or (1, 1)  # which matters for masks alone
        images.append({"id": index, "height": height, "width": width})
        boxes = np.concatenate([objects.boxes[:, :2], objects.boxes[:, 2:] - objects.boxes[:, :2]], axis=1)
        for at, box in enumerate(boxes.tolist()):
            annotations.append(
                {
                    "id": len(annotations) + 1,  # 0 would count as not matched
                    "image_id": index,
                    "category_id": int(objects.labels[at]),
                    "bbox": box,
                    "area": float(objects.areas[at]),
                    "iscrowd": int(objects.crowd[at]),
                    **({"segmentation": objects.masks[at]} if annotated.has_masks else {}),
                }
            )
    categories = [{"id": number, "name": name} for number, name in enumerate(annotated.names)]
    return {"images": images, "annotations": annotations, "categories": categories}


def average_precision(annotated: Annotated, found: list[Detection]) -> dict[str, float]:
    """box_ap, box_ap50, …, and mask_ap, … where both sides have masks; -1 where there is nothing of a size."""
    figures = {}
    with_masks = annotated.has_masks and all("segmentation" in one for one in found)
    kinds = ["box", "mask"] if with_masks else ["box"]
    if not found:
        return {f"{kind}_{part}": 0.0 for kind in kinds for part in SUMMARY}
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO(truth(annotated))
        for kind in kinds:
            own = reference.loadRes([dict(one) for one in found])  # it adds to what it is given
            evaluator = COCOeval_faster(reference, own, KINDS[kind], print_function=print)
            evaluator.evaluate()
            evaluator.accumulate()
            evaluator.summarize()
            figures |= {f"{kind}_{part}": float(x) for part, x in zip(SUMMARY, evaluator.stats, strict=False)}
    return figures
