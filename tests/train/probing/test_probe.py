"""probe.py from its command line to its results: every protocol, seeds, processes, resumes, leaks and mistakes."""

import io
import json
import math
import re
import signal
import time
from pathlib import Path

import datasets
import numpy as np
import probe as script
import pytest
import table
import torch
from common.probing.heads import Grid
from common.run import results
from PIL import Image
from safetensors.torch import load_file

from ..probes import probe, probe_together, results_of, start
from ..runs import said_of
from ..tunings import colours

DATA = Path(__file__).parents[4] / "shared" / "data"
PROTOCOLS = ("knn", "logistic", "dseq", "ijepa", "dinov2", "attentive", "dseq-cached", "ijepa-cached", "dinov2-cached")


def noisy(folder, labels, test_labels, same=0):
    """Parquet files of pictures of noise; the first `same` test images are training images."""
    folder.mkdir(exist_ok=True)
    draw = np.random.default_rng(0)
    made = {"train": [], "test": []}
    for split, count in (("train", len(labels)), ("test", len(test_labels))):
        for _ in range(count):
            file = io.BytesIO()
            Image.fromarray(draw.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(file, "PNG")
            made[split].append({"bytes": file.getvalue(), "path": None})
    made["test"][:same] = made["train"][:same]
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    for split, own in (("train", labels), ("test", test_labels)):
        rows = {"image": made[split], "label": own}
        datasets.Dataset.from_dict(rows, features=kinds).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_protocol_ends_in_results(protocol, data, tmp_path):
    code, said = probe(tmp_path, data, protocol=protocol, seeds="[0,1]")
    assert code == 0, said
    found = results_of(tmp_path)
    for record in found:
        assert record["protocol"] == protocol and record["classes"] == 3
        assert (record["train"]["split"], record["test"]["split"]) == ("train", "test")
        assert record["interval"][0] <= record["accuracy"] <= record["interval"][1]
        assert record["duplicates"] == {"train_test": 0, "test_test": 0}
    views = {
        "knn": ["mean", "class"],
        "logistic": ["mean", "class"],
        "attentive": ["tokens"],
        "dinov2": ["class", "class4", "class+mean", "class4+mean"],
    }
    assert {record["view"] for record in found} == set(views.get(protocol.partition("-")[0], ["mean", "mean4"]))
    assert f"{found[0]['accuracy']:.2f} %" in said
    assert not list((tmp_path / "heads").glob("*/step-*"))


def test_colours_are_read_from_random_features(data, tmp_path):
    """The classes are mean colours, which a patch embedding keeps whatever its weights."""
    for protocol in ("logistic", "dseq-cached"):
        assert probe(tmp_path, data, protocol=protocol, heads__epochs=30)[0] == 0
    assert {record["protocol"]: record["accuracy"] > 90 for record in results_of(tmp_path)} == {
        "logistic": True,
        "dseq-cached": True,
    }


def test_kandt_sweeps_and_several_seeds_of_a_subset(data, tmp_path):
    code, said = probe(
        tmp_path, data, data__subset="4-per-class", seeds="[0,1,2]", knn__k="[1,5]", knn__temperature="[0.07,1]"
    )
    assert code == 0, said
    found = [record for record in results_of(tmp_path) if record["view"] == "mean"]
    assert [(r["settings"]["k"], r["settings"]["T"]) for r in found] == [(1, 0.07), (1, 1), (5, 0.07), (5, 1)]
    for record in found:
        assert record["train"] == {"split": "train", "images": 12, "subset": "4-per-class"}
        mean = sum(record["each"]) / 3
        assert len(record["each"]) == 3 and record["accuracy"] == pytest.approx(mean)
        assert record["std"] == pytest.approx(math.sqrt(sum((x - mean) ** 2 for x in record["each"]) / 2))


def test_the_choice_can_be_made_without_the_test_images(data, tmp_path):
    for protocol in ("dinov2-cached", "dinov2"):
        code, said = probe(tmp_path, data, protocol=protocol, heads__select_on="validation", views="[mean]")
        assert code == 0, said
        assert results_of(tmp_path)[-1]["settings"]["selected on"] == "10% of train"


def test_a_backbone_that_is_no_vit_and_raw_pixels(data, tmp_path):
    for model in ("resnet18", "pixels"):
        for protocol in ("knn", "dinov2-cached"):
            code, said = probe(tmp_path, data, model=model, args=None, protocol=protocol)
            assert code == 0, said
            assert {record["view"] for record in results_of(tmp_path)} == {"pooled"}


@pytest.mark.xdist_group("runs")
@pytest.mark.parametrize("protocol", ["knn", "dinov2"])
def test_bf16_runs_the_backbone_only(protocol, data, tmp_path):
    process = start(tmp_path / "run", data, protocol=protocol, precision="bf16")
    process.join(300)
    assert process.exitcode == 0, said_of(tmp_path / "run").read_text()
    assert results_of(tmp_path / "run")[0]["precision"] == "bf16"
    if protocol == "dinov2":
        assert all(tensor.dtype == torch.float32 for tensor in heads_of(tmp_path / "run").values())


def test_vtab_takes_800_images_and_chooses_on_200(tmp_path):
    labels = [i % 2 for i in range(1100)]
    data = noisy(tmp_path / "data", labels, labels[:40])
    code, said = probe(tmp_path, data, protocol="vtab", model="pixels", img_size=4, args=None)
    assert code == 0, said
    (record,) = results_of(tmp_path)
    assert record["train"]["images"] == 800 and record["settings"]["selected on"] == "200 of train"
    assert "800 images, 133 steps of 12" in said  # 2 epochs here


@pytest.mark.parametrize("protocol", ["knn", "logistic", "dseq-cached"])
def test_labels_that_say_nothing_give_chance(protocol, tmp_path):
    draw = np.random.default_rng(1)
    data = noisy(tmp_path / "data", draw.integers(0, 2, 600).tolist(), draw.integers(0, 2, 600).tolist())
    code, said = probe(tmp_path, data, protocol=protocol, views="[mean]")
    assert code == 0, said
    low, high = 50 - 4 * 100 * 0.5 / 600**0.5, 50 + 4 * 100 * 0.5 / 600**0.5  # four standard deviations
    assert all(low < record["accuracy"] < high for record in results_of(tmp_path))


@pytest.mark.parametrize("protocol", ["knn", "dseq"])
def test_test_images_among_the_training_images_are_told(protocol, tmp_path):
    data = noisy(tmp_path / "data", [i % 2 for i in range(40)], [i % 2 for i in range(20)], same=7)
    code, said = probe(tmp_path, data, protocol=protocol)
    assert code == 0, said
    assert "7 test images are also in the training images, pixel for pixel" in said
    assert all(record["duplicates"]["train_test"] == 7 for record in results_of(tmp_path))
    assert "7 test images are also in the training images" in table.tables(results_of(tmp_path))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"data__label": "cls"}, "has no column 'cls'"),
        ({"data__classes": 4}, "has 3 classes and data.classes=4"),
        ({"data__subset": "40-per-class"}, "take fewer a class"),
        ({"knn__k": "[65]"}, "knn.k=65: there are 64 training images only"),
        ({"protocol": "vtab"}, "vtab takes 1000 training images, and"),
        ({"model": "vit_tiny", "args": None}, "neither a model of timm nor a path that exists"),
        ({"views": "[sum]"}, "has no 'sum', it has mean, class"),
        ({"seeds": "[1,1]"}, "give one or more, each once"),
        ({"results": "/dev/null/results.jsonl"}, "results=/dev/null/results.jsonl cannot be written"),
        ({"results": "/dev"}, "results=/dev cannot be written (it is a folder)"),
    ],
)
def test_mistakes_end_in_one_line_before_any_feature_is_computed(settings, says, data, tmp_path):
    code, said = probe(tmp_path, data, **settings)
    assert code == 1 and says in said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "results.jsonl").exists()


