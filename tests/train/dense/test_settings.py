"""The learning rate of dense runs over their length."""

import pytest
from common.dense.settings import Optim


def test_the_learning_rate_warms_up_and_falls_at_the_drops_along_a_cosine_or_a_line():
    step = Optim(lr=1.0, warmup_epochs=1, drops=[0.5, 0.75])
    rates = [step.learning_rate(samples, 10, 100) for samples in (0, 5, 10, 49, 50, 74, 75, 99)]
    assert rates == pytest.approx([0, 0.5, 1, 1, 0.1, 0.1, 0.01, 0.01])
    cosine = Optim(lr=1.0, warmup_epochs=1, schedule="cosine", lr_end=0.2)
    rates = [cosine.learning_rate(samples, 10, 110) for samples in (5, 10, 60, 110)]
    assert rates == pytest.approx([0.5, 1, 0.6, 0.2])
    line = Optim(lr=1.0, warmup_epochs=1, schedule="linear", lr_end=0.2)
    rates = [line.learning_rate(samples, 10, 110) for samples in (5, 10, 35, 60, 110)]
    assert rates == pytest.approx([0.5, 1, 0.8, 0.6, 0.2])
