"""What benchmarks and the jobs for a rented GPU rest on: goals, profiles, whole parts, training that goes on."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "gpu")]  # behind train/, which has a probe.py, too

import measure  # noqa: E402
import pack  # noqa: E402
import parts  # noqa: E402
import speedrun  # noqa: E402
import tome  # noqa: E402

import train as visit  # noqa: E402

from .tiny import encoder  # noqa: E402
from .train.data.test_source import encoded  # noqa: E402
from .train.runs import TINY, launch, log_of, said_of, tensors_of  # noqa: E402


def row(**values):
    return {"size": "b16", "row": measure.MAIN, "device": "cuda", **values}


@pytest.mark.parametrize(
    ("rows", "verdicts"),
    [
        ([row(images_per_second=2100.0, peak_share=0.44)], ["met", "not met", "not met"]),
        ([row(images_per_second=2500.0, peak_share=None)], ["met", "met", "not measured"]),
        ([row(images_per_second=9e9, device="cpu")], ["not measured"] * 3),
        ([row(error="out of memory")], ["not measured"] * 3),
    ],
)
def test_a_goal_is_met_by_what_a_gpu_measured_only(rows, verdicts):
    assert [goal["verdict"] for goal in measure.judged(rows)[:3]] == verdicts


def test_a_device_that_waits_too_long_misses_its_goal():
    rows = [{**row(waiting_share=0.2), "size": "ti16", "row": "loop, resident"}]
    assert measure.judged(rows)[-1]["verdict"] == "not met"


def test_every_goal_is_about_a_size_that_is_measured():
    assert {goal.size for goal in measure.GOALS} <= measure.SIZES.keys()


def test_kernels_that_overlap_are_busy_once():
    assert measure.covered([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4
    assert measure.Profile(0.6, []).waiting(0.8) == pytest.approx(0.25)
    assert measure.Profile(None, []).waiting(0.8) is None


def test_a_profile_names_the_longest_first():
    x = torch.randn(256, 256)
    found = measure.profiled(lambda: x @ x, 2, torch.device("cpu"))
    assert found.busy is None and found.kernels[0]["name"] == "aten::mm" and found.kernels[0]["calls"] == 1
    json.dumps(found.kernels)


@pytest.fixture
def run(tmp_path):
    """A folder with files of known sizes, and what they hold."""
    folder = tmp_path / "run"
    (folder / "state").mkdir(parents=True)
    draw = torch.Generator().manual_seed(0)
    content = {}
    for name, size in {"log": 10, "state/a": 2_500_000, "state/b": 1_700_000}.items():
        content[name] = bytes(torch.randint(0, 256, (size,), generator=draw, dtype=torch.uint8).tolist())
        (folder / name).write_bytes(content[name])
    return folder, content


def test_parts_are_small_few_at_once_and_give_back_every_byte(run, tmp_path, monkeypatch):
    folder, content = run
    monkeypatch.setattr(parts, "FETCH_FILES", 3)
    fetches = parts.split(folder, {"export": ["log"], "state": ["state"]}, tmp_path / "parts", {"step": 3}, 0.5)
    assert [len(fetch) for fetch in fetches] == [3, 3, 3, 1]
    assert all(path.stat().st_size <= 2**19 for fetch in fetches for path in fetch)
    (tmp_path / "mixed").mkdir()
    for path in [*(tmp_path / "parts").rglob("*")]:  # as they come back: in one folder
        if path.is_file():
            shutil.copy(path, tmp_path / "mixed")
    assert parts.join(tmp_path / "mixed", tmp_path / "again")["step"] == 3
    assert {name: (tmp_path / "again" / name).read_bytes() for name in content} == content


def test_a_fetch_stays_below_the_limit_in_bytes(run, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "FETCH_MIB", 1.2)
    fetches = parts.split(run[0], {"state": ["state"]}, tmp_path / "parts", {}, 0.5)
    assert [sum(p.stat().st_size for p in fetch) <= 1.2 * 2**20 for fetch in fetches] == [True] * len(fetches)
    assert [len(fetch) for fetch in fetches] == [2, 2, 2, 3]  # the last part is small


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: path.unlink(), "state.001 is missing in"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is damaged"),
        (lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]), "is damaged"),
    ],
)
def test_parts_that_are_not_whole_are_refused_by_name(spoil, says, run, tmp_path):
    parts.split(run[0], {"export": ["log"], "state": ["state"]}, tmp_path / "parts", {}, 2)
    spoil(next((tmp_path / "parts").rglob("state.001")))
    with pytest.raises(parts.PartsError, match=says):
        parts.join(tmp_path / "parts", tmp_path / "again")
    parts.join(tmp_path / "parts", tmp_path / "export", ["export"])  # which is whole
    assert (tmp_path / "export" / "log").is_file()


@pytest.fixture
def noise(tmp_path):
    """A Parquet file of 37 images that compress badly."""
    draw = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (48, 48, 3), generator=draw, dtype=torch.uint8).numpy() for _ in range(37)]
    values = {"image": [encoded(Image.fromarray(image), "PNG") for image in images]}
    datasets.Dataset.from_dict(values, datasets.Features({"image": datasets.Image()})).to_parquet(
        tmp_path / "x.parquet"
    )
    return tmp_path / "x.parquet"


@pytest.mark.parametrize(("share", "as_it_is"), [(0.6, True), (0.2, False)])
def test_a_pack_keeps_every_image_and_its_size(share, as_it_is, noise, tmp_path):
    mib = share * noise.stat().st_size / 2**20
    quality = pack.pack([noise], tmp_path / "pack", 32, mib, 2, None, "image", 1)
    assert (quality is None) == as_it_is
    files = pack.checked(tmp_path / "pack")
    assert len(files) == 2 and all(file.stat().st_size <= mib * 2**20 for file in files)
    found = datasets.load_dataset(str(tmp_path / "pack"), split="train")
    assert len(found) == 37 and found[36]["image"].size == ((48, 48) if as_it_is else (32, 32))
    files[0].write_bytes(files[0].read_bytes()[:-1])
    with pytest.raises(parts.PartsError, match="is damaged"):
        pack.checked(tmp_path / "pack")
    shutil.rmtree(tmp_path / "pack" / "part-0")
    with pytest.raises(parts.PartsError, match="1 of the pack's 2 parts"):
        pack.checked(tmp_path / "pack")


def test_a_pack_that_cannot_be_made_says_why(noise, tmp_path):
    with pytest.raises(parts.PartsError, match="give a smaller --side"):
        pack.pack([noise], tmp_path / "pack", 32, 1e-4, 1, None, "image", 1)
    with pytest.raises(parts.PartsError, match="--column is one of image"):
        pack.pack([noise], tmp_path / "pack", 32, 1, 1, None, "photo", 1)


def forked(options, said, until=None):
    """train/pretrain.py in a fork that has everything imported."""
    process = launch("pretrain", options, said)
    process.join(120)
    said_of(said).rename(said)
    return process.exitcode


@pytest.mark.xdist_group("runs")
@pytest.mark.slow
def test_training_goes_on_from_its_parts_as_if_nothing_had_been(tmp_path, monkeypatch, capsys):
    """Twice 20 steps, the second from what was carried away, are 40."""
    monkeypatch.setattr(visit, "pretrain", forked)
    options = [f"--{name}={value}" for name, value in {**TINY, "optim.epochs": 0.04, "watch.probe_every": 0}.items()]
    first, second, whole = (tmp_path / name for name in ("first", "second", "whole"))
    assert visit.main(["--minutes=1", "--steps=20", f"--out={first}", "--", *options]) == 0
    (tmp_path / "carried").mkdir()
    for path in (first / "parts").rglob("*"):
        if path.is_file():
            assert path.stat().st_size < 16 * 2**20
            shutil.copy(path, tmp_path / "carried")
    assert visit.main(["--minutes=1", "--steps=20", f"--out={second}", f"--from={tmp_path / 'carried'}"]) == 0
    assert "going on after step 20" in (second / "said.txt").read_text()  # and not from the start once more
    assert visit.main(["--minutes=1", "--steps=40", f"--out={whole}", "--", *options]) == 0
    assert log_of(second / "run") == log_of(whole / "run")
    assert len(log_of(second / "run")) == 40
    ours, theirs = tensors_of(second / "run"), tensors_of(whole / "run")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert "step 40, 320 images" in capsys.readouterr().out


def test_the_length_of_a_run_fills_its_time():
    options = [*(f"--{name}={value}" for name, value in TINY.items()), "--optim.epochs=2", "--optim.warmup_epochs=0.5"]
    found = visit.epochs(options, seconds_a_step=0.5, seconds=512)  # 1,024 steps of 8 of the 8,192 scenes
    assert found == ["--optim.epochs=1.0000", "--optim.warmup_epochs=0.2500"]


def test_options_of_two_words_are_one():
    assert visit.spelt(["--config", "a.yaml", "--data.path=x", "--seed", "3"]) == [
        "--config=a.yaml",
        "--data.path=x",
        "--seed=3",
    ]


def test_a_visit_says_what_is_wrong_in_one_line(tmp_path, capsys):
    assert visit.main(["--minutes=1", f"--out={tmp_path / 'out'}", f"--from={tmp_path / 'nothing'}"]) == 1
    assert "holds no manifest.json: name the folder into which the parts were copied" in capsys.readouterr().err


def test_a_speedrun_trains_judges_and_ends_in_one_line(tmp_path, monkeypatch, capsys):
    """The programs are replaced by what they leave."""
    calls, photos = [], tmp_path / "my photos"

    def program(name, *options):
        calls.append((name, *map(str, options)))
        if name == "pretrain":
            (tmp_path / "log.jsonl").write_text('{"seconds": 90, "samples": 64}\n{"seconds": 150, "samples": 12800}\n')
        else:
            record = {"protocol": options[options.index("--protocol") + 1], "accuracy": 60.0 + len(calls)}
            with (tmp_path / "results.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")

    monkeypatch.setattr(speedrun, "program", program)
    words = ["--photos", str(photos), "--judge", "nette", "--output", str(tmp_path), "--", "--optim.epochs", "2"]
    monkeypatch.setattr(sys, "argv", ["speedrun.py", *words])
    speedrun.main()
    assert [name for name, *_ in calls] == ["pretrain", "probe", "probe"]
    assert str(photos) in calls[0] and calls[0][-2:] == ("--optim.epochs", "2")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("speedrun: kNN 62.0 %, linear 63.0 %, 4 minutes, 12,800 images, ")


@pytest.mark.slow
def test_a_step_is_measured_as_a_run_takes_it(tmp_path):
    """The smallest of benchmarks/step.py: figures.py gives it a third of a GPU's minutes."""
    command = [sys.executable, str(ROOT / "benchmarks" / "step.py"), "--cpu", "--only", "ti16", "--batch", "2"]
    command += [
        "--rounds",
        "1",
        "--precision",
        "no",
        "--contenders",
        "dseq, two regions",
        "--json",
        str(tmp_path / "x"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "x").read_text())["rows"]
    assert row["row"] == "dseq, two regions" and row["images_per_second"] > 0 and "error" not in row


