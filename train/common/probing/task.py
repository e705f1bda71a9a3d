"""What every protocol is given: the backbone, the data, the rows of each seed, and features when it asks for them."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from timm_dseq import UserError

from ..data.digests import digests_of, duplicates
from ..labels.labelled import Labelled
from ..labels.subsets import select_rows
from ..system.screen import Screen
from .extract import Extracted, extract
from .features import Frozen, Layout
from .settings import ON_FEATURES, Probe


@dataclass
class Task:
    """One command."""

    config: Probe
    data: Labelled  # whole splits
    rows: dict[int, torch.Tensor | None]  # seed → rows of the training split, None for all
    frozen: Frozen
    layout: Layout  # of its features
    preprocessing: dict[str, Any]
    weights: str  # their digest
    accelerator: Accelerator
    features: dict[str, Extracted] = field(default_factory=dict)

    def learnt(self, seed: int) -> np.ndarray:
        """The rows of the training split that this seed learns from."""
        rows = self.rows[seed]
        return np.arange(len(self.data.train)) if rows is None else rows.numpy()

    def drawn_seeds(self) -> list[int]:
        """The seeds where only the subset is drawn: one, if there is none."""
        return self.config.seeds if self.config.data.subset else self.config.seeds[:1]

    def train_features(self) -> Extracted:
        wanted = None
        if self.config.data.subset:
            wanted = torch.cat([self.rows[seed] for seed in self.config.seeds]).unique()
        return self._features("train", wanted)

    def test_features(self) -> Extracted:
        return self._features("test", None)

    def views(self, *default: str) -> list[str]:
        """The views that are asked for, or those of the protocol that the backbone has."""
        return self.config.views or self.layout.views(*default) or self.layout.views("mean", "mean4")

    def check_views(self) -> None:
        found = self.layout.views(*self.config.views)
        if absent := [view for view in self.config.views if view not in found]:
            parts = ", ".join(name for name, *_ in self.layout.parts)
            raise UserError(f"views: {self.config.model} has no {absent[0]!r}, it has {parts}.")

    def screen(self, total: int, unit: str) -> Screen:
        return Screen(total, 0, self.accelerator.is_main_process, unit=unit)

    def duplicates(self) -> dict[str, int]:
        """Tested images that are also learnt from (by any seed), and images that are twice in the test split."""
        used = np.unique(np.concatenate([self.learnt(seed) for seed in self.config.seeds]))
        if self.config.protocol in ON_FEATURES:
            learnt, tested = self.train_features().digests[used], self.test_features().digests
        else:
            learnt, tested = (
                digests_of(source, self.config.workers, self.config.cache.folder, self.accelerator)
                for source in (select_rows(self.data.train, torch.from_numpy(used)), self.data.test)
            )
        return {"train_test": duplicates(learnt, tested), "test_test": len(tested) - len(np.unique(tested, axis=0))}

    def _features(self, side: str, wanted: torch.Tensor | None) -> Extracted:
        if side not in self.features:
            source = getattr(self.data, side)
            config = self.config
            self.features[side] = extract(
                source,
                wanted,
                self.frozen,
                self.preprocessing,
                config.cache,
                self.weights,
                self.accelerator,
                config.workers,
            )
        return self.features[side]
