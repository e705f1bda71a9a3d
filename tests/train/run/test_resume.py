"""Going on from a checkpoint: what may change, what may not, and what is said."""

import hashlib
import json
import os
import shutil
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from ..data.test_source import parquet_of
from ..runs import log_of, said_of, start, tensors_of, train
from .test_export import leaks

pytestmark = pytest.mark.xdist_group("runs")


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A run stopped after 6 of its 20 steps."""
    output = tmp_path_factory.mktemp("half") / "run"
    code, said = train(output, max_steps=6)
    assert code == 0, said
    return output


@pytest.fixture
def own(half, tmp_path):
    """A copy of it to spoil."""
    shutil.copytree(half, tmp_path / "run")
    return tmp_path / "run"


def test_max_steps_stops_early_and_leaves_the_schedules_alone(half, tmp_path):
    code, said = train(tmp_path / "run", max_steps=12)
    assert code == 0, said
    assert log_of(half) == log_of(tmp_path / "run")[:6]
    assert (half / "export" / "model.safetensors").is_file()


@pytest.mark.parametrize("max_steps", [6, 4])
def test_a_finished_run_exports_again_and_exits_with_0(own, max_steps):
    shutil.rmtree(own / "export")
    code, said = train(own, max_steps=max_steps)
    assert code == 0, said
    assert f"nothing is left to train up to step {max_steps}: what step 6 holds is exported" in said
    assert load_file(own / "export" / "model.safetensors").keys()
    assert len(log_of(own)) == 6


def test_never_starts_anew_and_keeps_the_earlier_run(own):
    before = log_of(own)
    code, said = train(own, max_steps=2, resume="never")
    assert code == 0, said
    assert len(log_of(own)) == 2
    assert log_of(own / "earlier-1") == before
    assert "is now in" in said


def test_a_path_goes_on_from_that_checkpoint(own):
    code, said = train(own, max_steps=6, resume=own / "checkpoints" / "step-00000003", checkpoint__every=2)
    assert code == 0, said
    assert [line["step"] for line in log_of(own)] == [1, 2, 3, 4, 5, 6]


def test_an_older_checkpoint_that_is_asked_for_is_the_runs_truth(own):
    code, said = train(own, max_steps=4, resume=own / "checkpoints" / "step-00000003")
    assert code == 0, said
    assert f"did not lead to are now in {own / 'earlier-1'}" in said
    assert (own / "earlier-1" / "checkpoints" / "step-00000006" / "manifest.json").is_file()
    assert [path.name for path in sorted((own / "checkpoints").iterdir())] == ["step-00000003", "step-00000004"]
    exported = load_file(own / "export" / "model.safetensors")
    saved = load_file(own / "checkpoints" / "step-00000004" / "model.safetensors")
    assert all(torch.equal(tensor, saved[f"target.{name}"]) for name, tensor in exported.items())
    code, said = train(own, max_steps=6)
    assert code == 0 and [line["step"] for line in log_of(own)] == [1, 2, 3, 4, 5, 6], said


def test_what_else_lies_among_the_checkpoints_is_left_alone(own, half):
    folder = own / "checkpoints"
    shutil.copytree(folder / "step-00000006", folder / "step-00000006.bak")
    for name in ("step-best", "step-²"):
        (folder / name).mkdir()
    (folder / "step-00000001").write_text("a file")
    (folder / "step-00000006" / ".ipynb_checkpoints").mkdir()
    os.mkfifo(folder / "step-00000006" / "pipe")
    (folder / "step-00000000").symlink_to(folder / "step-00000003")
    code, said = train(own, max_steps=9)
    assert code == 0, said
    assert {path.name for path in folder.iterdir()} == {
        *("step-00000006.bak", "step-best", "step-²", "step-00000001", "step-00000000"),
        *("step-00000006", "step-00000009"),
    }


@pytest.mark.parametrize("earlier", [("earlier-2",), ("earlier-1", "earlier-mine")])
def test_a_new_beginning_finds_a_free_name_for_the_earlier_run(earlier, own):
    for name in earlier:
        (own / name).mkdir()
    code, said = train(own, max_steps=2, resume="never")
    assert code == 0, said
    free = "earlier-3" if "earlier-2" in earlier else "earlier-2"
    assert len(log_of(own / free)) == 6 and not [*(own / earlier[0]).iterdir()]


FC1 = "student.blocks.0.mlp.fc1.weight"
WRONG = {
    "a tensor of another shape": ("model.safetensors", lambda w: w.update({FC1: torch.zeros(1)}), f"{FC1} is (1,)"),
    "a tensor too few": ("model.safetensors", lambda w: w.pop(FC1), f"{FC1} is missing"),
    "a tensor too many": ("model.safetensors", lambda w: w.update(x=torch.zeros(1)), "x is unknown"),
    "a weight that is not finite": ("model.safetensors", lambda w: w[FC1].fill_(torch.nan), "is not finite"),
    "a moment too few": ("optimizer.safetensors", lambda m: m.pop(f"exp_avg.{FC1}"), f"exp_avg.{FC1} is mis"),
    "a moment too short": ("optimizer.safetensors", lambda m: m.update({f"exp_avg.{FC1}": torch.zeros(3)}), "is (3,)"),
    "a step before the first": ("state.json", lambda s: s["done"].update(step=-7), "says step: -7"),
    "a step that is a word": ("state.json", lambda s: s["done"].update(step="x"), "says step: 'x'"),
    "a later version": ("state.json", lambda s: s["done"].update(moons=3), "later version of this program (moons)"),
    "no progress": ("state.json", lambda s: s.pop("done"), "does not describe a run"),
    "a list": ("state.json", lambda s: [1], "does not describe a run"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_checkpoint_whose_content_cannot_be_is_refused_before_anything_is_overwritten(case, own):
    part, change, says = WRONG[case]
    changed(own, part, change)
    before = log_of(own)
    shutil.copytree(own / "checkpoints" / "step-00000003", own / "checkpoints" / "step-00000008")
    (own / "checkpoints" / "step-00000008" / "state.json").unlink()  # a newer one, which is passed over
    code, said = train(own, max_steps=9)
    assert code == 1 and says in said and said.count("\n") == said.rstrip().count("\n") + 1, said
    assert "Traceback" not in said and said.splitlines()[-1].startswith("pretrain.py: "), said
    assert log_of(own) == before and not (own / "checkpoints" / "step-00000009").exists()
    assert not [*own.glob("earlier-*")]


@pytest.mark.parametrize("text", ["{}", "[]", "null", "7", '{"model.safetensors": 3}', "[" * 100_000])
def test_a_manifest_that_is_none_is_a_damaged_checkpoint(text, own):
    (own / "checkpoints" / "step-00000006" / "manifest.json").write_text(text)
    code, said = train(own, max_steps=6)
    assert code == 0 and "passed over step-00000006: manifest.json" in said, said


def test_a_damaged_checkpoint_is_passed_over_with_the_reason(own, half):
    file = own / "checkpoints" / "step-00000006" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    code, said = train(own, max_steps=6)
    assert code == 0, said
    assert "passed over step-00000006: optimizer.safetensors has" in said
    assert log_of(own) == log_of(half)
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(own).values(), tensors_of(half).values(), strict=True))


def test_no_whole_checkpoint_left_is_no_silent_fresh_start(own):
    for file in own.rglob("manifest.json"):
        file.unlink()
    code, said = train(own)
    assert code == 1
    assert "no checkpoint in" in said and "--resume never" in said


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"optim__lr": 5e-4}, "optim.lr was 0.001"),
        ({"model__min_area": 0.1}, "model.min_area was 0.02"),
        ({"seed": 4}, "seed was 0"),
        ({"optim__batch_size": 16}, "optim.batch_size was 8"),
        ({"resume": "nowhere"}, "--resume nowhere is no checkpoint"),
    ],
)
def test_settings_that_change_the_run_are_refused_by_name(settings, says, own):
    code, said = train(own, **settings)
    assert code == 1
    assert says in said and "Traceback" not in said


def test_another_data_set_is_refused(tmp_path):
    settings = {"optim__epochs": 4, "watch__probe_every": 0, "data__path": tmp_path / "x.parquet"}
    parquet_of(tmp_path / "x.parquet", count=16)
    assert train(tmp_path / "run", max_steps=3, **settings)[0] == 0
    parquet_of(tmp_path / "x.parquet", count=15)
    code, said = train(tmp_path / "run", **{**settings, "optim__epochs": 4})
    assert code == 1
    assert "holds other images or labels than when" in said


def rewritten(file):
    """The checkpoint's manifest is to know a file that a test has changed."""
    manifest = json.loads((file.parent / "manifest.json").read_text())
    content = file.read_bytes()
    manifest[file.name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (file.parent / "manifest.json").write_text(json.dumps(manifest))


def changed(own, part, change):
    """Tensors or the state of a checkpoint, changed, and its manifest with them."""
    file = own / "checkpoints" / "step-00000006" / part
    state = file.suffix == ".json"
    content = json.loads(file.read_text()) if state else load_file(file)
    made = change(content)
    content = made if isinstance(made, list) else content
    if state:
        file.write_text(json.dumps(content))
    else:
        save_file(content, file, metadata={"format": "pt"})
    rewritten(file)


def without(own, section, name):
    """A checkpoint that was written before there was this setting."""
    changed(own, "state.json", lambda state: state["config"][section].pop(name))


def test_a_checkpoint_of_before_a_setting_goes_on_with_what_runs_did_then(own):
    without(own, "model", "terms")
    code, said = train(own, max_steps=7)
    assert code == 0, said
    code, said = train(own, max_steps=8, model__terms='{"contrastive": 1}', resume=own / "checkpoints/step-00000006")
    assert code == 1 and "model.terms was {} in" in said and "is {'contrastive': 1.0} now" in said, said
    without(own, "model", "min_area")
    code, said = train(own, max_steps=8, resume=own / "checkpoints/step-00000006")
    assert code == 1 and "another version of this program, which had no model.min_area" in said, said


def test_steps_that_are_not_finite_are_left_out_counted_and_end_the_run(own):
    changed(own, "model.safetensors", lambda weights: weights[FC1].fill_(1e38))  # products of it overflow
    before = tensors_of(own)
    code, said = train(own, optim__max_skipped=3)
    assert code == 1
    assert "not finite for 3 steps in a row" in said and "--resume PATH" in said
    assert [line["skipped"] for line in log_of(own)] == [False] * 6 + [True] * 3
    ids = json.loads((own / "not_finite-0.json").read_text())
    assert len(ids["epoch_and_index"]) == 8
    after = tensors_of(own)
    moved = [name for name in before if not torch.equal(before[name].nan_to_num(7), after[name].nan_to_num(7))]
    assert [name for name in moved if "target." not in name] == []


def test_an_exported_folder_is_a_start_for_another_run(half, tmp_path):
    code, said = train(tmp_path / "next", model__init=half / "export", max_steps=1, optim__lr_start=1e-12)
    assert code == 0, said
    assert "| start | weights of export |" in (tmp_path / "next" / "export" / "README.md").read_text()
    assert not leaks(tmp_path / "next" / "export", half.parent.name, tmp_path)
    ours, theirs = tensors_of(tmp_path / "next"), tensors_of(half)
    for name in theirs:
        if name.startswith("model: predictor."):
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-9)