def test_looking_whether_results_can_be_written_leaves_no_trace(tmp_path):
    results.check(tmp_path / "new" / "results.jsonl")
    assert not (tmp_path / "new").exists()


def test_a_misspelt_setting_is_told_with_what_was_meant(data, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        probe(tmp_path, data, knn__temprature=1)
    assert end.value.code == 2


def test_ctrl_c_is_one_line(data, tmp_path, monkeypatch):
    def interrupted(probe):
        raise KeyboardInterrupt

    monkeypatch.setitem(script.PROTOCOLS, "knn", interrupted)
    code, said = probe(tmp_path, data)
    assert code == 130 and "stopped. The same command goes on" in said and "Traceback" not in said


def heads_of(folder):
    return load_file(max((folder / "heads").glob("*/step-*/model.safetensors")))


@pytest.mark.xdist_group("runs")
@pytest.mark.parametrize(
    "protocol",
    [
        "dseq",
        "knn",
        *(pytest.param(p, marks=pytest.mark.slow) for p in ("ijepa", "dinov2", "attentive", "dseq-cached", "logistic")),
    ],
)
def test_two_processes_are_one(protocol, data, tmp_path, unused_port):
    alone, together = tmp_path / "alone", tmp_path / "together"
    process = start(alone, data, protocol=protocol)
    process.join(300)
    assert process.exitcode == 0, said_of(alone).read_text()
    codes, said = probe_together(together, data, unused_port, protocol=protocol)
    assert codes == [0, 0], said
    for one, other in zip(results_of(alone), results_of(together), strict=True):
        assert one["each"] == other["each"] and one["settings"] == other["settings"]
    if protocol in ("knn", "logistic"):
        return  # no heads
    ours, theirs = heads_of(together), heads_of(alone)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-5, msg=name)
    code, said = probe(together, data, protocol=protocol)
    assert code == 0 and "trained before" in said  # by two processes, and kept for one


