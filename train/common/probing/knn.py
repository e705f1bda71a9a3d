"""k nearest neighbours by cosine, votes weighted by exp(similarity / T): a part of the similarities at a time."""

import numpy as np
import torch
from torch.nn import functional as F

from timm_dseq import UserError

from ..classifiers import vote
from ..run.results import Measured
from .extract import read
from .features import Layout
from .task import Task

QUERIES, BANK = 1024, 16384  # rows whose similarities are in memory together


def nearest(
    bank: np.ndarray, learnt: np.ndarray, queries: torch.Tensor, k: int, layout: Layout, view: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k most similar of the bank's rows `learnt` to each query (q, D): similarity and place in `learnt`, (q, k)."""
    queries = F.normalize(queries, dim=1)
    best = torch.full((len(queries), 0), -2.0, device=queries.device)
    which = torch.zeros(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(learnt), BANK):
        rows = read(bank, learnt[start : start + BANK], layout, view, queries.device)
        similarity = queries @ F.normalize(rows, dim=1).T
        values, places = similarity.topk(min(k, len(rows)), dim=1)
        best, which = torch.cat([best, values], dim=1), torch.cat([which, places + start], dim=1)
        best, kept = best.topk(min(k, best.shape[1]), dim=1)
        which = which.gather(1, kept)
    return best, which


def knn(task: Task) -> list[Measured]:
    """Every view, k and T."""
    settings, device = task.config.knn, task.accelerator.device
    k = max(settings.k)
    for seed in task.config.seeds:
        if len(task.learnt(seed)) < k:
            raise UserError(f"knn.k={k}: there are {len(task.learnt(seed))} training images only, take fewer.")
    train, test = task.train_features(), task.test_features()
    found = []
    for view in task.views("mean", "class"):
        right = {(k, t): [] for k in settings.k for t in settings.temperature}
        for seed in task.drawn_seeds():
            learnt = task.learnt(seed)
            answers = {choice: torch.zeros(len(test.rows), device=device) for choice in right}
            mine = np.arange(task.accelerator.process_index, len(test.rows), task.accelerator.num_processes)
            screen = task.screen(len(mine), "image")
            for start in range(0, len(mine), QUERIES):
                part = mine[start : start + QUERIES]
                queries = read(test.rows, part, test.layout, view, device)
                similarity, places = nearest(train.rows, learnt, queries, k, train.layout, view)
                labels = train.labels[learnt[places.cpu()]].to(device)
                truth = test.labels[part].to(device)
                for choice in answers:
                    said = vote(similarity, labels, *choice, len(task.data.names))
                    answers[choice][part] = (said == truth).float()
                screen.show(start + len(part), f"kNN, {view}")
            screen.close()
            for choice, each in answers.items():
                right[choice].append(task.accelerator.reduce(each, "sum").cpu() > 0)
        found += [Measured(view, each, {"k": k, "T": t}) for (k, t), each in right.items()]
    return found
