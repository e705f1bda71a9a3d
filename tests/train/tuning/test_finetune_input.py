"""What fine-tuning is given: backbones of every kind, and mistakes that are one line before anything long begins."""

import os
import shutil
import signal
import time

import datasets
import pytest
import table
import timm
import torch
from common.run import results
from common.run.results import changed
from common.tuning.export import LEFT_OUT
from common.tuning.settings import RECIPES, parse
from safetensors.torch import load_file

from ..runs import said_of, tensors_of
from ..tunings import NAMES, colours, options, start, tune

pytestmark = pytest.mark.xdist_group("tunings")


@pytest.fixture(scope="module")
def convolutions(data, tmp_path_factory):
    """A fine-tuned ConvNet, in bf16."""
    output = tmp_path_factory.mktemp("convolutions") / "run"
    settings = {"model": "test_resnet", "system__precision": "bf16", "optim__drop_path": 0, "optim__epochs": 1}
    code, said = tune(output, data, **settings)
    assert code == 0, said
    return output, said


def test_a_backbone_that_is_no_vit_is_exported_too(convolutions):
    output, said = convolutions
    model = timm.create_model(f"local-dir:{output / 'export'}", pretrained=True)
    weights = load_file(output / "export" / "model.safetensors")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert model.pretrained_cfg["label_names"] == NAMES and model.pretrained_cfg["input_size"] == [3, 32, 32]
    assert "finetune-mae" in said


def test_a_finished_run_adds_its_result_once_and_exports_again(convolutions, data):
    output, _ = convolutions
    lines = (output.parent / "results.jsonl").read_text()
    assert len(lines.splitlines()) == 1
    settings = {"model": "test_resnet", "system__precision": "bf16", "optim__drop_path": 0, "optim__epochs": 1}
    code, again = tune(output, data, **settings)
    assert code == 0 and "going on after step 8" in again
    assert (output.parent / "results.jsonl").read_text() == lines


def test_a_run_starts_from_the_weights_of_a_folder(convolutions, data, tmp_path):
    """The warm-up begins at 0, so the first step moves nothing but statistics."""
    folder = convolutions[0] / "export"
    settings = {"model": folder, "random": None, "optim__drop_path": 0, "max_steps": 1}
    code, said = tune(tmp_path / "run", data, **settings)
    assert code == 0, said
    assert "stopped after step 1 and saved" in said and not (tmp_path / "run" / "export").exists()
    before, after = load_file(folder / "model.safetensors"), tensors_of(tmp_path / "run" / "seed-0")
    same = [name for name in before if torch.equal(before[name], after[f"model: model.{name}"])]
    moved = {name for name in before if name not in same}
    assert all(name.startswith("fc.") or "running_" in name or "num_batches" in name for name in moved), moved
    assert "fc.weight" in moved


def test_dry_run_writes_nothing_and_tells_the_time(data, tmp_path):
    code, said = tune(tmp_path / "run", data, dry_run="true", model="test_resnet", optim__drop_path=0)
    assert code == 0, said
    assert "dry run:" in said and "the whole run of 20 steps" in said
    assert not (tmp_path / "run").exists()


def test_test_images_that_are_trained_on_are_counted_in_the_card_and_in_the_results(tmp_path):
    data = colours(tmp_path / "colours")
    both = {split: datasets.Dataset.from_parquet(str(data / f"{split}.parquet")) for split in ("train", "test")}
    datasets.concatenate_datasets([both["test"], both["train"].select([3, 9])]).to_parquet(data / "test.parquet")
    settings = {"model": "test_resnet", "optim__drop_path": 0, "optim__epochs": 0.25, "optim__warmup_epochs": 0}
    code, said = tune(tmp_path / "run", data, **settings)
    assert code == 0, said
    assert "2 test images are also in the training images, pixel for pixel" in said
    assert "2 of the test images are also trained on" in (tmp_path / "run" / "export" / "README.md").read_text()
    assert '"duplicates": {"train_test": 2, "test_test": 0}' in (tmp_path / "results.jsonl").read_text()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model": "pixels"}, "model=raw pixels, random has no weights to train"),
        ({"model": "vit_tinny"}, "model vit_tinny is neither a model of timm nor a path"),
        ({"data__label": "kind"}, "has no column 'kind'"),
        ({"data__classes": 4}, "has 3 classes and data.classes=4"),
        ({"data__subset": "30-per-class"}, "has 22 images only"),
        ({"optim__batch_size": 7}, "optim.batch_size=7 is no multiple"),
        ({"output_dir": "{file}/run"}, "cannot be written"),
    ],
)
def test_what_cannot_be_trained_is_one_line_before_the_first_step(settings, says, data, tmp_path, capsys):
    from finetune import main

    (tmp_path / "file").write_text("")
    settings = {name: str(value).replace("{file}", str(tmp_path / "file")) for name, value in settings.items()}
    assert main(options(tmp_path / "run", data, **settings)) == 1
    said = capsys.readouterr()
    assert says in said.err
    assert said.err.splitlines()[-1].startswith("finetune.py: ")
    assert "loss" not in said.out


