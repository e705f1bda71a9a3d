"""train/detect.py from its command line to its results: killed runs, dealt ones, what it ends in, and mistakes."""

import json
import random
import time

import pytest
import torch
from common.detecting.export import detect as search
from common.detecting.export import load_detector
from PIL import Image

from timm_dseq import UserError

from ..detections import options, start, train, train_together
from ..runs import assert_same_export, assert_same_run, killed_until_it_ends, log_of, tensors_of
from .annotations import coco_folder, parquet_folder

pytestmark = pytest.mark.xdist_group("detections")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody disturbed, and how long it took."""
    train(tmp_path_factory.mktemp("first") / "run", max_steps=1)  # the first one waits for imports
    output = tmp_path_factory.mktemp("whole") / "run"
    begun = time.monotonic()
    code, said = train(output, eval_every=4)
    assert code == 0, said
    return output, said, time.monotonic() - begun


def test_a_run_says_what_it_reads_and_trains_and_learns(whole):
    output, said, _ = whole
    log = log_of(output)
    assert "8 images of train, 28 objects of 6 classes, with masks" in said
    assert "Mask R-CNN, dseq pyramid: dseq_jepa_vit_ti16, random on scenes, 10 steps of 4 images" in said
    assert [line["step"] for line in log if "box_ap" in line] == [4, 8]
    parts = ("objectness", "rpn_box_reg", "classifier", "box_reg", "mask")
    assert all(line["loss"] == pytest.approx(sum(line[part] for part in parts), rel=1e-5) for line in log)
    assert sum(line["loss"] for line in log[-3:]) < sum(line["loss"] for line in log[:3])


def test_it_ends_in_records_for_boxes_and_masks(whole):
    boxes, masks = map(json.loads, (whole[0].parent / "results.jsonl").read_text().splitlines())
    assert (boxes["metric"], masks["metric"]) == ("box AP", "mask AP")
    assert (boxes["protocol"], boxes["data"]) == ("mask-rcnn", "scenes")
    digests = [boxes[part].pop("digest") for part in ("train", "test")]
    assert boxes["train"] == {"split": "train", "images": 8, "subset": None} and boxes["classes"] == 6
    assert len({*digests}) == 2
    own = {"samples": 16, "channels": 16, "scale": [0.5, 1.5], "args": '{"depth": 4}', "warmup_epochs": 1}
    assert own.items() <= boxes["settings"].items() and "weight_decay" not in boxes["settings"]
    assert 0 <= boxes["value"] <= 100
    assert boxes["duplicates"] == masks["duplicates"] == {"train_test": 0}


def test_the_report_shows_curves_the_truth_and_the_settings(whole):
    page = (whole[0] / "report.html").read_text()
    assert page.count("<figcaption>row ") == 8 and page.count("data:image/jpeg;base64,") == 8
    for words in ("AP</fig", "Loss</fig", "box ap50", "objectness:", "<th>mask</th>", "data:\n  path: scenes"):
        assert words in page, words
    assert "http" not in page.replace("http://www.w3.org", "")


def test_the_export_finds_what_the_trained_model_finds(whole, capsys):
    """By its weights, and by --evaluate, which gives the run's own figures."""
    from detect import main

    detector, config = load_detector(whole[0])
    saved = tensors_of(whole[0])
    assert all(torch.equal(tensor, saved[f"model: {name}"]) for name, tensor in detector.state_dict().items())
    assert config["names"][0] == "disc" and config["masks"] is True
    assert main(["--data=scenes", "--data.limit=8", f"--evaluate={whole[0]}", "--workers=0"]) == 0
    said = dict(line.split() for line in capsys.readouterr().out.splitlines() if "_ap" in line)
    boxes, masks = map(json.loads, (whole[0].parent / "results.jsonl").read_text().splitlines())
    assert float(said["box_ap"]) == pytest.approx(boxes["value"], abs=0.006)
    assert float(said["mask_ap"]) == pytest.approx(masks["value"], abs=0.006)