def test_what_the_run_chose_may_be_named_or_left_to_it(half, tmp_path):
    for name, settings in {
        "auto": {"system__precision": "auto", "data__resident": "auto"},
        "named": {"system__precision": "no", "data__resident": "false"},
    }.items():
        shutil.copytree(half, tmp_path / name)
        code, said = train(tmp_path / name, max_steps=7, **settings)
        assert code == 0 and "precision no as the run began" in said, said
    for setting, now in (("system__precision", "bf16"), ("data__resident", "true")):
        code, said = train(tmp_path / "named", max_steps=8, **{setting: now})
        assert code == 1 and f"{setting.replace('__', '.')} was " in said, said


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    code, said = train(tmp_path / "file")
    assert code == 1
    assert "output_dir=" in said and "Traceback" not in said


def shards(folder, count=6, each=8):
    """Parquet shards of single-coloured images."""
    for shard in range(count):
        parquet_of(folder / f"train-{shard:05d}.parquet", count=each, label=[i % 2 for i in range(each)])
    return folder


STREAM = {"data__streaming": "true", "data__images": 48, "optim__epochs": 3, "watch__probe_every": 0}


@pytest.mark.slow
def test_a_streamed_run_goes_on_with_the_very_next_sample(tmp_path):
    (tmp_path / "shards").mkdir()
    settings = {**STREAM, "data__path": shards(tmp_path / "shards")}
    code, said = train(tmp_path / "whole", **settings)
    assert code == 0, said
    for steps in (2, 5, 8, 11):
        code, said = train(tmp_path / "parts", max_steps=steps, **settings)
        assert code == 0, said
    code, said = train(tmp_path / "parts", **settings)
    assert code == 0, said
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
    ours, theirs = tensors_of(tmp_path / "parts"), tensors_of(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_stream_that_does_not_tell_its_length_asks_for_it(tmp_path):
    (tmp_path / "shards").mkdir()
    settings = {**STREAM, "data__path": shards(tmp_path / "shards")}
    del settings["data__images"]
    code, said = train(tmp_path / "run", **settings)
    assert code == 1 and "give data.images" in said and "Traceback" not in said


def test_a_shard_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "shards").mkdir()
    path = shards(tmp_path / "shards")
    shard = path / "train-00003.parquet"
    shard.write_bytes(shard.read_bytes()[:200] + b"?" * (shard.stat().st_size - 200))
    code, said = train(tmp_path / "run", **STREAM, data__path=path)
    assert code == 1
    assert "train-00003.parquet" in said and "cannot be read" in said and "Traceback" not in said


