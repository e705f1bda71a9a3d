"""Two classifiers of features (n, D): the vote of the nearest neighbours, and logistic regression."""

import torch
from accelerate import Accelerator
from torch.nn import functional as F

_ROWS = 16384  # whose logits are in memory together


def vote(similarity: torch.Tensor, labels: torch.Tensor, k: int, temperature: float, classes: int) -> torch.Tensor:
    """Predicted classes (q,) from the neighbours' similarities and labels (q, at least k), nearest first.

    The k nearest vote, each with a weight of exp(similarity / temperature).
    """
    weights = ((similarity[:, :k] - similarity[:, :1]) / temperature).exp()  # relative to the nearest: no overflow
    votes = torch.zeros(len(similarity), classes, device=similarity.device).scatter_add(1, labels[:, :k], weights)
    return votes.argmax(1)


class Regression:
    """Multinomial logistic regression with an L2 penalty on features x (n, D) with labels (n,), as scikit-learn has it.

    minimise  mean cross-entropy + |W|² / (2 C n),  the intercept free

    With an accelerator each process computes every processes-th row; without, this one computes all.
    """

    def __init__(self, x: torch.Tensor, labels: torch.Tensor, classes: int, accelerator: Accelerator | None = None):
        self.accelerator, self.classes, self.count = accelerator, classes, len(x)
        self.mean = x.mean(0)  # the intercept is free, so this changes the path to the minimum only
        mine = slice(accelerator.process_index, None, accelerator.num_processes) if accelerator else slice(None)
        self.x, self.labels = x[mine] - self.mean, labels[mine]
        self.weights = torch.zeros(classes, x.shape[1] + 1, device=x.device, dtype=x.dtype)  # the intercept comes last

    def fit(self, c: float, max_iter: int = 1000) -> None:
        """Continue from the weights of the fit before."""
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
            gradient = self.weights.grad
            if self.accelerator:
                total, gradient = (self.accelerator.reduce(tensor, "sum") for tensor in (total, gradient))
            slopes = self.weights.detach()[:, :-1]
            gradient[:, :-1] += slopes / (c * self.count)
            self.weights.grad = gradient
            return total + slopes.square().sum() / (2 * c * self.count)

        solver.step(loss)
        self.weights = self.weights.detach()

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        """Classes (m,) of features (m, D)."""
        return torch.cat([self._logits(part - self.mean).argmax(1) for part in x.split(_ROWS)])

    def probabilities(self, x: torch.Tensor) -> torch.Tensor:
        """Of each class (m, classes), for features (m, D)."""
        return self._logits(x - self.mean).softmax(1)

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weights[:, :-1], self.weights[:, -1])
