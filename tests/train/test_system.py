"""How it is computed: precision and recomputed activations in a whole run, streams in several processes."""

import pytest

from .runs import log_of, train, train_together
from .test_resume import STREAM, shards

pytestmark = pytest.mark.xdist_group("runs")


def test_recomputed_activations_change_no_bit_and_bf16_little(tmp_path):
    settings = {"max_steps": 6, "watch__probe_every": 0}
    logs = {}
    for name, how in {
        "plain": {},
        "recomputed": {"system__checkpointing": "true"},
        "bf16": {"system__precision": "bf16"},
    }.items():
        code, said = train(tmp_path / name, **settings, **how)
        assert code == 0, said
        logs[name] = log_of(tmp_path / name)
    assert logs["recomputed"] == logs["plain"]
    for line, other in zip(logs["bf16"], logs["plain"], strict=True):
        assert line["loss"] != other["loss"]
        assert line["loss"] == pytest.approx(other["loss"], rel=0.05)


def test_two_processes_go_on_in_their_streams_and_no_other_number_may(tmp_path, unused_port):
    (tmp_path / "shards").mkdir()
    settings = {**STREAM, "data__path": shards(tmp_path / "shards")}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for output, steps in ((whole, 18), (parts, 7)):
        codes, said = train_together(output, unused_port, max_steps=steps, **settings)
        assert codes == [0, 0], said
    code, said = train(parts, **settings)
    assert code == 1 and "goes on with the processes it began with: take 2" in said
    codes, said = train_together(parts, unused_port, **settings)
    assert codes == [0, 0], said
    assert log_of(parts) == log_of(whole)
    assert len(log_of(parts)) == 18
