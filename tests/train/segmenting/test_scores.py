"""Mean IoU equals brute force and scikit-learn's; ignored pixels and absent classes count nowhere."""

import pytest
import torch
from common.segmenting.classes import IGNORED
from common.segmenting.scores import Scores, confusion, tally
from sklearn.metrics import accuracy_score, confusion_matrix, jaccard_score


def cases():
    """Truths and predictions (n, H, W) of K classes, some absent from both, some from one of them."""
    generator = torch.Generator().manual_seed(0)
    for classes in (2, 5, 40):
        truth = torch.randint(0, max(2, classes - 2), (4, 6, 9), generator=generator)
        predicted = torch.randint(0, classes, (4, 6, 9), generator=generator).clamp(max=max(1, classes - 2))
        wrong = torch.rand(4, 6, 9, generator=generator) < 0.4
        predicted = torch.where(wrong, predicted, truth)
        truth[torch.rand(4, 6, 9, generator=generator) < 0.2] = IGNORED
        yield classes, truth.short(), predicted


def scores_of(truth, predicted, classes):
    return Scores(torch.stack([tally(confusion(a, b, classes)) for a, b in zip(truth, predicted, strict=True)]))


@pytest.mark.parametrize(("classes", "truth", "predicted"), [*cases()])
def test_the_matrix_and_the_mean_iou_are_those_of_brute_force_and_of_scikit_learn(classes, truth, predicted):
    counted = truth != IGNORED
    a, b = truth[counted].tolist(), predicted[counted].tolist()
    assert confusion(truth, predicted, classes).tolist() == confusion_matrix(a, b, labels=range(classes)).tolist()
    brute = []
    for k in range(classes):
        both = sum(x == k and y == k for x, y in zip(a, b, strict=True))
        either = sum(x == k or y == k for x, y in zip(a, b, strict=True))
        if either:
            brute.append(both / either)
    scores = scores_of(truth, predicted, classes)
    assert scores.mean_iou == pytest.approx(100 * sum(brute) / len(brute), abs=1e-9)
    present = sorted({*a, *b})
    assert scores.iou[present].tolist() == pytest.approx(
        (100 * jaccard_score(a, b, labels=present, average=None)).tolist()
    )
    assert scores.accuracy == pytest.approx(100 * accuracy_score(a, b))


def test_a_class_that_is_neither_there_nor_predicted_is_left_out_of_the_mean():
    truth = torch.tensor([[[0, 0, 1, IGNORED]]])
    scores = scores_of(truth, torch.tensor([[[0, 1, 1, 3]]]), 5)
    assert scores.iou.isnan().tolist() == [False, False, True, True, True]
    assert scores.mean_iou == pytest.approx(50)
    wrongly = scores_of(torch.tensor([[[0, 0, 1, 1]]]), torch.tensor([[[0, 1, 1, 3]]]), 5)
    assert wrongly.iou[3] == 0 and wrongly.mean_iou == pytest.approx(100 * (1 / 2 + 1 / 3 + 0) / 3)


def test_the_interval_is_that_of_resampled_images():
    (_, truth, predicted), *_ = cases()
    scores = scores_of(truth.repeat(5, 1, 1), predicted.repeat(5, 1, 1), 2)
    generator = torch.Generator().manual_seed(1)
    means = []
    for _ in range(1000):
        drawn = torch.randint(20, (20,), generator=generator)
        means.append(Scores(scores.tallies[drawn]).mean_iou)
    low, high = torch.tensor(means).quantile(torch.tensor([0.025, 0.975])).tolist()
    assert scores.interval() == pytest.approx([low, high], abs=0.8)
    assert low < scores.mean_iou < high
