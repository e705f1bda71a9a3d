"""One run of probe.py: its settings, backbone and data, and what every protocol may ask for."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from timm_dseq import UserError

from ..data.digests import digests_of, duplicates
from ..labels.labelled import Labelled
from ..labels.subsets import select_rows
from ..system.screen import Screen
from .feature_cache import CachedFeatures, cached_features
from .features import FrozenBackbone, RowLayout
from .settings import ON_FEATURES, Probe


@dataclass(frozen=True)
class ProbeResult:
    """One number of a probe: which test images were answered correctly, for each seed, from which features."""

    view: str  # the features that were read
    correct: list[torch.Tensor]  # for each seed (n,) bool, in the order of the test split
    settings: dict[str, Any]  # those of a grid or sweep that it belongs to


@dataclass
class ProbeRun:
    """What every protocol is given."""

    config: Probe
    data: Labelled  # both splits, without the subset
    subsets: dict[int, torch.Tensor | None]  # seed → rows of the training split, None for all
    backbone: FrozenBackbone
    layout: RowLayout  # of its features
    preprocessing: dict[str, Any]  # timm's words: input_size, mean, std, crop_pct, …
    function: str  # digest of the backbone: of its weights, and of what it does with them
    accelerator: Accelerator
    closer: bool = False  # whether features are the mean of the image's and of its salient crop's
    _features: dict[tuple[str, bool], CachedFeatures] = field(default_factory=dict)

    def train_rows(self, seed: int) -> np.ndarray:
        """The rows of the training split that this seed trains on, ascending."""
        rows = self.subsets[seed]
        return np.arange(len(self.data.train)) if rows is None else rows.numpy()

    def subset_seeds(self) -> list[int]:
        """The seeds that differ where nothing but the subset is random: one if there is no subset."""
        return self.config.seeds if self.config.data.subset else self.config.seeds[:1]

    def train_features(self) -> CachedFeatures:
        """Of the training images that any seed takes; computed where they are not in the cache."""
        wanted = None
        if self.config.data.subset:
            wanted = torch.cat([self.subsets[seed] for seed in self.config.seeds]).unique()
        return self._cached("train", wanted)

    def test_features(self) -> CachedFeatures:
        """Of all test images; computed where they are not in the cache."""
        return self._cached("test", None)

    def views(self, *default: str) -> list[str]:
        """The views of the settings; else those of these, the protocol's, that the backbone has."""
        return self.config.views or self.layout.available(*default) or self.layout.available("mean", "mean4")

    def check_views(self) -> None:
        """One line for a view that the backbone does not have."""
        available = self.layout.available(*self.config.views)
        if absent := [view for view in self.config.views if view not in available]:
            parts = ", ".join(name for name, *_ in self.layout.parts)
            raise UserError(f"views: {self.config.model} has no {absent[0]!r}, it has {parts}.")

    def screen(self, total: int, unit: str) -> Screen:
        """A progress bar of the main process."""
        return Screen(total, 0, self.accelerator.is_main_process, unit=unit)

    def count_duplicates(self) -> dict[str, int]:
        """Test images that any seed also trains on, pixel for pixel, and images that are twice in the test split."""
        used = np.unique(np.concatenate([self.train_rows(seed) for seed in self.config.seeds]))
        if self.config.protocol in ON_FEATURES:
            train, test = self.train_features().digests[used], self.test_features().digests
        else:
            train, test = (
                digests_of(source, self.config.workers, self.config.cache.folder, self.accelerator)
                for source in (select_rows(self.data.train, torch.from_numpy(used)), self.data.test)
            )
        return {"train_test": duplicates(train, test), "test_test": len(test) - len(np.unique(test, axis=0))}

    def _cached(self, split: str, wanted: torch.Tensor | None) -> CachedFeatures:
        if (split, False) not in self._features:
            self._features[split, False] = self._computed(split, wanted, None)
        if self.closer and (split, True) not in self._features:
            crops = self._computed(split, wanted, self.config.salient_crop)
            self._features[split, True] = replace(self._features[split, False], crops=crops.rows)
        return self._features[split, self.closer]

    def _computed(self, split: str, wanted: torch.Tensor | None, salient_crop: str | None) -> CachedFeatures:
        return cached_features(
            getattr(self.data, split),
            wanted,
            self.backbone,
            self.preprocessing,
            self.config.cache,
            self.function,
            self.accelerator,
            self.config.workers,
            salient_crop,
        )
