"""Multinomial logistic regression with an L2 penalty, as scikit-learn states it; C is chosen on images held out.

minimise  mean cross-entropy + |W|² / (2 C n),  the intercept free
"""

import numpy as np
import torch
from accelerate import Accelerator
from torch.nn import functional as F

from ..labels.labelled import held_out
from ..run.results import Measured
from .extract import read
from .task import Task

CS = [float(c) for c in np.logspace(-6, 5, 45)]
HELD_OUT = 0.1
_ROWS = 16384  # whose logits are in memory together


class Regression:
    """Fits to features (n, D), of which each process has every processes-th."""

    def __init__(self, x: torch.Tensor, labels: torch.Tensor, classes: int, accelerator: Accelerator) -> None:
        self.accelerator, self.classes, self.count = accelerator, classes, len(x)
        self.mean = x.mean(0)  # the intercept is free, so this changes the path to the minimum only
        mine = slice(accelerator.process_index, None, accelerator.num_processes)
        self.x, self.labels = x[mine] - self.mean, labels[mine]
        self.weights = torch.zeros(classes, x.shape[1] + 1, device=x.device, dtype=x.dtype)

    def fit(self, c: float, max_iter: int = 1000) -> None:
        """From where the last fit ended."""
        self.weights.requires_grad_(True)
        solver = torch.optim.LBFGS(
            [self.weights],
            max_iter=max_iter,
            tolerance_grad=1e-6,
            tolerance_change=1e-10,
            line_search_fn="strong_wolfe",
        )

        def loss() -> torch.Tensor:
            solver.zero_grad()
            total = torch.zeros((), device=self.x.device, dtype=self.x.dtype)
            for x, labels in zip(self.x.split(_ROWS), self.labels.split(_ROWS), strict=True):
                part = F.cross_entropy(self._logits(x), labels, reduction="sum") / self.count
                part.backward()
                total += part.detach()
            total = self.accelerator.reduce(total, "sum")
            gradient = self.accelerator.reduce(self.weights.grad, "sum")
            slopes = self.weights.detach()[:, :-1]
            gradient[:, :-1] += slopes / (c * self.count)
            self.weights.grad = gradient
            return total + slopes.square().sum() / (2 * c * self.count)

        solver.step(loss)
        self.weights = self.weights.detach()

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self._logits(part - self.mean).argmax(1) for part in x.split(_ROWS)])

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weights[:, :-1], self.weights[:, -1])


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
            aside = held_out(labels, HELD_OUT, seed).to(device)
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
