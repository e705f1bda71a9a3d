"""Segmentation runs: killed ones and dealt ones end alike, what they leave is tested again, mistakes are one line."""

import json
import shutil
from types import SimpleNamespace

import pytest
import table
import timm
import torch
from common.segmenting.export import load
from common.segmenting.settings import parse
from PIL import Image
from safetensors.torch import load_file, save_file
from segment import main as segment_main

from ..runs import assert_same_export, assert_same_run, log_of, tensors_of, wait_for_steps
from ..segmentings import options, patches, segment, start

pytestmark = pytest.mark.xdist_group("segmentings")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return patches(tmp_path_factory.mktemp("data") / "patches")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run that nobody disturbed."""
    output = tmp_path_factory.mktemp("whole") / "run"
    codes, said = segment(output, data, eval_every=15)
    assert codes == [0], said
    return SimpleNamespace(output=output, said=said)


@pytest.fixture(scope="module")
def linear(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("linear") / "run"
    codes, said = segment(output, data, head="linear4", channels=None, optim__lr=0.03)
    assert codes == [0], said
    return SimpleNamespace(output=output, said=said)


def records(output):
    lines = (output.parent / "results.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("time", "versions")} for line in lines]


def test_a_run_learns_and_leaves_its_result_and_its_report(whole):
    log = log_of(whole.output)
    assert [line["step"] for line in log] == list(range(1, 41))
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
    assert [line["step"] for line in log if "mIoU" in line] == [15, 30]
    assert all(0 < line["auxiliary loss"] < line["loss"] for line in log)
    (record,) = records(whole.output)
    low, high = record["interval"]
    assert record["metric"] == "mIoU" and low <= record["value"] <= high and record["value"] > 40
    assert list(record["iou"]) == ["3", "7", "200"]
    assert record["value"] == pytest.approx(sum(record["iou"].values()) / 3)
    assert record["duplicates"] == {"train_test": 0} and record["pixel_accuracy"] > record["value"]
    page = (whole.output / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 4 and "<figcaption>mIoU</figcaption>" in page


def test_what_a_run_exported_gives_the_same_figures_when_it_is_tested_again(whole, data, tmp_path, capsys):
    from segment import main

    again = tmp_path / "results.jsonl"
    assert main(["--evaluate", str(whole.output), f"--results={again}"]) == 0
    assert records(again) == records(whole.output)
    assert main([f"--evaluate={whole.output}", f"--results={again}", "--data.test=train"]) == 0
    assert records(again)[1]["duplicates"]["train_test"] == 8
    assert load(whole.output / "export")[1].classes.ids == (3, 7, 200)
    assert main([f"--evaluate={whole.output / 'export'}", f"--results={again}"]) == 0
    assert len(records(again)) == 2  # the same as the first
    alone = shutil.copytree(whole.output / "export", tmp_path / "alone")
    words = ["--model=test_vit", f"--data={data}", "--img_size=32", "--data.ignore=[255]", "--workers=0"]
    assert main([f"--evaluate={alone}", f"--results={again}", *words]) == 0
    assert records(again)[2]["settings"] == {"training": "not known", "channels": 16}


def test_a_linear_head_leaves_the_backbone_as_it_was_and_says_of_what_it_is(linear):
    exported = load_file(linear.output / "export" / "model.safetensors")
    torch.manual_seed(0)
    backbone = timm.create_model("test_vit", num_classes=0, img_size=None)
    moved = [name for name, tensor in backbone.state_dict().items() if name.startswith("blocks")]
    assert moved
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(exported[f"backbone.vit.{name}"], tensor), name
    assert exported["head.norm.running_mean"].shape == (4 * 64,)
    (record,) = records(linear.output)
    assert record["protocol"] == "linear4" and record["view"] == "last 4 maps" and record["value"] > 40
    assert not [name for name in tensors_of(linear.output) if name.startswith("optimizer") and "backbone" in name]


def test_killed_runs_end_bit_for_bit_like_the_whole_one(whole, data, tmp_path):
    output = tmp_path / "run"
    for lines in (8, 23):
        process = start(output, data, eval_every=15)
        wait_for_steps(process, output, lines)
        process.kill()
        process.join()
    codes, said = segment(output, data, eval_every=15)
    assert codes == [0] and "going on after step" in said, said
    assert_same_run(output, whole.output)
    assert_same_export(output, whole.output)
    assert records(output) == records(whole.output)


def test_other_settings_masks_and_test_images_are_other_rows(data, tmp_path):
    copy = shutil.copytree(data, tmp_path / "copy" / data.name)  # of the same name
    mask = copy / "masks" / "val" / "0.png"
    Image.open(mask).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(mask)
    few = {"optim__epochs": 2, "head": "linear", "channels": None, "optim__layer_decay": None}
    changes = [
        {},
        {"optim__weight_decay": 0.2},
        {"optim__schedule": "cosine"},
        {"augment__flip": 0},
        {"augment__scale": "[1,1]"},
        {"stride": 5},
        {"args": '{"drop_rate": 0.0}'},
    ]
    for number, change in enumerate(changes):
        codes, said = segment(tmp_path / f"{number}", data, **{**few, **change})
        assert codes == [0], said
    for place in (data, copy):
        again = [f"--evaluate={tmp_path / '0'}", f"--results={tmp_path / 'results.jsonl'}", f"--data.path={place}"]
        assert segment_main(again) == 0
    found = records(tmp_path / "0")
    assert len(found) == len(changes) + 1 and len({record["test"]["digest"] for record in found}) == 2
    said = table.tables(found)
    assert said.count("### ") == 2 and said.count("| test_vit, random ") == len(changes) + 1


@pytest.mark.slow
@pytest.mark.parametrize("head", ["upernet", "linear"])
def test_two_processes_equal_one(head, data, tmp_path, unused_port):
    """Beyond the first steps AdamW enlarges what float32 rounds: weights before a batch norm have tiny gradients."""
    settings = {"head": head, "channels": 16 if head == "upernet" else None, "optim__lr": 1e-4, "eval_every": 15}
    for processes in (1, 2):
        codes, said = segment(tmp_path / f"{processes}" / "run", data, processes, unused_port, **settings)
        assert codes == [0] * processes, said
    ours, theirs = (tmp_path / name / "run" for name in "21")
    for line, other in zip(log_of(ours), log_of(theirs), strict=True):
        first = line["step"] < 3
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-6 if first else 1e-3), line["step"]
        assert not first or line["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-5)
        assert line.get("mIoU", 0) == pytest.approx(other.get("mIoU", 0), abs=0.5)
    assert records(ours)[0]["value"] == pytest.approx(records(theirs)[0]["value"], abs=0.5)


@pytest.mark.slow
def test_accumulation_changes_nothing_of_a_linear_head_but_its_batch_statistics(data, tmp_path):
    """The loss is a sum over images; batch norm sees the images of a round."""
    for rounds in (1, 2):
        codes, said = segment(
            tmp_path / f"{rounds}" / "run", data, head="linear", channels=None, optim__accumulation=rounds
        )
        assert codes == [0], said
    one, two = (log_of(tmp_path / name / "run") for name in "12")
    assert [line["samples"] for line in one] == [line["samples"] for line in two]
    assert one[-1]["loss"] == pytest.approx(two[-1]["loss"], rel=0.2)


def test_bf16_trains_and_the_same_command_goes_on(data, tmp_path):
    for steps in (2, 4):
        codes, said = segment(tmp_path / "run", data, system__precision="bf16", max_steps=steps)
        assert codes == [0] and f"stopped after step {steps} and saved" in said, said
    assert "going on after step 2" in said and log_of(tmp_path / "run")[-1]["loss"] < 3


def test_a_dry_run_says_how_long_it_takes_and_writes_nothing(data, tmp_path):
    codes, said = segment(tmp_path / "run", data, dry_run="true")
    assert codes == [0] and "the whole run of 40 steps would take about" in said
    assert not (tmp_path / "run").exists() and not (tmp_path / "results.jsonl").exists()


@pytest.mark.parametrize("head", ["upernet", "linear"])
def test_a_short_run_has_a_short_warm_up_and_one_that_was_asked_for_is_refused(head, data, tmp_path, capsys):
    few = {"head": head, "channels": None, "optim__epochs": 1, "optim__warmup_epochs": None, "optim__layer_decay": None}
    codes, said = segment(tmp_path / "run", data, **few)
    assert codes == [0] and "optim.warmup_epochs is 0.05, a twentieth of the run\n" in said, said
    (record,) = records(tmp_path / "run")
    assert record["settings"]["warmup_epochs"] == 0.05 and log_of(tmp_path / "run")[-1]["lr"] > 0
    assert segment_main([f"--evaluate={tmp_path / 'run'}", f"--results={tmp_path / 'results.jsonl'}"]) == 0
    assert records(tmp_path / "run") == [record]
    assert segment_main(options(tmp_path / "other", data, **{**few, "optim__warmup_epochs": 2})) == 1
    assert "optim.warmup_epochs=2 leaves nothing of optim.epochs=1" in capsys.readouterr().err


def test_the_recipes_are_the_published_ones_in_epochs():
    upernet = parse(["--model=x", "--data=ade20k"])[0]
    steps = [round(epochs * 20_210 / 16) for epochs in (upernet.optim.epochs, upernet.optim.warmup_epochs)]
    assert steps == [pytest.approx(160_000, abs=5), pytest.approx(1500, abs=5)]
    assert (upernet.optim.lr, upernet.optim.weight_decay, upernet.optim.batch_size) == (1e-4, 0.05, 16)
    assert (upernet.img_size, upernet.stride, upernet.channels, upernet.optim.schedule) == (512, 341, 512, "linear")
    linear = parse(["--model=x", "--data=ade20k", "--head=linear", "--optim.lr=0.01"])[0].optim
    assert round(linear.epochs * 20_210 / 16) == pytest.approx(40_000, abs=5)
    assert (linear.lr, linear.weight_decay, linear.drop_path, linear.clip) == (0.01, 1e-4, 0, None)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model": "test_resnet"}, "is no plain ViT"),
        ({"model": "vit_tinny"}, "model vit_tinny is neither a model of timm nor a path"),
        ({"data__path": "/nowhere"}, "/nowhere does not exist"),
        ({"data__classes": 4}, "has 3 classes and data.classes=4"),
        ({"optim__batch_size": 16}, "is more than the 8 images of the data set"),
        ({"optim__batch_size": 4, "optim__accumulation": 4}, "head=upernet has batch norms"),
        ({"stride": 33}, "stride=33 would leave pixels between windows of 32"),
        ({"augment__scale": "[2,1]"}, "augment.scale=2, 1: give the lesser factor first"),
        ({"head": "linear", "optim__drop_path": 0.1}, "head=linear leaves the backbone as it is"),
        ({"args": '{"img_size": 3}'}, "args.img_size is no argument of a model"),
        ({"evaluate": "/nowhere"}, "holds no segmenter"),
        ({"results": "{file}/results.jsonl"}, "cannot be written"),
    ],
)
def test_what_cannot_be_run_is_one_line_before_the_first_step(settings, says, data, tmp_path, capsys):
    from segment import main

    (tmp_path / "file").write_text("")
    settings = {name: str(value).replace("{file}", str(tmp_path / "file")) for name, value in settings.items()}
    assert main(options(tmp_path / "run", data, **settings)) == 1
    said = capsys.readouterr()
    assert says in said.err and len(said.err.splitlines()) == 1 and said.err.startswith("segment.py: ")
    assert "loss" not in said.out


def spoil(what, config, weights):
    content, tensors = json.loads(config.read_text()), load_file(weights)
    if what == "foreign config":
        content = {"architecture": "vit_base_patch16_224"}
    elif what == "unknown model":
        content["architecture"] = "hf-hub:somebody/something"
    elif what == "great model":
        content["model_args"] = {"depth": 10**9}
    elif what == "other head":
        content["head"] = "linear"
    elif what == "cut off":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif what == "lacking":
        tensors.pop("head.classify.bias")
        save_file(tensors, weights)
    config.write_text("{" if what == "no JSON" else json.dumps(content))


@pytest.mark.parametrize(
    "what", ["foreign config", "unknown model", "great model", "other head", "cut off", "lacking", "no JSON"]
)
def test_an_export_that_was_spoilt_is_refused_in_one_line(what, whole, tmp_path, capsys):
    from segment import main

    folder = tmp_path / "export"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((whole.output / "export" / name).read_bytes())
    spoil(what, folder / "config.json", folder / "model.safetensors")
    assert main([*options(tmp_path / "run", tmp_path), f"--evaluate={folder}"]) == 1
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "fault of ours" not in said and str(folder) in said
