"""Probes measure what they say, a collapse is called one, and the report shows the run."""

import json
import math
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy
import torch
from accelerate import Accelerator
from common.data.source import open_source
from common.pretraining.monitor import images, monitor, probes
from common.pretraining.monitor.report import write_report
from common.pretraining.precision import Precision
from common.pretraining.settings import parse
from common.system.screen import Screen
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.preprocessing import StandardScaler
from torch.nn import functional as F

from timm_dseq import UserError
from timm_dseq.hub.cards import blanks

from ..data.test_source import parquet_of
from ..run.test_export import leaks
from ..runs import log_of, options, train


def clusters(count, spread, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, 16, generator=torch.Generator().manual_seed(9))
    labels = torch.randint(0, 4, (count,), generator=generator)
    return centres[labels] + spread * torch.randn(count, 16, generator=generator), labels


def test_knn_equals_brute_force():
    (learned, labels), (tested, truth) = clusters(150, 1.5), clusters(60, 1.5, seed=1)
    right = 0
    for x, answer in zip(tested, truth, strict=True):
        similarity = torch.tensor([F.cosine_similarity(x, y, dim=0) for y in learned])
        votes = [0.0] * 4
        for i in similarity.argsort(descending=True)[:20]:
            votes[labels[i]] += math.exp(similarity[i] / 0.07)
        right += votes.index(max(votes)) == answer
    assert 20 < right < 60
    assert probes.knn(learned, labels, tested, truth) == pytest.approx(right / 60)


def test_whitening_makes_every_direction_count_alike():
    """Whatever linear map features went through, whitened ones are the same but for a rotation."""
    learned, tested = (clusters(count, 1.5, seed)[0].double() for count, seed in ((150, 0), (60, 1)))
    stretch = torch.randn(16, 16, generator=torch.Generator().manual_seed(2)) @ torch.logspace(0, 1, 16).diag()
    stretch = stretch.double()
    plain, stretched = (
        torch.cat(probes.whitened(a, b)) for a, b in ((learned, tested), (learned @ stretch + 5, tested @ stretch + 5))
    )
    torch.testing.assert_close(plain @ plain.T, stretched @ stretched.T)
    torch.testing.assert_close((plain[:150].T @ plain[:150]), torch.eye(16, dtype=torch.float64))
    few, _ = probes.whitened(learned[:5], tested)
    assert few.shape == (5, 4) and few.isfinite().all()


def test_the_linear_probe_finds_what_is_linear_and_nothing_in_noise():
    assert probes.linear(*clusters(200, 0.3), *clusters(100, 0.3, seed=1)) == 1.0
    noise, labels = torch.randn(2000, 16, generator=torch.Generator().manual_seed(0)), clusters(2000, 1)[1]
    assert abs(probes.linear(noise[:1000], labels[:1000], noise[1000:], labels[1000:]) - 0.25) < 0.07


def test_the_figures_are_those_of_scikit_learn_and_scipy():
    draw = torch.Generator().manual_seed(3)
    labels, truth = torch.arange(300) % 5, torch.arange(120) % 5
    centres = torch.randn(5, 12, generator=draw)
    train, test = (centres[each] + 2 * torch.randn(len(each), 12, generator=draw) for each in (labels, truth))
    share = np.linalg.svd(train.double().numpy(), compute_uv=False)
    assert probes.rank_me(train) == pytest.approx(math.exp(scipy.stats.entropy(share)), rel=1e-9)
    scaler = StandardScaler().fit(train.numpy())
    strength = 1 / (2 * probes._PENALTY * len(train))
    regression = LogisticRegression(C=strength, max_iter=1000, tol=1e-8).fit(scaler.transform(train), labels)
    assert probes.linear(train, labels, test, truth) == pytest.approx(
        accuracy_score(truth, regression.predict(scaler.transform(test))), abs=1 / 120
    )


def test_rank_me_counts_dimensions_and_spread_sees_equal_images():
    assert probes.rank_me(torch.eye(8).repeat(5, 1)) == pytest.approx(8, rel=1e-6)
    assert probes.rank_me(torch.randn(50, 1) @ torch.ones(1, 8)) == pytest.approx(1, abs=1e-3)
    assert probes.feature_std(torch.ones(10, 4)) == 0
    assert probes.feature_std(torch.cat([torch.ones(10, 4), -torch.ones(10, 4)])) == pytest.approx(1)


