"""The page about a run says what the log says."""

import re

from common.run.report import charts


def test_the_legend_tells_the_last_value_and_not_a_mean():
    points = [(step, 1.0) for step in range(1, 2000)] + [(2000, 5.0)]
    drawn = charts([("Loss", [("loss", points), ("other", [(1, 2.5)])])])
    assert re.findall(r"(\w+): ([\d.]+)</span>", drawn) == [("loss", "5"), ("other", "2.5")]
    assert len(re.search(r'points="([^"]*)"', drawn)[1].split()) <= 400