def test_one_function_finds_objects_in_a_file(whole, tmp_path):
    Image.effect_noise((90, 70), 90).convert("RGB").save(tmp_path / "x.png")
    detector, _ = load_detector(whole[0] / "export")
    detector.rcnn.roi_heads.score_thresh = 0.0
    found = search(detector, str(tmp_path / "x.png"))
    assert found["masks"].shape[1:] == (70, 90) and found["masks"].dtype == torch.bool
    assert len(found["boxes"]) == len(found["labels"]) == len(found["scores"]) > 0
    assert found["labels"].min() >= 0 and found["labels"].max() < 6
    assert (found["scores"].diff() <= 0).all()


@pytest.mark.parametrize("damage", ["config", "weights", "shape", "kind", "elsewhere", "a path"])
def test_a_damaged_export_is_one_line(damage, whole, tmp_path):
    folder = tmp_path / "export"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((whole[0] / "export" / name).read_bytes())
    config = json.loads((folder / "config.json").read_text())
    if damage == "weights":
        (folder / "model.safetensors").write_bytes(b"no weights")
    else:
        changes = {"config": {"names": 5}, "shape": {"channels": 24}, "kind": {"kind": "else"}}
        changes |= {"elsewhere": {"architecture": "hf-hub:x/y"}, "a path": {"model_args": {"checkpoint_path": "/x"}}}
        (folder / "config.json").write_text(json.dumps({**config, **changes[damage]}))
    with pytest.raises(UserError) as error:
        load_detector(folder)
    assert "\n" not in str(error.value)


def test_a_killed_run_ends_bit_for_bit_like_the_whole_one(whole, tmp_path):
    output = tmp_path / "run"
    assert killed_until_it_ends(lambda: start(output, eval_every=4), random.Random(1), 0.4 * whole[2], whole[2])
    assert_same_run(output, whole[0])
    assert_same_export(output, whole[0])


@pytest.mark.slow
@pytest.mark.parametrize("way", ["two processes", "two rounds", "checkpointing", "workers"])
def test_how_a_batch_is_dealt_changes_nothing(way, whole, tmp_path, unused_port):
    output = tmp_path / "run"
    if way == "two processes":
        codes, said = train_together(output, unused_port, eval_every=4)
        assert codes == [0, 0], said
    else:
        settings = {"two rounds": {"optim__accumulation": 2}, "checkpointing": {"system__checkpointing": "true"}}
        code, said = train(output, eval_every=4, **settings.get(way, {"workers": 2}))
        assert code == 0, said
    for line, other in zip(log_of(output), log_of(whole[0]), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-3), line["step"]
        assert line.get("box_ap", 0) == pytest.approx(other.get("box_ap", 0), abs=0.01)
    ours, theirs = tensors_of(output), tensors_of(whole[0])
    for name in theirs:
        if name.startswith("model: "):
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=2e-4, msg=name)


def test_a_coco_folder_with_a_vitdet_pyramid_and_a_parquet_file_of_boxes_train(tmp_path):
    folder = coco_folder(tmp_path / "coco")
    (folder / "val" / "001.png").write_bytes((folder / "train" / "005.png").read_bytes())  # seen in training, too
    short = {"optim__epochs": 1, "optim__warmup_epochs": 0}
    code, said = train(tmp_path / "a" / "run", data__path=folder, data__limit=None, detector__pyramid="vitdet", **short)
    assert code == 0, said
    assert "vitdet pyramid" in said and "mask AP" in said
    assert json.loads((tmp_path / "a" / "results.jsonl").read_text().splitlines()[0])["duplicates"] == {"train_test": 1}
    config = json.loads((tmp_path / "a" / "run" / "export" / "config.json").read_text())
    assert config["ids"] == [1, 3, 4, 70, 71, 90]
    found = json.loads((tmp_path / "a" / "run" / "detections.json").read_text())
    images = json.loads((folder / "instances_val.json").read_text())["images"]
    assert {one["image_id"] for one in found} <= {image["id"] for image in images}
    assert {one["category_id"] for one in found} <= {1, 3, 4, 70, 71, 90}
    parquet = parquet_folder(tmp_path / "rows")
    code, said = train(tmp_path / "b" / "run", data__path=parquet, data__box_format="xywh", **short)
    assert code == 0, said
    assert "Faster R-CNN" in said and "box AP" in said and "mask AP" not in said


