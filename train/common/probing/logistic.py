"""Logistic regression, whose C is chosen on images held out."""

import numpy as np

from ..classifiers import Regression
from ..labels.subsets import holdout_mask
from ..run.results import Measured
from .extract import read
from .task import Task

CS = [float(c) for c in np.logspace(-6, 5, 45)]
HELD_OUT = 0.1


def logistic(task: Task) -> list[Measured]:
    """For each view: C by the images held out, then a fit to all of them."""
    train, test = task.train_features(), task.test_features()
    device, classes = task.accelerator.device, len(task.data.names)
    found = []
    for view in task.views("mean", "class"):
        tested = read(test.rows, np.arange(len(test.rows)), test.layout, view, device)
        truth, right, chosen = test.labels.to(device), [], []
        for seed in task.config.seeds:
            rows = task.learnt(seed)
            x, labels = read(train.rows, rows, train.layout, view, device), train.labels[rows]
            aside = holdout_mask(labels, HELD_OUT, seed).to(device)
            labels = labels.to(device)
            part = Regression(x[~aside], labels[~aside], classes, task.accelerator)
            screen, scores = task.screen(len(CS), "C"), []
            for number, c in enumerate(CS, 1):
                part.fit(c)
                scores.append((part.predict(x[aside]) == labels[aside]).float().mean().item())
                screen.show(number, f"logistic regression, {view}, seed {seed}: C {c:.1e}, held out {scores[-1]:.1%}")
            screen.close()
            best = CS[int(np.argmax(scores))]
            whole = Regression(x, labels, classes, task.accelerator)
            whole.fit(best)
            right.append((whole.predict(tested) == truth).cpu())
            chosen.append(best)
        found.append(Measured(view, right, {"C": chosen, "selected on": f"{HELD_OUT:.0%} of train"}))
    return found
