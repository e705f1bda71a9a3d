"""CONTRIBUTING.md is true: its recipe for a query trains, its commands select tests, and what it names exists."""

import re
import typing
from pathlib import Path

import pytest
import torch
import yaml

from timm_dseq.engine import saliency

from . import train  # noqa: F401, puts train/ on the path
from .tiny import batch, jepa

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()


@pytest.fixture
def recipe(monkeypatch):
    """The query of the recipe, in the module as if it had been written there."""
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    monkeypatch.setattr(saliency, "QUERIES", dict(saliency.QUERIES))
    before = set(saliency.QUERIES)
    exec(code, dict(vars(saliency)))
    (name,) = set(saliency.QUERIES) - before
    return name


def test_the_recipe_for_a_query_trains(recipe):
    model = jepa(query=recipe)
    before = {name: tensor.clone() for name, tensor in model.student.named_parameters()}
    images, _, blocks = batch()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    loss, count, facts = model(images, None, blocks)
    (loss / count).backward()
    optimizer.step()
    assert loss.isfinite() and facts["regions_found"] > 0 and facts["region_share"] > 0
    moved = [name for name, tensor in model.student.named_parameters() if not torch.equal(tensor, before[name])]
    assert any("blocks.0." in name for name in moved)
    maps = [saliency.saliency_map(model.target, images, query) for query in (recipe, "norm")]
    assert not torch.equal(*maps)


def test_the_settings_name_every_query_that_may_train():
    from common.pretraining.settings import Model

    trained = {name for name, query in saliency.QUERIES.items() if query.for_training}
    assert set(typing.get_args(typing.get_type_hints(Model)["query"])) == trained


def test_what_it_names_exists():
    for path in re.findall(r"`((?:timm_dseq|train|tests|docs|hub_configs)/[\w./]*|\.ci/run|README\.md)`", TEXT):
        assert (ROOT / path).exists(), path
    named = re.findall(r"`(\w+)` (?:and one of `(\w+)` )?in\s+`([\w./]+\.(?:py|md))`", TEXT)
    assert len(named) > 10
    for *names, path in named:
        text = (ROOT / path).read_text()
        assert all(re.search(rf"\b{name}\b", text) for name in names if name), (names, path)


def test_its_markers_are_those_of_the_suite():
    markers = re.findall(r'pytest -m (?:"([\w ]+)"|(\w+))', TEXT)
    words = {word for marker in markers for word in " ".join(marker).split()} - {"and", "not"}
    known = re.findall(r'^  "(\w+): ', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert words and words <= set(known)


def test_hooks_need_no_address():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    assert all(hook["language"] == "system" and hook["entry"].startswith("ruff ") for hook in repository["hooks"])
