"""Compiled blocks in whole runs: the same losses, and no graph that is made again."""

import json

import pytest

from ..runs import log_of, train, train_together

SETTINGS = {"watch__probe_every": 0, "max_steps": 8}
WAYS = {"one process": {}, "two, DDP": {"together": 2}, "two, FSDP2": {"together": 2, "system__fsdp": "true"}}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    output = tmp_path_factory.mktemp("plain") / "run"
    code, said = train(output, **SETTINGS)
    assert code == 0, said
    return log_of(output)


@pytest.mark.slow
@pytest.mark.xdist_group("runs")
@pytest.mark.parametrize("way", WAYS)
def test_compiled_runs_have_the_losses_of_plain_ones_and_compile_once(way, plain, tmp_path, unused_port):
    output, settings = tmp_path / "run", {**SETTINGS, **WAYS[way], "system__compile": "true"}
    if processes := settings.pop("together", 0):
        codes, said = train_together(output, unused_port, processes, **settings)
        assert codes == [0] * processes, said
    else:
        code, said = train(output, **settings)
        assert code == 0, said
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    for ours, theirs in zip(lines, plain, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["region_counts"] == theirs["region_counts"]
    graphs = [line["graphs"] for line in lines]
    assert 0 < graphs[0] == graphs[-1], graphs