DAMAGES = {
    "empty": ("UnidentifiedImageError", lambda file, content: file.write_bytes(b"")),
    "cut": ("truncated", lambda file, content: file.write_bytes(content[: len(content) // 2])),
    "of another size": (
        "is 128 × 100, and instances_val.json says 128 × 128",
        lambda file, content: Image.new("RGB", (128, 100)).save(file, "JPEG"),
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_test_image_that_cannot_be_used_is_named_before_the_first_step(damage, tmp_path, capsys):
    from detect import main

    folder, (says, hurt) = coco_folder(tmp_path / "coco"), DAMAGES[damage]
    file = folder / "val" / "002.png"
    Image.effect_noise((128, 128), 90).convert("RGB").save(file, "JPEG")
    hurt(file, file.read_bytes())
    assert main(options(tmp_path / "run", data__path=folder, data__limit=None)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "002.png (row 2)" in error and says in error and "mend or remove this image" in error
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_an_evaluation_that_fails_leaves_the_export(tmp_path, capsys, monkeypatch):
    from detect import DetectionTask, main

    def fails(self):
        raise UserError("the disk has gone.")

    monkeypatch.setattr(DetectionTask, "evaluate", fails)
    assert main(options(tmp_path / "run", data__limit=4, optim__epochs=1, optim__warmup_epochs=0)) == 1
    assert "the disk has gone" in capsys.readouterr().err
    assert load_detector(tmp_path / "run")[1]["masks"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model": None}, "name the backbone to train with --model"),
        ({"model": "resnet18", "args": None}, "model=resnet18, random is no plain ViT"),
        ({"model": "vit_tinny"}, "model vit_tinny is neither a model of timm nor a path"),
        ({"data__path": "{tmp}/nowhere"}, "nowhere does not exist"),
        ({"data__test": "val"}, "scenes has no split 'val'"),
        ({"detector__scale": "[2.0,1.0]"}, "detector.scale=2, 1: give the smaller one first"),
        ({"optim__batch_size": 9}, "optim.batch_size=9 is more than the 8 images"),
        ({"optim__warmup_epochs": 9}, "optim.warmup_epochs=9 leaves nothing"),
        ({"output_dir": "{tmp}/file/run"}, "cannot be written"),
        ({"model": None, "evaluate": "{tmp}"}, "config.json cannot be read: name a run of detect.py"),
    ],
)
def test_a_mistake_is_one_line_before_the_first_step(settings, says, tmp_path, capsys):
    from detect import main

    (tmp_path / "file").write_text("")
    settings = {name: value and str(value).replace("{tmp}", str(tmp_path)) for name, value in settings.items()}
    assert main(options(tmp_path / "run", **settings)) == 1
    said = capsys.readouterr()
    assert says in said.err and said.err.splitlines()[-1].startswith("detect.py: ")
    assert "loss" not in said.out


def test_masks_that_are_asked_for_have_to_be_there(tmp_path, capsys):
    from detect import main

    parquet = parquet_folder(tmp_path / "rows")
    assert main(options(tmp_path / "run", data__path=parquet, data__box_format="xywh", detector__masks="true")) == 1
    assert "detector.masks=true, and not every object has a mask" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.large  # three minutes of one core, which CI does not have to spare
@pytest.mark.timeout(1800)
def test_eight_scenes_are_learnt_by_heart(tmp_path):
    """Three minutes of one core."""
    settings = {
        **{"random": None, "args": None, "detector__size": 128, "detector__window": 14, "detector__channels": 64},
        **{"detector__samples": 64, "detector__scale": "[1.0,1.0]", "detector__flip": 0, "data__test": "train"},
        **{"optim__batch_size": 8, "optim__epochs": 140, "optim__schedule": "cosine", "optim__drop_path": 0},
        **{"optim__warmup_epochs": 5, "checkpoint__every": 20},
    }
    code, said = train(tmp_path / "run", **settings)
    assert code == 0, said
    boxes, masks = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert boxes["value"] > 90 and masks["value"] > 80