@pytest.mark.parametrize(
    ("found", "before", "step", "says", "collapse"),
    [
        ({"feature_std": 0.001, "rank_me": 30.0}, 30.0, 100, "all images look alike", True),
        ({"feature_std": 0.3, "rank_me": 1.5}, 30.0, 100, "1.5 dimensions", True),
        ({"feature_std": float("nan"), "rank_me": 30.0}, 30.0, 100, "all images look alike", True),
        ({"knn": None, "feature_std": None, "rank_me": None}, 30.0, 100, "not finite", True),
        ({"feature_std": 0.3, "rank_me": 30.0}, 30.0, 100, None, None),
        ({"feature_std": 0.3, "rank_me": 12.0}, 30.0, 400, "12.0 dimensions, 30.0 before the first step", False),
        ({"feature_std": 0.3, "rank_me": 12.0}, 30.0, 20000, "12.0 dimensions, 30.0 before the first step", True),
        ({"feature_std": 0.3, "rank_me": 12.0}, None, 400, None, None),
    ],
)
def test_a_collapse_is_called_one_and_the_fall_of_the_first_steps_is_not(found, before, step, says, collapse):
    words = probes.phase({"knn": 0.3, **found}, before and {"rank_me": before}, step)
    assert words is None if says is None else says in words.sign
    assert words is None or (words.collapse == collapse and words.advice.endswith("."))