def test_a_disk_that_fills_up_ends_the_run_in_one_line_and_the_run_goes_on_with_space(tmp_path):
    """Somebody else's file takes what is left of the room after the first checkpoint."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=50m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("only root may make a small disk to fill")
    try:
        process = start(disk / "run", checkpoint__keep=1)
        while not any((disk / "run" / "checkpoints").glob("step-*")):
            assert process.is_alive()
            time.sleep(0.001)
        with (disk / "ballast").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, 25 * 2**20)
        process.join(60)
        said = said_of(disk / "run").read_text()
        assert process.exitcode == 1
        assert "cannot be written (no space left on the disk" in said.lower() and "Traceback" not in said
        stopped = len(log_of(disk / "run"))
        assert 3 <= stopped < 20
        (disk / "ballast").unlink()
        code, said = train(disk / "run", checkpoint__keep=1)
        assert code == 0, said
        assert [line["step"] for line in log_of(disk / "run")] == list(range(1, 21))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_rounds_may_not_change_where_the_images_of_a_round_are_compared(tmp_path):
    views = {"model__objective": "views", "model__views": 2, "optim__regions": 0.0}
    for name, settings, code in (("dseq", {}, 0), ("views", views, 1)):
        assert train(tmp_path / name, max_steps=3, **settings)[0] == 0
        found, said = train(tmp_path / name, max_steps=4, optim__accumulation=2, **settings)
        assert found == code and ("optim.accumulation was 1" in said) == bool(code), said