def test_merging_none_is_the_model_and_a_token_of_two_patches_counts_twice():
    torch.manual_seed(0)
    model, images = encoder(num_classes=5).eval(), torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(tome.Merging(model, 0)(images), model(images))
    attn, tokens, size = model.blocks[0].attn, torch.randn(2, 5, 32), torch.tensor([1, 2, 1, 2, 1])
    found, _ = tome.attention(attn, tokens, size.float().view(1, 5, 1).expand(2, -1, -1))
    twins, _ = tome.attention(attn, tokens.repeat_interleave(size, dim=1), torch.ones(2, 7, 1))
    torch.testing.assert_close(found, twins[:, [0, 1, 3, 4, 6]], rtol=0, atol=1e-5)


def test_merging_keeps_the_class_token_first_and_every_patch_counted():
    tokens, size = torch.randn(2, 17, 8), torch.ones(2, 17, 1)
    left, counted = tome.merged(tokens, size, torch.randn(2, 17, 4), 5, 1)
    assert left.shape == (2, 12, 8) and torch.equal(left[:, 0], tokens[:, 0]) and (counted[:, 0] == 1).all()
    assert (counted.sum(1) == 17).all()
    torch.testing.assert_close((left * counted).sum(1), tokens.sum(1), rtol=0, atol=1e-5)
