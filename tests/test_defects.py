"""The study's defects are what the engine's own checks see."""

import sys
from pathlib import Path

import pytest

from timm_dseq import Predictor
from timm_dseq.engine import curriculum

from .engine.test_jepa import check_loss, check_mask_token_learns, check_one_region_trains_the_encoder
from .tiny import batch, jepa

ROOT = Path(__file__).parents[1]
CHECKS = {
    "lag": ("dseq", lambda model: check_loss(model, batch(5), 1e-5)),
    "blind": ("dseq", lambda model: check_one_region_trains_the_encoder(model, batch(3)[0])),
    "transposed": ("ijepa", lambda model: check_loss(model, batch(5), 1e-5)),
    "no_mask_token": ("dseq", lambda model: check_mask_token_learns(model, batch(3))),
}


@pytest.fixture
def defects(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), str(ROOT / "train"), *sys.path])
    for place, name in (
        (curriculum, "plan_regions"),
        (curriculum, "plan_blocks"),
        (Predictor, "forward"),
        (Predictor, "_table"),
    ):
        monkeypatch.setattr(place, name, getattr(place, name))  # so that it comes back
    import defects

    return defects.DEFECTS


@pytest.mark.parametrize("name", CHECKS)
def test_a_defect_that_is_brought_back_is_one(name, defects):
    objective, check = CHECKS[name]
    check(jepa(objective))
    defects[name]()
    with pytest.raises(AssertionError):
        check(jepa(objective))


def test_all_of_them_are_looked_at(defects):
    assert defects.keys() == CHECKS.keys()