def test_shares_of_the_tokens_variance_are_those_of_a_slow_count():
    tokens = torch.randn(12, 9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens += 0.8 * tokens[:, :1] + 0.5 * tokens[:1]  # an image's own, and a place's own
    more = torch.cat([tokens, tokens[:2]])  # two that fill a share up
    counted = torch.arange(14) < 12
    sums = sum(probes.moments(*part) for part in zip(more.split(5), counted.split(5), strict=True))
    ours = probes.variance_shares(sums, 16)
    rows = torch.stack([(x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt() for x in tokens.flatten(0, 1)])
    rows = rows.view(12, 9, 16)
    total = (rows - rows.mean((0, 1))).square().sum(2).mean()
    image = (rows.mean(1) - rows.mean((0, 1))).square().sum(1).mean() / total
    place = (rows.mean(0) - rows.mean((0, 1))).square().sum(1).mean() / total
    assert ours == {"share_image": pytest.approx(image.item()), "share_place": pytest.approx(place.item())}
    assert 0.15 < ours["share_image"] < 0.8 and 0.05 < ours["share_place"] < 0.5


@pytest.mark.parametrize("kind", ["image", "place"])
def test_tokens_that_are_their_image_or_their_place_alone_have_all_of_their_variance_there(kind):
    own = torch.randn(10, 16)
    tokens = own[:, None].expand(-1, 10, -1) if kind == "image" else own.expand(10, -1, -1)
    shares = probes.variance_shares(probes.moments(tokens, torch.ones(10, dtype=torch.bool)), 16)
    assert shares[f"share_{kind}"] == pytest.approx(1, abs=1e-4)
    assert sum(shares.values()) == pytest.approx(1, abs=1e-4)


@pytest.mark.xdist_group("runs")
def test_a_run_is_watched_and_reported(tmp_path, monkeypatch):
    output = tmp_path / "run"
    code, said = train(output, watch__pictures_every=10, watch__pictures=3)
    assert code == 0, said
    assert [line["step"] for line in log_of(output) if "probe" in line] == [7, 10, 14, 20]
    assert "after step 0: kNN" in said and "after step 20: kNN" in said
    assert {path.name for path in (output / "pictures").iterdir()} == {f"step-{i:08d}.png" for i in (0, 7, 10, 14, 20)}
    assert str(output / "export") in said and "timm-dseq verify" in said
    first, *rest = log_of(output)
    assert f"after step 0: kNN {first['probe_before']['knn']:.1%}" in said
    assert re.search(r"after step 0: kNN [\d.]+%, linear [\d.]+% \(chance [\d.]+%\), RankMe", said)
    assert first["probe_before"]["student"]["knn"] == first["probe_before"]["knn"]  # the target begins as its copy
    assert rest[-1]["probe"]["student"]["knn"] is not None
    assert not any("probe_before" in line for line in rest)
    speeds = sorted(json.loads(line)["images_per_second"] for line in (output / "log.jsonl").read_text().splitlines())
    assert speeds[-1] < 20 * speeds[len(speeds) // 2]  # steps with a checkpoint or a probe count as any other
    page = write_report(output).read_text()
    for title in ("Loss", "Loss by place in the sequence", "Probes", "Variance of the tokens: shares", "Regions"):
        assert f"<figcaption>{title}</figcaption>" in page
    assert page.count("data:image/jpeg;base64,") >= 3
    probes = page[page.index("<figcaption>Probes") :]
    assert "knn of the target" in probes and "linear of the student" in probes
    assert ">step 0</text>" in probes[: probes.index("</figure>")]
    assert not re.search(r"(src|href)=\"(?!data:)", page)  # it needs nothing else
    monkeypatch.chdir(output)
    assert "<h1>run</h1>" in write_report(Path()).read_text()


@pytest.mark.xdist_group("runs")
def test_ijepa_reports_nothing_that_it_does_not_use(tmp_path):
    code, said = train(tmp_path / "run", model__objective="ijepa", watch__probe_every=0, max_steps=3)
    assert code == 0, said
    assert "lambda" not in said and "region" not in said
    for line in log_of(tmp_path / "run"):
        assert line["lambda"] is line["region_share"] is line["regions_found"] is None and line["region_counts"] == []
    page = (tmp_path / "run" / "report.html").read_text().partition("<h2>Settings")[0]
    assert "lambda" not in page and "egions" not in page


@pytest.mark.xdist_group("runs")
def test_without_labels_probes_are_off_and_say_why(tmp_path):
    path = parquet_of(tmp_path / "x.parquet", count=16)
    code, said = train(tmp_path / "run", data__path=path, optim__epochs=2)
    assert code == 0, said
    assert "probes: off, the data set has no labels (data.label names their column)" in said


@pytest.mark.xdist_group("runs")
@pytest.mark.slow
def test_the_exported_folder_passes_verify(tmp_path):
    from timm_dseq.hub.verify import verify

    code, said = train(tmp_path / "run", max_steps=2)
    assert code == 0, said
    export = tmp_path / "run" / "export"
    checks = verify(export)
    assert {name for name, check in checks.items() if not check["ok"]} == set()
    card = (export / "README.md").read_text()
    assert "| images | scenes, split train; labels unused |" in card and "ImageNet-1k" not in card
    assert "2 steps, 16 images seen, of a schedule of 0.02 epochs" in card
    assert "scale 0.3–1; no flip, no colour |" in card and "| precision | float32 |" in card and "squares" not in card
    assert json.loads((export / "config.json").read_text())["pretrained_cfg"]["tag"] == "scenes"
    assert blanks(card) == ["[TO BE STATED: licence]"] * 2


@pytest.mark.xdist_group("runs")
def test_the_card_tells_what_was_done_to_images_and_in_which_precision(tmp_path):
    folder, settings = tmp_path / "images", {"data__flip": 0.5, "data__color_jitter": 0.25}
    folder.mkdir()
    for index in range(16):
        Image.new("RGB", (64, 64), (index * 10, 90, 200)).save(folder / f"{index}.png")
    settings |= {"data__path": folder, "data__resident": "true", "data__cache": tmp_path / "cache", "optim__epochs": 2}
    code, said = train(tmp_path / "run", **settings, system__precision="bf16", watch__probe_every=0)
    assert code == 0, said
    card = (tmp_path / "run" / "export" / "README.md").read_text()
    assert "; flip 0.5, colour 0.25 |" in card and "| precision | bf16 autocast |" in card
    assert "| images | images, split train; labels unused; kept as squares of 55 px |" in card
    assert not leaks(tmp_path / "run" / "export", tmp_path, tmp_path.parent.name, socket.gethostname(), Path.home())


@pytest.mark.slow
@pytest.mark.xdist_group("runs")
def test_a_run_is_published_at_its_end(tmp_path, hub):
    """In a process of its own: where the Hub is, is read when it is imported."""
    ours = options(tmp_path / "run", max_steps=1, hub__push_to="lab/mine", hub__license="cc-by-4.0")
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_x", "HF_HOME": str(tmp_path / "cache")}
    script = Path(monitor.__file__).parents[3] / "pretrain.py"
    done = subprocess.run([sys.executable, script, *ours], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "published: " in done.stdout
    files = hub.files("lab/mine")
    assert files.keys() == {"README.md", "config.json", "model.safetensors", "pretraining.safetensors"}
    assert b"license: cc-by-4.0" in files["README.md"] and b"[TO BE" not in files["README.md"]
    code, said = train(tmp_path / "other", hub__push_to="lab/mine")
    assert code == 1 and "hub.push_to needs hub.license" in said


@pytest.mark.xdist_group("runs")
def test_trackers_get_every_step(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = tmp_path / "run"
    code, said = train(output, watch__trackers="[tensorboard]", max_steps=7)
    assert code == 0, said
    folders = {path.parent for path in (output / "trackers").rglob("events.*")}
    (events,) = [
        found for folder in folders if "loss" in (found := EventAccumulator(str(folder)).Reload()).Tags()["scalars"]
    ]
    log = log_of(output)
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 8))
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([line["loss"] for line in log])
    assert events.Scalars("probe.knn")[-1].value == pytest.approx(log[-1]["probe"]["knn"])


@pytest.mark.xdist_group("runs")
def test_a_tracker_that_is_not_installed_is_named(tmp_path):
    code, said = train(tmp_path / "run", watch__trackers="[wandb]", max_steps=1)
    assert code == 1
    assert "watch.trackers: wandb is not installed: pip install wandb" in said and "Traceback" not in said


@pytest.mark.parametrize(("seconds", "lines"), [(0.0, ["64", "100", "64", "100"]), (60.0, [])])
def test_a_long_probe_says_how_far_it_is(seconds, lines, monkeypatch, capsys):
    monkeypatch.setattr(monitor.Monitor, "_encode", lambda self, part, _: (torch.ones(len(part), 4, 8), None))
    watching = monitor.Monitor.__new__(monitor.Monitor)
    watching.screen, watching.accelerator = Screen(10, 0, shown=True, seconds=seconds), Accelerator()
    for _ in range(2):
        features, tokens, _ = watching._features(images.Shared(torch.zeros(100, 3, 2, 2), 100, None), "target")
    assert features.shape == tokens.shape == (100, 8)
    said = capsys.readouterr().out.splitlines()
    assert said == [f"probing: target's features of {done} of 100 images" for done in lines]


def test_the_time_left_is_that_of_the_steps_not_of_the_probe_before_them(monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setattr("common.system.screen.time.monotonic", lambda: now[0])
    screen = Screen(301, 0, shown=True, seconds=1)
    now[0] += 130  # a probe
    for step in (1, 2, 3):
        now[0] += 5
        screen.show(step, "loss")
    assert capsys.readouterr().out.splitlines() == [
        "step 1/301  loss",
        "step 2/301  loss  0:24:55 left",  # 299 × 5 s
        "step 3/301  loss  0:24:50 left",
    ]


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("no", torch.float32)])
def test_probes_run_in_the_runs_precision_whoever_wraps_the_model(name, dtype):
    """FSDP does not bring autocast, as DDP's wrapper of accelerate does."""
    seen = []

    class Model(torch.nn.Module):
        def forward(self, images, encode):
            seen.append(torch.nn.functional.linear(images.flatten(1), torch.ones(4, images[0].numel())).dtype)
            return images.flatten(2), None

    watching = monitor.Monitor.__new__(monitor.Monitor)
    watching.model, watching.screen, watching.accelerator = Model(), Screen(1, 0, False), Accelerator()
    watching.precision = Precision(name, torch.device("cpu"))
    features, *_ = watching._features(images.Shared(torch.zeros(70, 3, 2, 2, dtype=torch.uint8), 70, None), "target")
    assert seen == [dtype, dtype] and features.dtype == torch.float32


@pytest.mark.xdist_group("runs")
@pytest.mark.parametrize(
    ("label", "why"),
    [(None, "1 images have no label"), (-1, "1 images have no label"), (10**9, "a label is 1000000000")],
)
def test_labels_of_no_use_switch_probes_off_and_the_run_goes_on(label, why, tmp_path):
    path = parquet_of(tmp_path / "x.parquet", count=16, label=[*range(15), label])
    code, said = train(tmp_path / "run", data__path=path, optim__epochs=2)
    assert code == 0 and "Traceback" not in said, said
    assert f"probes: off, {why}" in said


def test_probes_number_the_classes_of_both_splits_alike(tmp_path):
    """A class folder that one of them lacks would shift all labels behind it."""
    for split, names in {"train": "abc", "val": "bcd"}.items():
        for name in names:
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            Image.new("RGB", (40, 40), (ord(name), 0, 0)).save(tmp_path / "photos" / split / name / "0.png")
    config, _ = parse([f"--data.path={tmp_path / 'photos'}", "--data.probe_split=val"])
    learned, tested, why_off = images.sources(config, open_source(config.data))
    assert why_off is None
    assert learned.labels(range(3)).tolist() == [0, 1, 2]  # a, b, c
    assert tested.labels(range(3)).tolist() == [1, 2, -1]  # b, c, and d, which nobody can know


def test_the_data_set_of_a_run_is_opened_once(tmp_path, monkeypatch):
    config, _ = parse([f"--data.path={parquet_of(tmp_path / 'x.parquet', label=[0, 1] * 6)}"])
    source = open_source(config.data)
    monkeypatch.setattr(images, "open_source", lambda *_: pytest.fail("it is open"))
    assert images.sources(config, source) == (source, source, None)


def spoilt(path, broken, workers):
    """Settings of six probe images, and twelve images, of which some cannot be read."""
    parquet_of(path, label=[i % 3 for i in range(12)])
    config, _ = parse([f"--data.path={path}", "--watch.probe_images=6", f"--data.workers={workers}"])
    source = open_source(config.data)
    rows = [dict(row) for row in source.rows]
    for index in broken:
        rows[index]["picture"] = {"bytes": b"no image", "path": f"{index}.png"}
    return config, replace(source, rows=rows)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_probe_image_that_cannot_be_read_is_replaced_with_its_label_and_said_once(workers, tmp_path, capsys):
    config, source = spoilt(tmp_path / "x.parquet", (2, 3, 11), workers)
    learned, tested = images.probe_images(config, source, source, Accelerator(), Screen(1, 0, True))
    assert (learned.count, tested.count) == (6, 6)
    # 0 2 4 6 8 10 and 1 3 5 7 9 11, each broken one by the next of its own side
    assert learned.labels.tolist() == [source.labels([i]).item() for i in (0, 4, 4, 6, 8, 10)]
    assert tested.labels.tolist() == [source.labels([i]).item() for i in (1, 5, 5, 7, 9, 1)]
    assert torch.equal(learned.images[1], learned.images[2]) and torch.equal(tested.images[5], tested.images[0])
    said = capsys.readouterr().out.splitlines()
    assert [line.split("(")[0].split(":")[0] for line in said] == [
        "an image that probes look at cannot be read and is replaced by another"
    ] * 2
    assert "(2 such lines in all)" in said[1]


def test_probe_images_none_of_which_can_be_read_end_the_run_in_one_line(tmp_path):
    config, source = spoilt(tmp_path / "x.parquet", range(12), 1)
    with pytest.raises(
        UserError, match=r"6 images in a row cannot be read, the first .*: is data.image right"
    ) as error:
        images.probe_images(config, source, source, Accelerator(), Screen(1, 0, False))
    assert "\n" not in str(error.value)


def test_judging_leaves_the_precision_of_products_as_it_was():
    torch.set_float32_matmul_precision("high")
    try:
        tokens = clusters(50, 1.5)[0]
        sums = probes.moments(tokens[:, None], torch.ones(50, dtype=torch.bool))
        probes.probe(*clusters(50, 1.5), *clusters(20, 1.5, seed=1), tokens, sums)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
