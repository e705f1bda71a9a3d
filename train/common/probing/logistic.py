"""The protocol logistic: C is chosen on a tenth of the training images, then logistic regression is fitted to all."""

import numpy as np
import torch

from ..classifiers import Regression
from ..labels.subsets import holdout_mask
from .probe_run import ProbeResult, ProbeRun

CS = [float(c) for c in np.logspace(-6, 5, 45)]
HELD_OUT = 0.1


def logistic(probe: ProbeRun) -> list[ProbeResult]:
    """A result for each view."""
    results = []
    for view in probe.views("mean", "class"):
        by_seed = [fit_and_test(probe, view, seed) for seed in probe.config.seeds]
        settings = {"C": [c for _, c in by_seed], "selected on": f"{HELD_OUT:.0%} of train"}
        results.append(ProbeResult(view, [correct for correct, _ in by_seed], settings))
    return results


def fit_and_test(probe: ProbeRun, view: str, seed: int) -> tuple[torch.Tensor, float]:
    """Choose C on images held out, fit to all: which test images are classified correctly (n,) bool, and C."""
    device, classes = probe.accelerator.device, len(probe.data.names)
    train, test, rows = probe.train_features(), probe.test_features(), probe.train_rows(seed)
    x, labels = train.view(rows, view, device), train.labels[rows]
    aside = holdout_mask(labels, HELD_OUT, seed).to(device)
    labels = labels.to(device)
    fit = Regression(x[~aside], labels[~aside], classes, probe.accelerator)
    screen, scores = probe.screen(len(CS), "C"), []
    for number, c in enumerate(CS, 1):
        fit.fit(c)
        scores.append((fit.predict(x[aside]) == labels[aside]).float().mean().item())
        screen.show(number, f"logistic regression, {view}, seed {seed}: C {c:.1e}, held out {scores[-1]:.1%}")
    screen.close()
    best = CS[int(np.argmax(scores))]
    final = Regression(x, labels, classes, probe.accelerator)
    final.fit(best)
    tested = test.view(np.arange(len(test.rows)), view, device)
    return (final.predict(tested) == test.labels.to(device)).cpu(), best
