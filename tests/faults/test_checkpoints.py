"""Each file of a checkpoint × each damage, at every door: passed over for an older one, or refused by name."""

import shutil

import pytest
from common.run import checkpoints

from timm_dseq import UserError
from timm_dseq.cli import main as command
from timm_dseq.hub.load import load_backbone

from ..train.tunings import colours
from . import doors
from .damages import DAMAGES

pytestmark = [pytest.mark.xdist_group("faults"), pytest.mark.timeout(120)]

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")
CASES = [(file, damage) for file in FILES for damage in DAMAGES]
FEW = {
    ("model.safetensors", "a bit flipped"),
    ("state.json", "a FIFO"),
    ("manifest.json", "a folder"),
    ("optimizer.safetensors", "a dangling link"),
}
every_case = pytest.mark.parametrize(("file", "damage"), CASES)
few_or_slow = doors.few_or_slow(("file", "damage"), CASES, FEW)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 6 steps, with checkpoints of step 3 and 6."""
    return doors.run_of(tmp_path_factory.mktemp("whole"), steps=6)


@pytest.fixture
def own(whole, tmp_path):
    """A copy to spoil, without what is not needed."""
    shutil.copytree(whole, tmp_path / "run", ignore=shutil.ignore_patterns("export", "report.html"))
    return tmp_path / "run"


@pytest.fixture
def step(own, request):
    """Its newest checkpoint, damaged as the case says."""
    folder = own / "checkpoints" / "step-00000006"
    if hasattr(request.node, "callspec") and "damage" in request.node.callspec.params:
        DAMAGES[request.node.callspec.params["damage"]](folder / request.node.callspec.params["file"])
    return folder


def test_the_table_has_each_file_of_a_checkpoint(whole):
    assert {path.name for path in (whole / "checkpoints" / "step-00000006").iterdir()} == {*FILES}


@every_case
def test_an_older_one_that_is_whole_is_taken(file, damage, step):
    found, passed_over = checkpoints.newest(step.parent)
    assert found == step.with_name("step-00000003")
    assert len(passed_over) == 1 and "step-00000006" in passed_over[0] and "\n" not in passed_over[0]
    assert file in passed_over[0] or file == "manifest.json", passed_over


@every_case
def test_by_its_own_name_it_is_no_backbone(file, damage, step):
    with pytest.raises(UserError, match="step-00000006") as error:
        load_backbone(str(step), 48)
    assert "\n" not in str(error.value)


@every_case
def test_convert_refuses_it_or_does_not_need_it(file, damage, step, tmp_path, capsys):
    code = command(["convert", str(step / "model.safetensors"), "--output", str(tmp_path / "out")])
    said = capsys.readouterr().err
    if file == "optimizer.safetensors" or (file, damage) == ("manifest.json", "a bit flipped"):  # in its line
        assert code == 0, said
        return
    doors.refused((code, "", said), "step-00000006")
    assert not (tmp_path / "out").exists()


@few_or_slow
def test_a_run_is_not_resumed_from_it_by_name(file, damage, step, tmp_path):
    before = {path.name for path in step.parent.iterdir()}
    found = doors.enter(*doors.pretrain(tmp_path, resume=step, max_steps=9), tmp_path)
    doors.refused(found, "step-00000006")
    assert {path.name for path in step.parent.iterdir()} == before


@few_or_slow
def test_the_same_command_passes_it_over_and_ends_well(file, damage, step, tmp_path):
    code, out, err = doors.enter(*doors.pretrain(tmp_path, max_steps=6), tmp_path)
    assert code == 0 and not err and "passed over step-00000006: " in out, out + err
    assert checkpoints.fault(step) is None and not [*step.parent.glob(".unfinished*")]


@few_or_slow
@pytest.mark.parametrize("door", [doors.probe, doors.finetune])
def test_no_result_is_measured_on_it(file, damage, door, step, tmp_path):
    data = colours(tmp_path / "colours", train=12, test=6)
    doors.refused(doors.enter(*door(step, tmp_path, data), tmp_path), "step-00000006")
    assert not (tmp_path / "results.jsonl").exists()


def test_a_whole_one_is_taken_at_every_door(step, tmp_path):
    """The control case."""
    assert checkpoints.newest(step.parent) == (step, [])
    load_backbone(str(step), 48)
    assert command(["convert", str(step / "model.safetensors"), "--output", str(tmp_path / "out")]) == 0
    data = colours(tmp_path / "colours", train=12, test=6)
    entries = [doors.pretrain(tmp_path, resume=step, max_steps=7), doors.probe(step, tmp_path, data)]
    for entry in (*entries, doors.finetune(step, tmp_path, data)):
        code, out, err = doors.enter(*entry, tmp_path)
        assert code == 0, out + err
