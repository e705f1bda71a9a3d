"""The file of results: what is added is whole, whatever happened before."""

import json

from common.run import results


def test_a_line_that_a_kill_cut_off_is_removed_and_takes_nothing_with_it(tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    results.append(path, [{"accuracy": 1.0}])
    with path.open("a", encoding="utf-8") as file:
        file.write('{"accuracy": 2.0, "name": "ä')
    results.append(path, [{"accuracy": 3.0}])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["accuracy"] for line in lines] == [1.0, 3.0]
    assert "cut off" in capsys.readouterr().out


def test_the_same_result_is_added_once(tmp_path):
    path = tmp_path / "results.jsonl"
    for _ in range(2):
        results.append(path, [{"accuracy": 1.0}, {"accuracy": 2.0}])
    assert len(path.read_text().splitlines()) == 2
