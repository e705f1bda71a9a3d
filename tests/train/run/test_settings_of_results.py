"""Runs of other settings, and of other test images, are other rows: none hides another."""

import json
from dataclasses import dataclass, field, fields, replace

import detect
import pytest
import segment
import table
from common.dense import settings as dense
from common.detecting.settings import DetectorSettings
from common.run import results
from common.segmenting import settings as segmenting

from .test_results import RECORD


@dataclass
class Inner:
    rate: float = 0.5
    scale: tuple[float, float] = (0.5, 2.0)
    drops: list[float] = field(default_factory=lambda: [0.9])
    batch: int = 8


def test_what_differs_from_the_recipe_is_told_and_nothing_else():
    recipe = {"inner.rate": 0.1}
    assert results.changed([Inner(rate=0.1)], recipe, (), {}) == {}
    assert results.changed([Inner()], recipe, (), {}) == {"rate": 0.5}
    other = Inner(rate=0.1, scale=(1.0, 1.0), drops=[0.5], batch=4)
    found = results.changed([other], recipe, ("batch",), {"depth": 3})
    assert found == {"scale": [1.0, 1.0], "drops": [0.5], "args": '{"depth": 3}'}
    assert json.loads(json.dumps(found)) == found


def other(value):
    """Another value of the same kind."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, (list, tuple)):
        return type(value)(map(other, value))
    return (
        {"step": "linear", "dseq": "vitdet", "auto": True}.get(value, "other") if isinstance(value, str) else value + 1
    )


@pytest.mark.parametrize(
    ("sections", "left_out", "told"),
    [
        ((dense.Optim, segmenting.Augment), segment.LEFT_OUT, {"epochs", "batch_size", "lr"}),
        (
            (dense.Optim, DetectorSettings),
            detect.LEFT_OUT,
            {"epochs", "batch_size", "lr", "layer_decay", "window", "size"},
        ),
    ],
)
def test_every_setting_of_a_dense_run_is_in_its_record_or_decides_nothing(sections, left_out, told):
    """told: those that have a place of their own in the record."""
    for kind in sections:
        for name in (each.name for each in fields(kind)):
            made = kind()
            found = results.changed([replace(made, **{name: other(getattr(made, name))})], {}, left_out, {})
            nothing = {"max_skipped", "accumulation", "pyramid", "masks"}  # or the view, or the protocol
            assert set(found) == {name} or name in told | nothing, name


def test_test_images_of_another_digest_are_another_table(tmp_path):
    path = tmp_path / "results.jsonl"
    same = {**RECORD, **results.figure("mIoU", 41.0)}
    others = [
        {**same, "value": value, "test": {**RECORD["test"], "digest": digest}}
        for value, digest in ((42, "a"), (43, "b"))
    ]
    results.append(path, [same, *others])
    said = table.tables(results.read([path]))
    assert said.count("### ") == 3 and all(f"| {value}.00 |" in said for value in (41, 42, 43))


@pytest.mark.parametrize(
    ("record", "whose"),
    [
        ({"model": "m", "map": "border", "predictions": {}}, "a result of discover.py, which prints its own tables"),
        (
            {"order": "border", "deletion": 0.1, "insertion": 0.2},
            "a result of faithfulness.py, which prints its own table",
        ),
    ],
)
def test_results_that_have_tables_elsewhere_are_said_to_be_whose(record, whose, tmp_path, capsys):
    (tmp_path / "results.jsonl").write_text(json.dumps(record))
    assert table.main([str(tmp_path / "results.jsonl")]) == 1
    said = capsys.readouterr().err
    assert whose in said and said.count("\n") == 1 and "remove it" not in said
