"""The README's code runs as it stands."""

import re
from pathlib import Path

import torch

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_training_step_of_the_engine_trains():
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "update_target" in block)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    found: dict = {}
    torch.manual_seed(0)
    exec(code, found)
    model = found["model"]
    assert found["loss"].isfinite() and found["count"] > 0 and found["facts"]["regions_found"] > 0
    gap = (model.student.norm.weight - model.target.norm.weight).abs().max()
    assert 0 < gap < 2e-3  # the student has moved, the target a little after it
