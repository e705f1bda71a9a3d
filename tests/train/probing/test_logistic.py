"""Logistic regression finds the minimum that scikit-learn and scipy find, and chooses C without the test images."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from common import classifiers
from common.probing import logistic
from scipy.optimize import minimize
from scipy.special import logsumexp

CLASSES = 4


@pytest.fixture(scope="module")
def data():
    draw = np.random.default_rng(0)
    centres = draw.normal(size=(CLASSES, 10))
    labels = draw.integers(0, CLASSES, 500)
    x = (centres[labels] * 0.7 + draw.normal(size=(500, 10)) + 3).astype(np.float32)
    return x[:300], labels[:300], x[300:], labels[300:]


def by_scipy(x, labels, c):
    """C × sum of cross-entropies + |W|² / 2 in float64."""
    x = np.hstack([x.astype(np.float64), np.ones((len(x), 1))])

    def loss(flat):
        weights = flat.reshape(CLASSES, -1)
        logits = x @ weights.T
        logs = logits - logsumexp(logits, axis=1, keepdims=True)
        gradient = np.exp(logs)
        gradient[np.arange(len(x)), labels] -= 1
        gradient = c * gradient.T @ x
        gradient[:, :-1] += weights[:, :-1]
        return -c * logs[np.arange(len(x)), labels].sum() + (weights[:, :-1] ** 2).sum() / 2, gradient.ravel()

    start = np.zeros(CLASSES * x.shape[1])
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 20000, "ftol": 1e-14, "gtol": 1e-9})
    return found.x.reshape(CLASSES, -1)


@pytest.mark.parametrize("c", [1e-3, 0.1, 10.0])
def test_the_minimum_is_scipys(data, c):
    x, labels, *_ = data
    expected = by_scipy(x, labels, c)
    fit = logistic.Regression(torch.from_numpy(x).double(), torch.from_numpy(labels), CLASSES, Accelerator())
    fit.fit(c)
    np.testing.assert_allclose(fit.weights[:, :-1].numpy(), expected[:, :-1], atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("c", [1e-4, 1e-2, 1.0, 100.0])
def test_accuracy_is_scikit_learns(data, c):
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, labels, tested, truth = data
    theirs = linear_model.LogisticRegression(C=c, max_iter=10000, tol=1e-8).fit(x, labels)
    fit = logistic.Regression(torch.from_numpy(x), torch.from_numpy(labels), CLASSES, Accelerator())
    fit.fit(c)
    ours = fit.predict(torch.from_numpy(tested)).numpy()
    assert (ours == truth).mean() == theirs.score(tested, truth)


def test_rows_in_pieces_change_nothing(data, monkeypatch):
    x, labels, *_ = (torch.from_numpy(part) for part in data)
    whole, pieces = (logistic.Regression(x.double(), labels, CLASSES, Accelerator()) for _ in range(2))
    whole.fit(1.0)
    monkeypatch.setattr(classifiers, "_ROWS", 37)
    pieces.fit(1.0)
    torch.testing.assert_close(whole.weights, pieces.weights, rtol=1e-5, atol=1e-6)


def test_forty_five_values_of_c():
    assert len(logistic.CS) == 45
    assert (logistic.CS[0], logistic.CS[-1]) == (pytest.approx(1e-6), pytest.approx(1e5))
    steps = np.diff(np.log10(logistic.CS))
    assert np.allclose(steps, steps[0])
