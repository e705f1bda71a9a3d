"""The weights in this package: found by timm, whole, without a network; in the wheel, too; and what their card says."""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from timm_dseq.dseq_jepa import SHIPPED, WEIGHTS
from timm_dseq.hub.cards import blanks

ROOT = Path(__file__).parents[1]
NAMES = [*SHIPPED]
each = pytest.mark.parametrize("name", NAMES)
FEATURES = """
import sys, timm, timm_dseq, torch
from safetensors.torch import load_file, save_file
model = timm.create_model(sys.argv[1], pretrained=True).eval()
with torch.no_grad():
    save_file({"features": model(load_file(sys.argv[2])["images"] / 255)}, sys.argv[3])
print(timm_dseq.__file__)
"""


def run_of(name: str) -> Path:
    """What is kept of the run: config.yaml, log.jsonl, results.jsonl, features.safetensors."""
    return ROOT / "docs" / "runs" / name


def gap(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest angle between features (n, D), each without the mean of all, as a share of 1."""
    mean = theirs.mean(0)
    return (1 - F.cosine_similarity(ours - mean, theirs - mean)).max().item()


@each
def test_what_was_trained_here_names_no_other_paper_or_origin(name):
    cfg = timm.get_pretrained_cfg(name)
    assert (cfg.origin_url, cfg.paper_name, cfg.paper_ids) == (None, None, None)


@each
def test_the_file_is_small_whole_and_finite(name):
    file = WEIGHTS / f"{name}.safetensors"
    assert file.stat().st_size <= 12 * 2**20
    weights = load_file(file)
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert all(tensor.isfinite().all() for tensor in weights.values())
    with torch.device("meta"):
        assert weights.keys() == timm.create_model(name).state_dict().keys()


@each
def test_it_loads_in_a_process_that_has_no_network_and_its_features_are_those_of_its_run(name, run_python, tmp_path):
    kept = run_of(name) / "features.safetensors"
    command = FEATURES.replace("sys.argv[1]", repr(name.partition(".")[0])).replace("sys.argv[2]", repr(str(kept)))
    out = tmp_path / "out.safetensors"
    environment = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    run = run_python(command.replace("sys.argv[3]", repr(str(out))), **environment)
    assert run.returncode == 0, run.stderr
    assert gap(load_file(out)["features"], load_file(kept)["features"]) < 2e-3  # stored in bf16


@each
def test_a_random_encoder_has_other_features(name):
    kept = load_file(run_of(name) / "features.safetensors")
    torch.manual_seed(0)
    with torch.no_grad():
        other = timm.create_model(name).eval()(kept["images"] / 255)
    assert gap(other, kept["features"]) > 0.3


@each
def test_new_classes_sizes_and_channels_are_a_fine_tunings_start(name):
    with pytest.warns(UserWarning, match="freshly initialised: head"):
        model = timm.create_model(name, pretrained=True, num_classes=7)
    assert model(torch.randn(1, 3, 128, 128)).shape == (1, 7)
    config = timm.data.resolve_model_data_config(model)
    side = SHIPPED[name]["size"]
    assert config["input_size"] == (3, side, side)
    large = timm.create_model(name, pretrained=True, img_size=224, in_chans=1)
    assert large(torch.randn(1, 1, 224, 224)).shape == (1, large.num_features)
    assert "file" not in model.pretrained_cfg  # a path of this machine


@each
def test_its_card_is_complete_and_its_figures_are_those_that_were_measured(name):
    card = (WEIGHTS / f"{name}.md").read_text()
    assert not blanks(card)
    results = [json.loads(line) for line in (run_of(name) / "results.jsonl").read_text().splitlines()]
    measured = {f"{result['accuracy']:.1f}" for result in results}
    table = card[card.index("## Results") : card.index("## What it is not")]
    figures = re.findall(r"(\d+\.\d) %", table)
    assert len(figures) > 6 and set(figures) <= measured


@pytest.mark.slow
def test_the_wheel_holds_them_and_works_alone(tmp_path):
    """Built, installed into an empty folder, loaded from there in another process without a network."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "-q", "-w", tmp_path, ROOT], check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    assert all(
        f"timm_dseq/weights/{name}.{kind}" in zipfile.ZipFile(wheel).namelist()
        for name in NAMES
        for kind in ("safetensors", "md")
    )
    inside = zipfile.ZipFile(wheel).namelist()
    recipes = {
        str(path.relative_to(ROOT)) for kind in ("py", "yaml", "json", "md") for path in ROOT.glob(f"train/**/*.{kind}")
    }
    assert recipes == {name.removeprefix("timm_dseq/") for name in inside if name.startswith("timm_dseq/train/")}
    installed = tmp_path / "installed"
    subprocess.run([*pip, "install", "--no-deps", "-q", "--target", installed, wheel], check=True, timeout=300)
    for name in NAMES:
        kept, out = run_of(name) / "features.safetensors", tmp_path / "out.safetensors"
        run = subprocess.run(
            [sys.executable, "-c", FEATURES, name, kept, out],
            env={"PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert run.returncode == 0 and str(installed) in run.stdout, run.stderr
        assert gap(load_file(out)["features"], load_file(kept)["features"]) < 2e-3