def test_an_image_that_cannot_be_read_is_named_before_the_first_step(tmp_path, capsys):
    from finetune import main

    data = colours(tmp_path / "colours")
    rows = datasets.Dataset.from_parquet(str(data / "train.parquet")).cast_column("image", datasets.Image(decode=False))
    broken = [{**row, "image": {"bytes": b"no image", "path": None}} if i == 40 else row for i, row in enumerate(rows)]
    kinds = datasets.Dataset.from_parquet(str(data / "test.parquet")).features
    datasets.Dataset.from_list(broken, features=kinds).to_parquet(data / "train.parquet")
    assert main(options(tmp_path / "run", data)) == 1
    said = capsys.readouterr()
    assert "row 40: UnidentifiedImageError" in said.err and "loss" not in said.out


def test_a_signal_before_the_first_step_ends_with_one_line_and_75(tmp_path):
    """While the digests of all images are computed."""
    output = tmp_path / "run"
    process = start(output, colours(tmp_path / "data", train=600))
    while "looking for duplicates: 600" not in (said_of(output).read_text() if said_of(output).exists() else ""):
        assert process.is_alive()
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    said = said_of(output).read_text()
    assert process.exitcode == 75 and "Traceback" not in said, said
    assert said.splitlines()[-1] == "finetune.py: stopped amid its preparations: the same command goes on."


def test_a_setting_that_changes_the_run_is_refused_by_name_when_it_goes_on(convolutions, data):
    settings = {"model": "test_resnet", "system__precision": "bf16", "optim__drop_path": 0, "optim__epochs": 1}
    code, said = tune(convolutions[0], data, **settings, optim__layer_decay=0.5)
    assert code == 1
    assert "optim.layer_decay was 0.65" in said and "Traceback" not in said


def test_other_labels_of_the_same_images_are_other_data(tmp_path):
    path = colours(tmp_path / "colours")
    code, said = tune(tmp_path / "run", path, max_steps=4)
    assert code == 0, said
    colours(path, shuffled=True)
    code, said = tune(tmp_path / "run", path, max_steps=6)
    assert code == 1 and "data.path holds other images or labels than when" in said, said


def test_a_result_tells_every_setting_that_is_not_the_recipes(tmp_path):
    config, _ = parse(
        [*options(tmp_path / "run", tmp_path, augment__mixup=0.1, optim__weight_decay=0.3, args='{"depth": 2}')]
    )
    found = changed([config.augment, config.optim], RECIPES["mae"], LEFT_OUT, config.args)
    assert (found["mixup"], found["weight_decay"], found["args"]) == (0.1, 0.3, '{"depth": 2}')
    assert "cutmix" not in found and "betas" not in found
    ijepa, _ = parse([*options(tmp_path / "run", tmp_path, optim__warmup_epochs=None), "--recipe=ijepa"])
    assert "mixup" not in changed([ijepa.augment, ijepa.optim], RECIPES["ijepa"], LEFT_OUT, ijepa.args)


def test_rounds_may_change_unless_the_images_of_a_round_are_mixed(tmp_path):
    path = colours(tmp_path / "colours")
    for model, code in (("dseq_jepa_vit_ti16", 0), ("test_resnet", 1)):
        settings = {"model": model, "optim__drop_path": 0}
        assert tune(tmp_path / model, path, max_steps=2, **settings)[0] == 0
        found, said = tune(tmp_path / model, path, max_steps=4, optim__accumulation=2, **settings)
        assert found == code and ("optim.accumulation was 1" in said) == bool(code), said


def test_results_on_other_test_images_of_the_same_number_are_another_table(tmp_path):
    path, other = colours(tmp_path / "colours"), colours(tmp_path / "others", train=63)
    for run in "ab":
        code, said = tune(tmp_path / run, path, optim__epochs=1)
        assert code == 0, said
        shutil.copy(other / "test.parquet", path)
    one, two = found = results.read([tmp_path / "results.jsonl"])
    assert one["data_digest"] == two["data_digest"] and one["test"]["images"] == two["test"]["images"]
    assert one["test"]["digest"] != two["test"]["digest"] and table.tables(found).count("### ") == 2
