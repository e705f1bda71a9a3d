"""`timm-dseq get` as it is typed, and that the three ways to the same weights give the same features."""

import json

import pytest
import timm
import torch

from timm_dseq.cli import main
from timm_dseq.hub.convert import convert

from .tiny_sources import FILE, META, META_FILE, OFFICIAL

STOCK = """
import sys, timm, torch
from safetensors.torch import load_file, save_file
with torch.inference_mode():
    features = timm.create_model(sys.argv[1], pretrained=True).eval()(load_file(sys.argv[2])["image"])
assert not any(name.startswith("timm_dseq") for name in sys.modules)
save_file({"features": features}, sys.argv[3])
"""


@pytest.fixture
def run(capsys):
    def run(*arguments) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_from_nothing_to_the_store_and_back(drive, store, unverified, run):
    code, out, _ = run("get")
    assert code == 0 and out == run("get", "--list")[1] and out.count("not here") == out.count("licence: ") > 3
    code, out, err = run("get", OFFICIAL)
    assert code == 0 and not err and "now in the store" in out and f'timm.create_model("{OFFICIAL}"' in out
    assert "no licence" not in out and out.count("licence") == 2  # one line, of what is and what is not stated
    assert "already in the store" in run("get", OFFICIAL)[1] and str(store / OFFICIAL) in run("get", "--list")[1]
    code, out, _ = run("models")
    assert code == 0 and "in1k_official (in the store)" in out
    weights = json.loads(run("models", "--json")[1])[0]["weights"]
    assert weights["in1k_official"]["stored"] and not weights["in1k"]["stored"]
    code, out, _ = run("get", "--remove", OFFICIAL)
    assert code == 0 and f"{OFFICIAL}: removed" in out and "MiB freed" in out
    code, out, err = run("get", OFFICIAL, "--remove")
    assert code == 1 and not out and err.count("\n") == 1 and "is not in the store" in err


def test_json_is_json_alone_and_a_fault_is_one_line(drive, store, unverified, run, tmp_path):
    (tmp_path / FILE).write_bytes(drive.files[FILE])
    code, out, _ = run("get", OFFICIAL, "--file", tmp_path / FILE, "--json")
    said = json.loads(out)
    assert code == 0 and said["new"] and said["sha256"] and not drive.requests
    drive.fault = "gone"
    code, out, err = run("get", META, "--json")
    assert code == 1 and "answers 404" in json.loads(out)["error"] and err.count("\n") == 1
    code, _, err = run("get", "dseq_jepa_vit_b16")
    assert code == 1 and "maybe dseq_jepa_vit_b16.in1k_official" in err


def features(model: torch.nn.Module, image: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(image)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "file"), [(OFFICIAL, FILE), (META, META_FILE)])
def test_get_convert_and_stock_timm_give_the_same_features(drive, store, run, run_python, tmp_path, name, file):
    """With the verification that comes with it: in stock timm, in transformers, and with this package."""
    from safetensors.torch import load_file, save_file

    code, out, err = run("get", name)
    assert code == 0 and "verified, stock timm: largest difference" in out and "verified, transformers" in out, err
    image = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    ours = features(timm.create_model(name, pretrained=True), image)
    (tmp_path / file).write_bytes(drive.files[file])
    convert(tmp_path / file, tmp_path / "converted")
    assert torch.equal(features(timm.create_model(f"local-dir:{tmp_path / 'converted'}", pretrained=True), image), ours)
    save_file({"image": image}, tmp_path / "image")
    done = run_python(STOCK, f"local-dir:{store / name}", str(tmp_path / "image"), str(tmp_path / "features"))
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(load_file(tmp_path / "features")["features"], ours, atol=1e-5, rtol=0)
    if name == META:  # as timm's own name for such weights builds it
        theirs = timm.create_model(
            "vit_huge_patch14_gap_224", patch_size=16, depth=12, embed_dim=192, num_heads=3, num_classes=0
        )
        theirs.load_state_dict(load_file(store / name / "model.safetensors"))
        torch.testing.assert_close(features(theirs, image), ours, atol=1e-5, rtol=0)
