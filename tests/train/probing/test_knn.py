"""kNN in pieces is kNN."""

import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from common.probing import knn
from common.probing.feature_cache import CachedFeatures
from common.probing.features import RowLayout

LAYOUT = RowLayout((("mean", 2, 6),))


def cached(rows):
    return CachedFeatures(rows, np.zeros((len(rows), 16), np.uint8), torch.zeros(len(rows)), LAYOUT)


def brute_force(bank, labels, query, k, temperature):
    """One query: sort all similarities, let the first k vote."""
    similarity = [
        float(np.dot(row, query) / math.sqrt(np.dot(row, row)) / math.sqrt(np.dot(query, query))) for row in bank
    ]
    nearest = sorted(range(len(bank)), key=lambda i: -similarity[i])[:k]
    votes = defaultdict(float)
    for i in nearest:
        votes[labels[i]] += math.exp(similarity[i] / temperature)
    return max(votes, key=votes.get)


@pytest.mark.parametrize("chunk", [3, 7, 1000])
def test_neighbours_vote_as_by_brute_force(chunk, monkeypatch):
    monkeypatch.setattr(knn, "BANK", chunk)
    draw = np.random.default_rng(0)
    bank = draw.normal(size=(60, 12)).astype(np.float32)
    queries = draw.normal(size=(25, 12)).astype(np.float32)
    labels, learnt = draw.integers(0, 4, 60), np.sort(draw.permutation(60)[:50])
    for view, columns in (("mean", slice(6, 12)), ("mean2", slice(0, 12))):
        asked = torch.from_numpy(queries[:, columns])
        similarity, places = knn.nearest(cached(bank), learnt, asked, 9, view)
        for k in (1, 5, 9):
            for temperature in (0.07, 1.0):
                said = knn.vote(similarity, torch.from_numpy(labels[learnt[places]]), k, temperature, 4)
                for query, answer in zip(queries, said.tolist(), strict=True):
                    expected = brute_force(bank[learnt][:, columns], labels[learnt], query[columns], k, temperature)
                    assert answer == expected


def test_a_low_temperature_does_not_overflow():
    similarity = torch.tensor([[0.99, 0.5, 0.4]])
    assert knn.vote(similarity, torch.tensor([[2, 1, 1]]), 3, 0.005, 3).tolist() == [2]


def test_memory_holds_a_part_of_the_similarities_only(monkeypatch):
    monkeypatch.setattr(knn, "BANK", 16)
    largest, topk = [0], torch.Tensor.topk

    def watched(self, *args, **kwargs):
        largest[0] = max(largest[0], self.shape[1])
        return topk(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "topk", watched)
    bank = np.random.default_rng(0).normal(size=(640, 12)).astype(np.float16)
    knn.nearest(cached(bank), np.arange(640), torch.randn(4, 6), 5, "mean")
    assert 5 < largest[0] <= 16