@pytest.mark.xdist_group("runs")
@pytest.mark.parametrize("protocol", ["dseq", "dinov2-cached"])
def test_a_probe_that_was_killed_ends_with_the_same_heads(protocol, data, tmp_path):
    settings = {"protocol": protocol, "heads__epochs": 15, "heads__checkpoint_every": 10}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(whole, data, **settings)
    process.join(300)
    assert process.exitcode == 0, said_of(whole).read_text()
    process = start(killed, data, **settings)
    while not list(killed.glob("heads/*/step-*")) and process.is_alive():
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    process = start(killed, data, **settings)
    process.join(300)
    assert process.exitcode == 0 and "going on after step" in said_of(killed).read_text()
    ours, theirs = heads_of(killed), heads_of(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [r["each"] for r in results_of(killed)] == [r["each"] for r in results_of(whole)]


def count_steps(monkeypatch) -> list[int]:
    """A list that grows with every training step of heads."""
    steps, step = [], Grid.step

    def counted(self, *arguments):
        steps.append(1)
        return step(self, *arguments)

    monkeypatch.setattr(Grid, "step", counted)
    return steps


@pytest.mark.parametrize("protocol", ["dseq", "ijepa", "dinov2", "attentive", "dinov2-cached", "vtab"])
def test_a_finished_probe_is_not_trained_again(protocol, data, tmp_path, monkeypatch):
    settings = {"protocol": protocol, "seeds": "[0,1]"}
    if protocol == "vtab":
        data = noisy(tmp_path / "data", [i % 2 for i in range(1000)], [0, 1])
        settings |= {"model": "pixels", "img_size": 4, "args": None}
    code, said = probe(tmp_path, data, **settings)
    assert code == 0, said
    lines, answers = (tmp_path / "results.jsonl").read_text(), said.splitlines()[-len(results_of(tmp_path)) :]
    steps = count_steps(monkeypatch)
    code, said = probe(tmp_path, data, **settings)
    assert code == 0 and said.splitlines()[-len(answers) :] == answers
    assert not steps
    assert (tmp_path / "results.jsonl").read_text() == lines
    assert probe(tmp_path, data, **{**settings, "results": tmp_path / "others.jsonl"})[0] == 0 and not steps
    others = (json.loads(line) for line in (tmp_path / "others.jsonl").read_text().splitlines())
    assert [one["each"] for one in others] == [one["each"] for one in results_of(tmp_path)]


def test_a_second_seed_leaves_the_first_ones_heads(data, tmp_path, monkeypatch):
    assert probe(tmp_path, data, protocol="dseq-cached")[0] == 0
    steps = count_steps(monkeypatch)
    assert probe(tmp_path, data, protocol="dseq-cached", seeds="[0,1]")[0] == 0
    assert len(steps) == 11  # 2 epochs of 64 images, 12 at a time, of seed 1 only
    alone, both = results_of(tmp_path)[0], results_of(tmp_path)[2]
    assert both["each"][0] == alone["each"][0] and len(results_of(tmp_path)) == 4


def test_other_settings_weights_images_or_labels_are_trained_anew(data, tmp_path, monkeypatch):
    steps = count_steps(monkeypatch)
    listed = tmp_path / "listed.txt"
    listed.write_text("\n".join(map(str, range(30))))
    more = colours(tmp_path / "more", test=27)
    shuffled = colours(tmp_path / "shuffled", shuffled=True)
    for changes in (
        {},
        {"heads__epochs": 3},
        {"heads__batch_size": 16},
        {"heads__select_on": "validation"},
        {"seeds": "[1]"},
        {"views": "[mean]"},
        {"cache__dtype": "float16"},
        {"args": '{"patch_size": 8, "depth": 5, "embed_dim": 48, "num_heads": 4}'},
        {"data__path": shuffled},
        {"data__path": more},
        {"data__subset": listed},
    ):
        before = len(steps)
        code, said = probe(tmp_path, data, protocol="dseq-cached", **changes)
        assert code == 0, said
        assert len(steps) > before, changes
    before = len(steps)
    listed.write_text("\n".join(map(str, range(30, 60))))
    assert probe(tmp_path, data, protocol="dseq-cached", data__subset=listed)[0] == 0
    assert len(steps) > before
    assert not list((tmp_path / "heads").glob("*/step-*"))  # the heads themselves are large, and gone


def test_the_interval_is_a_bootstrap_of_the_images():
    answers = torch.zeros(400).double()
    answers[:300] = 1
    low, high = results.interval(answers)
    expected = 1.96 * math.sqrt(0.75 * 0.25 / 400)  # of a binomial share
    assert low == pytest.approx(0.75 - expected, abs=0.006) and high == pytest.approx(0.75 + expected, abs=0.006)
    found = results.summary([answers > 0, answers < 0.5])
    assert found["accuracy"] == 50 and found["interval"] == [50, 50]  # every image is right once of twice


@pytest.mark.slow
def test_heads_go_on_from_no_checkpoint_of_other_rows(data, tmp_path):
    listed = tmp_path / "listed.txt"
    changes = {"protocol": "dseq-cached", "data__subset": listed, "heads__checkpoint_every": 2, "heads__epochs": 40}
    listed.write_text("\n".join(map(str, range(30))))
    process = start(tmp_path / "a", data, **changes)
    while not list((tmp_path / "a" / "heads").glob("*/step-*")):
        assert process.is_alive(), said_of(tmp_path / "a").read_text()
        time.sleep(0.02)
    process.kill()
    process.join()
    listed.write_text("\n".join(map(str, range(30, 60))))
    code, said = probe(tmp_path / "a", data, **changes)
    assert code == 0 and "going on after" not in said, said
    assert probe(tmp_path / "b", data, **changes)[0] == 0
    assert results_of(tmp_path / "a")[0]["each"] == results_of(tmp_path / "b")[0]["each"]


def test_results_of_several_files_become_tables_beside_the_papers(tmp_path):
    def record(**changes):
        shared = {"model": "m", "parameters": 85.8e6, "img_size": [224, 224], "weights": "w", "data": "cub"}
        shared |= {"label": "label", "classes": 200, "train": {"split": "train", "images": 5994, "subset": None}}
        shared |= {"test": {"split": "test", "images": 5794}, "protocol": "dseq", "view": "mean4", "settings": {}}
        shared |= {"duplicates": {"train_test": 0}, "accuracy": 60.0, "std": 0.5, "interval": [59, 61], "each": [1, 2]}
        shared |= {"seeds": [0, 1], "precision": "no"}
        return {**shared, **changes}

    results.append(tmp_path / "a.jsonl", [record(), record(accuracy=66.0)])
    results.append(tmp_path / "b.jsonl", [record(protocol="dseq-cached", accuracy=70.0)])
    results.append(tmp_path / "b.jsonl", [record(precision="bf16", accuracy=67.0), record(seeds=[0], accuracy=68.0)])
    less = {"split": "train", "images": 50, "subset": None}
    results.append(tmp_path / "b.jsonl", [record(train=less, accuracy=20.0, settings={"C": [0.03162277, 1.0]})])
    others = [record(data="corrupted", data_digest=digest, accuracy=30.0 + at) for at, digest in enumerate("ab")]
    results.append(tmp_path / "c.jsonl", others)
    assert {"30.00", "31.00"} <= set(re.findall(r"\d\d\.\d\d", table.tables(results.read([tmp_path / "c.jsonl"]))))
    text = table.tables(results.read([tmp_path / "a.jsonl", tmp_path / "b.jsonl"]))
    few, live, cached = text.split("### cub, dseq")[1:]  # a smaller data set of the same name stands apart
    live, cached = "### cub, dseq" + live, cached.removeprefix("-cached")
    assert "learnt from 50 images" in few and "| C 0.03162 / 1 |" in few and "66.00" not in few
    assert "| 67.00 ± 0.50 | 59.00–61.00 | 2 | bf16 |" in live and "| 68.00 " in live  # neither replaces the other
    assert "### cub, dseq\n" in live and "| m (85.8 M) | 224 | mean4 | 66.00 ± 0.50 | 59.00–61.00 | 2 |  |" in live
    assert "60.00" not in text  # an older result of the same
    assert "| DSeq-JEPA, vit_b16 (paper) | 224 |  | 66.2 |" in live and "(paper)" not in cached
    assert "| DSeq-JEPA, vit_h16_448 (paper) | 448 |  | 68.9 |" in live


@pytest.mark.parametrize("text", ['{"hello": 1}', "[1, 2]", "{", "\x80"])
def test_a_table_of_what_is_no_result_says_where(text, tmp_path, capsys):
    (tmp_path / "log.jsonl").write_bytes(text.encode("latin1"))
    assert table.main([str(tmp_path / "log.jsonl")]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "log.jsonl" in said


@pytest.mark.parametrize("name, count", [("stanford_cars128", 3)])
@pytest.mark.slow
def test_duplicates_of_a_real_data_set(name, count, tmp_path):
    if not (DATA / name).is_dir():
        pytest.skip("no shared data")
    code, said = probe(tmp_path, DATA / name, model="pixels", img_size=8, args=None)
    assert code == 0 and f"{count} test images are also in the training images, pixel for pixel" in said
    assert json.dumps(results_of(tmp_path)[0]["duplicates"])


def test_probes_of_other_lengths_batches_and_stored_numbers_are_other_rows(tmp_path, data):
    changes = [{}, {"heads__epochs": 3}, {"heads__batch_size": 16}, {"cache__dtype": "float16"}]
    for change in changes:
        code, said = probe(tmp_path, data, protocol="dseq-cached", views="[mean]", **change)
        assert code == 0, said
    assert probe(tmp_path, data, protocol="knn", views="[mean]", cache__dtype="float16")[0] == 0
    found = results.read([tmp_path / "results.jsonl"])
    assert len({results.chosen(record) for record in found[:-1]}) == len(changes)
    assert found[-1]["settings"].keys() == {"k", "T"}  # nothing but what is told already
