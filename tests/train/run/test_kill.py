"""A run that is killed at any moment, and started again, ends as if nothing had happened."""

import os
import random
import shutil
import signal
import time

import psutil
import pytest

from ..runs import assert_same_run, killed_until_it_ends, log_of, start, train, wait_for_steps


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody disturbed, and how long it took."""
    train(tmp_path_factory.mktemp("first") / "run", max_steps=1)  # the first one waits for imports
    output = tmp_path_factory.mktemp("whole") / "run"
    begun = time.monotonic()
    code, said = train(output)
    assert code == 0, said
    return output, time.monotonic() - begun


def kill_at_random(whole, tmp_path, seed):
    reference, seconds = whole
    output, draw = tmp_path / "run", random.Random(seed)
    kills = killed_until_it_ends(lambda: start(output), draw, 0.1 * seconds, seconds)
    assert_same_run(output, reference)
    return kills


@pytest.mark.xdist_group("runs")
def test_the_run_is_the_size_the_kills_need(whole):
    log = log_of(whole[0])
    assert [line["step"] for line in log] == list(range(1, 21))
    assert {line["region_share"] > 0 for line in log} == {True}
    assert len(list((whole[0] / "checkpoints").iterdir())) == 2


@pytest.mark.xdist_group("runs")
def test_three_killed_runs_end_bit_for_bit_like_the_whole_one(whole, tmp_path):
    kills = [kill_at_random(whole, tmp_path / str(seed), seed) for seed in range(3)]
    assert sum(kills) >= 2


@pytest.mark.slow
@pytest.mark.xdist_group("runs")
def test_12_more_killed_runs_end_bit_for_bit_like_the_whole_one(whole, tmp_path):
    assert sum(kill_at_random(whole, tmp_path / str(seed), seed) for seed in range(3, 15)) >= 7


@pytest.mark.xdist_group("runs")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_behind_a_step_saves_and_exits_with_75(whole, tmp_path, number):
    """To the loader's worker as well, and twice: a scheduler, or Ctrl-C in a terminal, signals every process of a job,
    and torchrun hands on to its processes what they have got already."""
    output = tmp_path / "run"
    process = start(output, data__workers=1)
    wait_for_steps(process, output, 4)
    (worker,) = psutil.Process(process.pid).children()
    worker.send_signal(number)
    time.sleep(0.3)  # a worker that died of it is noticed by now
    for _ in range(2):
        os.kill(process.pid, number)
        time.sleep(0.05)
    process.join(60)
    assert process.exitcode == 75
    done = len(log_of(output))
    assert 4 <= done < 20
    assert max((output / "checkpoints").glob("step-*")).name == f"step-{done:08d}"
    code, said = train(output)
    assert code == 0, said
    assert_same_run(output, whole[0])


@pytest.mark.xdist_group("runs")
def test_loader_workers_change_nothing(whole, tmp_path):
    code, said = train(tmp_path / "run", data__workers=2)
    assert code == 0, said
    assert_same_run(tmp_path / "run", whole[0])


@pytest.mark.xdist_group("runs")
def test_a_dry_run_of_a_finished_run_speaks_of_no_export(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    code, said = train(tmp_path / "run", dry_run=True)
    assert code == 0 and "exported" not in said, said
