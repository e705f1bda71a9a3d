"""The protocol knn: k nearest neighbours by cosine similarity, votes weighted by exp(similarity / T).

Only a part of the similarities is in memory at a time, however many images there are.
"""

import numpy as np
import torch
from torch.nn import functional as F

from timm_dseq import UserError

from ..classifiers import vote
from .feature_cache import CachedFeatures
from .probe_run import ProbeResult, ProbeRun

QUERIES, BANK = 1024, 16384  # rows whose similarities are in memory together


def nearest(
    train: CachedFeatures, rows: np.ndarray, queries: torch.Tensor, k: int, view: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k training images most similar to each query (q, D): similarities and places in `rows`, both (q, k)."""
    queries = F.normalize(queries, dim=1)
    best = torch.full((len(queries), 0), -2.0, device=queries.device)
    which = torch.zeros(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(rows), BANK):
        bank = train.view(rows[start : start + BANK], view, queries.device)
        similarity = queries @ F.normalize(bank, dim=1).T
        values, places = similarity.topk(min(k, len(bank)), dim=1)
        best, which = torch.cat([best, values], dim=1), torch.cat([which, places + start], dim=1)
        best, kept = best.topk(min(k, best.shape[1]), dim=1)
        which = which.gather(1, kept)
    return best, which


def knn(probe: ProbeRun) -> list[ProbeResult]:
    """A result for every view, k and T."""
    settings = probe.config.knn
    for seed in probe.config.seeds:
        if (images := len(probe.train_rows(seed))) < max(settings.k):
            raise UserError(f"knn.k={max(settings.k)}: there are {images} training images only, take fewer.")
    results = []
    for view in probe.views("mean", "class"):
        by_seed = [correct_answers(probe, view, seed) for seed in probe.subset_seeds()]
        results += [
            ProbeResult(view, [correct[k, t] for correct in by_seed], {"k": k, "T": t})
            for k in settings.k
            for t in settings.temperature
        ]
    return results


def correct_answers(probe: ProbeRun, view: str, seed: int) -> dict[tuple[int, float], torch.Tensor]:
    """For every (k, T), which test images are classified correctly: (n,) bool. Each process classifies its share."""
    settings, accelerator = probe.config.knn, probe.accelerator
    train, test, rows = probe.train_features(), probe.test_features(), probe.train_rows(seed)
    count = len(test.rows)
    choices = [(k, t) for k in settings.k for t in settings.temperature]
    correct = {choice: torch.zeros(count, device=accelerator.device) for choice in choices}
    mine = np.arange(accelerator.process_index, count, accelerator.num_processes)
    screen = probe.screen(len(mine), "image")
    for start in range(0, len(mine), QUERIES):
        part = mine[start : start + QUERIES]
        queries = test.view(part, view, accelerator.device)
        similarity, places = nearest(train, rows, queries, max(settings.k), view)
        labels = train.labels[rows[places.cpu()]].to(accelerator.device)
        truth = test.labels[part].to(accelerator.device)
        for choice in choices:
            correct[choice][part] = (vote(similarity, labels, *choice, len(probe.data.names)) == truth).float()
        screen.show(start + len(part), f"kNN, {view}")
    screen.close()
    return {choice: accelerator.reduce(each, "sum").cpu() > 0 for choice, each in correct.items()}
