"""Maps of all images against their truth → one record for each map: its figures, and those of its predictions.

Figures are in per cent, but for MAE and correlations. A random mask beside a prediction has its area in every image.
"""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator

from timm_dseq.engine.regions import rank_regions

from ..run.results import interval
from .boxes import best_overlap
from .maps import CONSTANT, RECTANGLES, Maps, brightness
from .measures import LEVELS, at_size, binary_figures, f_curves, patch_counts, scene_figures
from .predictions import OTSU, RANK_1, REGIONS, binary, elsewhere, in_pixels, largest_box, random_order
from .truth import Truth

WHOLE = "whole image"
WAYS = (OTSU, RANK_1, REGIONS)
SHOWN = 8  # of the best images, and of the worst, whose places are in a record
FOUND = 0.5  # IoU above which a box is found


class Judging:
    """The figures of every image, by its place among all; each process fills in those of its own images."""

    def __init__(
        self, maps: Sequence[str], count: int, num_regions: int, min_area: float, draws: int, scenes: bool = False
    ) -> None:
        """scenes: whether masks number several objects, so that regions are compared with each of them."""
        self.maps, self.count, self.draws, self.scenes = [*maps], count, draws, scenes
        self.num_regions, self.min_area = num_regions, min_area
        self.predictions = [(name, way) for name in maps for way in WAYS] + [(CONSTANT, WHOLE)]
        self.figures: dict[str, torch.Tensor] = {}  # of a map (count, maps), of a prediction (count, predictions)
        self.curves = torch.zeros(len(self.maps), LEVELS, dtype=torch.float64)  # F at each level, summed over images

    def add(
        self, places: Sequence[int], maps: Maps, images: torch.Tensor, truths: Sequence[Truth], seeds: torch.Tensor
    ) -> None:
        """A batch: maps (B, h, w), images (B, 3, H, W) in [0, 1], a seed for each image's random masks (B,)."""
        stacked = torch.stack([maps[name] for name in self.maps], dim=1)  # (B, M, h, w)
        b, m, *grid = stacked.shape
        regions = rank_regions(stacked.flatten(0, 1), self.num_regions, self.min_area)
        ways = binary(stacked.flatten(0, 1), regions)
        predicted = torch.stack([ways[way] for way in WAYS], dim=1).view(b, -1, grid[0] * grid[1])
        predicted = torch.cat([predicted, torch.ones_like(predicted[:, :1])], dim=1)  # (B, P, n)
        orders = random_order(seeds, self.draws, predicted.shape[2])
        boxes = largest_box(predicted.view(-1, *grid)).view(b, -1, 4) if truths[0].boxes is not None else None
        masks = regions.masks.view(b, m, -1, predicted.shape[2])  # (B, M, N, n)
        order = torch.arange(predicted.shape[2], dtype=torch.float32).view(1, *grid)  # any map that is not constant
        rectangles = rank_regions(order, self.num_regions, regions="uniform").masks.flatten(2)
        masks = torch.cat([masks, rectangles.expand(b, 1, -1, -1)], dim=1)
        self._put("regions", places, regions.count.view(b, m))
        self._put("brightness", places, torch.stack([brightness(images, maps[name]) for name in self.maps], dim=1))
        for i, (place, truth) in enumerate(zip(places, truths, strict=True)):
            if boxes is not None:
                figures = self._boxed(boxes[i], truth, grid, seeds[i])
            else:
                figures = self._masked(stacked[i], predicted[i], masks[i], orders[i], truth)
            for name, values in figures.items():
                self._put(name, [place], values[None])

    def _masked(self, maps, predicted, regions, orders, truth: Truth) -> dict[str, torch.Tensor]:
        """Figures of one image: maps (M, h, w), predictions (P, n), regions (M + 1, N, n), random orders (draws, n)."""
        grid, labels = maps.shape[1:], torch.from_numpy(truth.labels)
        counts = patch_counts(labels, grid, max(2, int(labels.max()) + 1))
        either = torch.stack([counts[:, 0], counts[:, 1:].sum(1)], dim=1)  # ground or object
        figures = binary_figures(predicted, either)
        random = orders < predicted.sum(1)[:, None, None]  # (P, draws, n)
        figures["random_iou"] = binary_figures(random, either)["iou"].mean(1)

        known = labels >= 0
        full, objects = at_size(maps, labels.shape)[:, known], labels[known] > 0
        self.curves += f_curves(full, objects)
        figures["mae"] = (full - objects.float()).abs().mean(1)
        if self.scenes:
            figures |= scene_figures(regions, counts)
            shuffled = regions.gather(2, orders[0].expand_as(regions))
            figures["random_purity"] = scene_figures(shuffled, counts)["purity"]
        return figures

    def _boxed(self, boxes, truth: Truth, grid, seed) -> dict[str, torch.Tensor]:
        """Figures of one image: the largest box (P, 4) of each prediction, in patches."""
        own = in_pixels(boxes, grid, truth.size)
        others = elsewhere(own, seed.expand(len(own)), self.draws, truth.size)
        real = torch.from_numpy(truth.boxes)
        found = best_overlap(others, real) > FOUND
        return {"overlap": best_overlap(own, real), "random_found": found.float().mean(1)}

    def _put(self, name: str, places: Sequence[int], values: torch.Tensor) -> None:
        if name not in self.figures:
            self.figures[name] = torch.zeros(self.count, values.shape[1], dtype=torch.float64)
        self.figures[name][list(places)] = values.double().cpu()

    def gather(self, accelerator: Accelerator) -> None:
        """Add up what all processes have filled in; every one of them has judged at least one image."""
        if accelerator.num_processes > 1:
            for name in sorted(self.figures):
                self.figures[name] = accelerator.reduce(self.figures[name].to(accelerator.device), "sum").cpu()
            self.curves = accelerator.reduce(self.curves.to(accelerator.device), "sum").cpu()

    def records(self) -> list[dict[str, Any]]:
        """One for each map, one for the whole image as a prediction, and of scenes one for rectangles as regions."""
        found = [self._record(name) for name in (*self.maps, CONSTANT)]
        if self.scenes:
            found.append(
                {"map": RECTANGLES, "regions": self.num_regions - 1, "scene": self._scene(-1), "predictions": {}}
            )
        return found

    def _record(self, name: str) -> dict[str, Any]:
        ways = {way: self._prediction(at) for at, (map_, way) in enumerate(self.predictions) if map_ == name}
        if name == CONSTANT:
            return {"map": name, **({"max_f": ways[WHOLE]["f"]} if "f" in ways[WHOLE] else {}), "predictions": ways}
        at = self.maps.index(name)
        record: dict[str, Any] = {"map": name, "brightness": self._mean("brightness", at, 1)}
        record["regions"] = self._mean("regions", at, 1)
        if "mae" in self.figures:
            record |= {"max_f": 100 * float(self.curves[at].max()) / self.count, "mae": self._mean("mae", at, 1)}
        if self.scenes:
            record["scene"] = self._scene(at)
            score = self.figures["ari"][:, at]
        else:
            score = self.figures["iou" if "iou" in self.figures else "overlap"]
            score = score[:, self.predictions.index((name, REGIONS))]
        ranked = score.argsort(descending=True, stable=True).tolist()
        shown = {"best": ranked[:SHOWN], "worst": ranked[: -SHOWN - 1 : -1]}  # places
        return {**record, "predictions": ways, **shown}

    def _scene(self, at: int) -> dict[str, Any]:
        figures = {key: self._mean(key, at) for key in ("fg_ari", "ari", "purity", "random_purity")}
        return {**figures, "fg_ari_interval": self._interval(self.figures["fg_ari"][:, at])}

    def _prediction(self, at: int) -> dict[str, Any]:
        if "overlap" in self.figures:
            found = (self.figures["overlap"][:, at] > FOUND).double()
            figures = {"corloc": 100 * found.mean().item(), "corloc_interval": self._interval(found)}
            return {**figures, "random_corloc": self._mean("random_found", at)}
        figures = {key: self._mean(key, at) for key in ("f", "iou", "accuracy", "random_iou")}
        return {**figures, "iou_interval": self._interval(self.figures["iou"][:, at])}

    def _mean(self, name: str, at: int, scale: float = 100) -> float:
        return scale * self.figures[name][:, at].mean().item()

    @staticmethod
    def _interval(values: torch.Tensor) -> list[float]:
        return [100 * bound for bound in interval(values)]
