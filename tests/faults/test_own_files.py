"""Files that the project has written × damages × the code that reads them again: made anew, passed over, or named."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from common.data.digests import digests_of
from common.labels.labelled import open_labelled
from common.labels.settings import Labels
from common.pretraining import settings as pretraining
from common.pretraining.model import build
from common.run import results
from common.run.log import records, reopened
from table import main as table

from timm_dseq import UserError
from timm_dseq.errors import one_line
from timm_dseq.hub.load import load_backbone
from timm_dseq.hub.verify import read_folder

from ..train import probes
from ..train.runs import log_of, options
from ..train.tunings import colours
from . import doors
from .damages import DAMAGES

pytestmark = [pytest.mark.xdist_group("faults"), pytest.mark.timeout(120)]
every_damage = pytest.mark.parametrize("damage", DAMAGES)
FEW = {"deleted", "cut short", "a bit flipped", "a FIFO"}
few_or_slow = doors.few_or_slow("damage", DAMAGES, FEW)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 3 steps, its export and all."""
    return doors.run_of(tmp_path_factory.mktemp("whole"), steps=3)


@pytest.fixture
def own(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "run"))


def answer(call, *names):
    """What a call returns; None where it refuses in one line that holds one of the names."""
    try:
        return call()
    except (UserError, OSError) as error:
        said = one_line(error)
        assert "\n" not in said and any(name in said for name in names), said
        return None


# log.jsonl


@every_damage
def test_a_damaged_log_ends_where_it_is_none_of_ours(damage, own):
    before = log_of(own)
    DAMAGES[damage](own / "log.jsonl")
    read = records(own / "log.jsonl")
    assert len(read) <= len(before) and [line["step"] for line in read] == [1, 2, 3][: len(read)]
    if not (own / "log.jsonl").is_dir():
        reopened(own / "log.jsonl", 3).close()
        assert len(records(own / "log.jsonl")) == len(read)


@every_damage
def test_a_finished_run_with_a_damaged_log_is_exported_or_names_it(damage, own, tmp_path):
    DAMAGES[damage](own / "log.jsonl")
    shutil.rmtree(own / "export")
    found = doors.enter(*doors.pretrain(tmp_path, max_steps=3), tmp_path)
    if found[0] == 0:
        assert (own / "export" / "model.safetensors").is_file() and not found[2], found
    else:
        doors.refused(found, "log.jsonl")


# config.yaml, given again as a file of settings


@every_damage
def test_a_damaged_file_of_settings_is_named_or_gives_sane_ones(damage, own, capsys):
    DAMAGES[damage](own / "config.yaml")
    try:
        config, _ = pretraining.parse([f"--config={own / 'config.yaml'}"])
        assert damage in ("empty", "a bit flipped", "cut short", "null as JSON"), config
    except SystemExit as end:
        said = capsys.readouterr().err
        assert end.code == 2 and said.count("\n") == 1 and said.startswith("pretrain.py: "), said
    except UserError as error:
        assert "\n" not in str(error)


# results.jsonl


@pytest.fixture
def of_results(probed, tmp_path):
    return Path(shutil.copy(probed[0] / "results.jsonl", tmp_path))


@every_damage
def test_a_result_is_added_to_a_damaged_file_or_refused_before_the_work(damage, of_results):
    DAMAGES[damage](of_results)
    if answer(lambda: results.check(of_results) or "sound", "results.jsonl"):
        results.append(of_results, [{"model": "another"}])
        last = of_results.read_bytes().splitlines()[-1]
        assert json.loads(last)["model"] == "another"


@every_damage
def test_the_table_names_a_damaged_file_of_results(damage, of_results, capsys):
    DAMAGES[damage](of_results)
    code = table([str(of_results)])
    if code:
        doors.refused((code, "", capsys.readouterr().err), "results.jsonl")
    else:
        assert damage in ("empty", "a bit flipped")


# the feature cache, and the digests of images


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """A probe that has filled its cache, and what it found."""
    folder = tmp_path_factory.mktemp("probed")
    data = colours(folder / "colours", train=12, test=6)
    code, said = probes.probe(folder, data, knn__k="[1]")
    assert code == 0, said
    return folder, data, probes.results_of(folder)[0]["each"]


@few_or_slow
@pytest.mark.parametrize("file", ["rows.bin", "digests.bin", "done.bin", "about.json"])
def test_a_damaged_cache_is_made_anew_or_named(file, damage, probed, tmp_path):
    folder, data, found = probed
    shutil.copytree(folder / "features", tmp_path / "features")
    for path in sorted((tmp_path / "features").glob(f"*/{file}")):
        DAMAGES[damage](path)
    code, said = probes.probe(tmp_path, data, knn__k="[1]")
    assert "Traceback" not in said and "a fault of ours" not in said, said
    if code == 0:
        assert probes.results_of(tmp_path)[0]["each"] == found
    else:
        assert code == 1 and "cache.folder" in said.splitlines()[-1] and not (tmp_path / "results.jsonl").exists(), said


@every_damage
def test_damaged_digests_are_made_anew_or_named(damage, tmp_path):
    source = open_labelled(Labels(path=str(colours(tmp_path / "data", train=12, test=6)))).train
    digests = digests_of(source, 0, str(tmp_path / "kept"), Accelerator(cpu=True))
    (path,) = (tmp_path / "kept").glob("digests-*.npy")
    DAMAGES[damage](path)
    again = answer(lambda: digests_of(source, 0, str(tmp_path / "kept"), Accelerator(cpu=True)), path.stem)
    if damage not in ("a bit flipped", "longer") and again is not None:
        assert np.array_equal(again, digests)


# the export


@every_damage
@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "README.md"])
def test_a_damaged_export_is_named_before_it_is_published(file, damage, own):
    DAMAGES[damage](own / "export" / file)
    found = answer(lambda: read_folder(own / "export"), file, "export")
    assert not found or file == "README.md" or damage in ("a bit flipped", "longer")


@every_damage
@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_damaged_export_is_no_backbone(file, damage, own):
    DAMAGES[damage](own / "export" / file)
    model = answer(lambda: load_backbone(str(own / "export"))[0], file, "export")
    if model is not None and damage != "a bit flipped":
        assert file == "config.json" and not (own / "export" / file).is_file()  # then the weights speak for themselves


@every_damage
@pytest.mark.parametrize("file", ["model.safetensors", "pretraining.safetensors"])
def test_no_run_begins_from_a_damaged_export(file, damage, own, tmp_path):
    DAMAGES[damage](own / "export" / file)
    config, _ = pretraining.parse(options(tmp_path / "next", model__init=own / "export"))
    model = answer(lambda: build(config), file, "export")
    assert model is None or damage == "a bit flipped" or (file, damage) == ("pretraining.safetensors", "deleted")


def test_what_is_whole_is_read(own, probed, of_results, tmp_path, capsys):
    """The control case."""
    assert len(records(own / "log.jsonl")) == 3
    assert pretraining.parse([f"--config={own / 'config.yaml'}"])[0].max_steps == 3
    results.check(of_results)
    assert table([str(of_results)]) == 0
    assert read_folder(own / "export") and load_backbone(str(own / "export"))
    assert build(pretraining.parse(options(tmp_path / "next", model__init=own / "export"))[0])
    shutil.copytree(probed[0] / "features", tmp_path / "features")
    code, said = probes.probe(tmp_path, probed[1], knn__k="[1]")
    assert code == 0 and "features of" not in said, said
