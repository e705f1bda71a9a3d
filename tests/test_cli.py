"""The command, as a user types it: exit codes, what is printed, and the whole way from a checkpoint to the Hub."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from timm_dseq.cli import main
from timm_dseq.dseq_jepa import ARCHITECTURES, META, SHIPPED, TAGS
from timm_dseq.hub import cards
from timm_dseq.hub.stock import macs, registered
from timm_dseq.hub.store.sources import SOURCES

from . import layouts

ROOT = Path(__file__).parents[1]

NAME = "dseq_jepa_vit_ti16.in1k"


@pytest.fixture
def run(capsys):
    def run(*arguments) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_models_lists_all_with_their_size_cost_and_weights(run):
    code, out, _ = run("models", "--json")
    rows = {row["model"]: row for row in json.loads(out)}
    assert code == 0 and rows.keys() == ARCHITECTURES.keys()
    assert rows["dseq_jepa_vit_b16"]["parameters"] == pytest.approx(85.80e6, rel=1e-3)
    assert rows["dseq_jepa_vit_h16_448"]["image"] == [448, 448]
    for name, row in rows.items():
        tags = {full.partition(".")[2] for full in (*SHIPPED, *META) if full.partition(".")[0] == name}
        nowhere = {"published": None, "cached": False, "stored": False}
        assert row["weights"] == {
            tag: {
                **nowhere,
                "shipped": (full := f"{name}.{tag}") in SHIPPED,
                "source": SOURCES[full].link if full in SOURCES else None,
            }
            for tag in {*TAGS, *tags}
        }
    code, out, _ = run("models")
    assert all(name in out for name in ARCHITECTURES)
    assert out.count("in this package") == len(SHIPPED) and out.count("timm-dseq get") == len(SOURCES)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_count_of_macs_equals_torchs(name):
    model = registered(name).blueprint.eval()
    image = torch.empty(1, 3, *registered(name).img_size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(image)
    assert macs(model) == pytest.approx(counter.get_total_flops() / 2, rel=1e-3)


def test_models_tells_published_and_cached_weights(hub, exported, run_python):
    hub.add_repo(f"lab/{NAME}", {path.name: path.read_bytes() for path in exported.iterdir()})
    code = """
import timm_dseq, timm
from timm_dseq.cli import main
main(["models"])
timm.create_model("dseq_jepa_vit_ti16.in1k", pretrained=True)
main(["models"])
"""
    run = run_python(code, TIMM_DSEQ_NAMESPACE="lab")
    before, after = (line for line in run.stdout.splitlines() if line.startswith("dseq_jepa_vit_ti16"))
    assert f"in1k (lab/{NAME})" in before and "in1k (cached)" in after, run.stderr


@pytest.mark.slow
def test_the_whole_way_from_a_checkpoint_to_the_hub_and_back(hub, run, roles, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    hub.token = "hf_writer"
    source, folder = layouts.save_official(tmp_path / "dseq.pth", **roles), tmp_path / "folder"
    code, out, _ = run("convert", source, "--output", folder, "--with-pretraining-state")
    assert code == 0 and "dseq_jepa_vit_ti16.in1k_official" in out and "timm-dseq verify" in out
    code, out, _ = run("verify", folder)
    assert code == 0 and "FAIL" not in out and out.count("largest difference") == 3, out

    repository = "lab/dseq_jepa_vit_ti16.in1k_official"
    code, out, err = run("push", folder, repository, "--dry-run")
    assert code == 1 and "blanks: fill them in" in err and err.count("\n") == 1
    assert "would go to" in out and "blank, push will refuse it" in out
    code, _, err = run("push", folder, repository)
    assert code == 1 and "README.md has" in err and "[TO BE" in err and err.count("\n") == 1
    assert hub.repos == {}

    (folder / "README.md").write_text(cards.BLANK.sub("1.0 ± 0.1", (folder / "README.md").read_text()))
    (folder / "notes.txt").write_text("stays here")
    code, out, err = run("push", folder, repository, "--private")
    assert code == 0 and "ok    arrived" in out and "stays here: notes.txt" in out, out + err
    sent = hub.files(repository)
    assert sent.keys() == {"README.md", "config.json", "model.safetensors", "pretraining.safetensors"}
    assert hub.repos[repository].private
    assert hub.repos[repository].messages == ["initial commit", "Upload dseq_jepa_vit_ti16.in1k_official"]
    assert b"<namespace>" not in sent["README.md"] and f"hf-hub:{repository}".encode() in sent["README.md"]

    code, out, err = run("verify", repository)
    assert code == 0 and "stock timm from the Hub: largest" in out, out + err
    overlay = {"hf_hub_id": repository}
    model = timm.create_model(
        "dseq_jepa_vit_ti16.in1k", pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path / "cache"
    )
    assert torch.equal(model.norm.weight, roles["target"]["norm.weight"])


@pytest.mark.slow
def test_a_push_updates_in_one_commit_and_knows_branches(hub, run, complete):
    assert run("push", complete, "lab/x")[0] == 0
    (complete / "README.md").write_text((complete / "README.md").read_text() + "\nMore.\n")
    code, out, err = run("push", complete, "lab/x", "--revision", "second", "--json")
    assert code == 0 and json.loads(out)["revision"] == "second", err
    assert b"More." in hub.files("lab/x", "second")["README.md"]
    assert b"More." not in hub.files("lab/x")["README.md"]
    assert len(hub.repos["lab/x"].messages) == 3


@pytest.mark.parametrize("fault", ["read_only", "token"])
def test_a_push_without_the_right_says_so(hub, run, complete, fault):
    setattr(hub, fault, "hf_other" if fault == "token" else True)
    code, _, err = run("push", complete, "lab/x")
    assert code == 1 and "log in" in err and err.count("\n") == 1, err
    assert not hub.repos


def test_the_repository_comes_from_the_namespace_when_none_is_named(run, complete, monkeypatch):
    code, _, err = run("push", complete, "--dry-run")
    assert code == 1 and "Name the repository" in err
    monkeypatch.setenv("TIMM_DSEQ_NAMESPACE", "lab")
    code, out, _ = run("push", complete, "--dry-run", "--json")
    assert code == 0 and json.loads(out)["repository"] == f"lab/{NAME}"


@pytest.mark.slow
def test_verify_sees_each_fault(run, complete, tmp_path):
    def config(**changes):
        content = json.loads((complete / "config.json").read_text())
        return json.dumps({**content, **changes})

    weights = (complete / "model.safetensors").read_bytes()
    cases = {
        "names dseq_jepa_vit_ti16, which timm does not know": {
            "config.json": config(architecture="dseq_jepa_vit_ti16")
        },
        "names resnet51, which is no architecture": {"config.json": config(architecture="resnet51")},
        "and (192, 3, 16, 16)": {"config.json": config(architecture="vit_small_patch16_224")},
        "model_args holds num_classes": {"config.json": config(model_args={"num_classes": 0})},
        "is no config of timm": {"config.json": "{"},
        "has no config.json": {"config.json": None},
        "has no README.md": {"README.md": None},
        "truncated or corrupt": {"model.safetensors": weights[:-5000]},
        "the card lacks": {"README.md": "---\nlicense: mit\n---\nNothing to say."},
    }
    cases.pop("and (192, 3, 16, 16)")
    cases["cls_token is (1, 1, 192) in the checkpoint and (1, 1, 384)"] = {
        "config.json": config(architecture="vit_small_patch16_224")
    }
    for number, (message, changes) in enumerate(cases.items()):
        folder = tmp_path / str(number)
        shutil.copytree(complete, folder)
        for name, content in changes.items():
            if content is None:
                (folder / name).unlink()
            else:
                (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        code, out, err = run("verify", folder)
        assert code == 1 and message in out + err, (message, out, err)
    for name in (tmp_path / "nowhere", f"local-dir:{tmp_path / 'nowhere'}"):
        code, _, err = run("verify", name)
        assert code == 1 and "nowhere is no folder" in err


@pytest.mark.parametrize("name", ["lab/nothing", "hf-hub:lab/nothing"])
def test_verify_of_a_repository_that_does_not_exist_says_so(hub, run, name):
    code, _, err = run("verify", name)
    assert code == 1 and "lab/nothing: no such repository" in err and err.count("\n") == 1, err


@pytest.mark.slow
def test_verify_sees_weights_that_load_to_other_numbers(run, complete, monkeypatch):
    from timm_dseq.hub import verify as module

    monkeypatch.setattr(module, "_STOCK", module._STOCK.replace("return timm", "return 1.001 * timm"))
    code, out, err = run("verify", complete, "--json")
    assert err.startswith("timm-dseq verify: 1 of ") and "(stock timm)" in err and err.count("\n") == 1
    checks = json.loads(out)
    assert code == 1 and not checks["stock timm"]["ok"] and checks["transformers"]["ok"]


@pytest.mark.slow
def test_verify_compares_sixteen_bit_storage_with_its_own_weights(run, roles, tmp_path):
    source = layouts.save_training(tmp_path / "w.safetensors", **roles)
    assert run("convert", source, "-o", tmp_path / "out", "--dtype", "bfloat16")[0] == 0
    assert load_file(tmp_path / "out" / "model.safetensors")["norm.weight"].dtype == torch.bfloat16
    code, out, _ = run("verify", tmp_path / "out")
    assert code == 0 and "all in place, bfloat16" in out and out.count("largest difference") == 3, out


@pytest.mark.slow
def test_a_converted_ijepa_verifies_and_carries_metas_licence(run, tmp_path):
    shapes = layouts.encoder_shapes(class_token=False)
    source = layouts.save_ijepa(tmp_path / "jepa.pth.tar", *[layouts.random_weights(shapes, i) for i in (1, 2)], {})
    assert run("convert", source, "-o", tmp_path / "out")[0] == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: cc-by-nc-4.0" in card and "timm_dseq" not in card.split("## Usage")[1].split("###")[1]
    code, out, _ = run("verify", tmp_path / "out")
    assert code == 0 and out.count("largest difference") == 2, out


@pytest.mark.parametrize("json_flag", [[], ["--json"]])
def test_an_error_is_one_line_on_stderr_and_exit_code_1(run, tmp_path, json_flag):
    code, out, err = run("convert", tmp_path / "nowhere.pth", *json_flag)
    assert code == 1 and err.startswith("timm-dseq convert: ") and err.count("\n") == 1
    assert ("error" in json.loads(out)) if json_flag else out == ""


def test_a_misspelt_command_is_exit_code_2():
    run = subprocess.run([sys.executable, "-m", "timm_dseq.cli", "convrt"], capture_output=True, text=True)
    assert run.returncode == 2 and "convert" in run.stderr


def test_explain_draws_a_picture_and_names_what_is_wrong(run, exported, tmp_path):
    from PIL import Image

    Image.linear_gradient("L").save(tmp_path / "photo.png")
    code, out, err = run(
        "explain", tmp_path / "photo.png", "--model", f"local-dir:{exported}", "--out", tmp_path / "x.png"
    )
    assert code == 0 and "x.png" in out, err
    assert Image.open(tmp_path / "x.png").width > 1000
    (tmp_path / "text.png").write_text("no image")
    for image, model, message in [
        ("text.png", f"local-dir:{exported}", "text.png cannot be read (Unid"),
        ("nowhere.png", f"local-dir:{exported}", "nowhere.png cannot be read (no such file)"),
        ("photo.png", "dseq_jepa_vit_s16", "dseq_jepa_vit_s16 has no published weights: give a folder or"),
        ("photo.png", "vit_smal_patch16_224", "neither a model of timm nor a path that exists, maybe vit_small_patch"),
        ("photo.png", f"local-dir:{tmp_path}", "holds no backbone"),
    ]:
        code, _, err = run("explain", tmp_path / image, "--model", model)
        assert code == 1 and message in err and err.count("\n") == 1, err


def test_explain_does_not_write_over_its_photo_and_names_what_cannot_be_written(run, photo, tmp_path):
    before = photo.read_bytes()
    (tmp_path / "link.png").symlink_to(photo)
    for output in (photo, tmp_path / "link.png"):
        code, _, err = run("explain", photo, "-o", output)
        assert code == 1 and "is the picture to explain, and would be lost" in err and err.count("\n") == 1, err
    assert photo.read_bytes() == before
    code, _, err = run("explain", photo, "-o", tmp_path / "x.blp")
    assert code == 1 and "x.blp cannot be written" in err and err.count("\n") == 1, err


def test_explain_needs_no_model_and_reads_no_foreign_format_no_bomb_and_no_pipe(run, photo, tmp_path, monkeypatch):
    from PIL import Image

    code, _, err = run("explain", photo, "-o", tmp_path / "x.png")
    assert code == 0 and Image.open(tmp_path / "x.png").width > 1000, err
    (tmp_path / "page.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")
    (tmp_path / "cut.png").write_bytes(photo.read_bytes()[:200])
    os.mkfifo(tmp_path / "pipe.png")
    for name, message in [
        ("page.png", "page.png cannot be read (UnidentifiedImageError: none of JPEG"),
        ("cut.png", "cut.png cannot be read"),
        ("pipe.png", "regular"),
        ("/", "/ cannot be read (not a regular file)"),
        (".", "cannot be read (not a regular file)"),
    ]:
        code, _, err = run("explain", tmp_path / name)
        assert code == 1 and message in err and err.count("\n") == 1, err
    monkeypatch.setattr("timm_dseq.images.MOST_PIXELS", 100)
    code, _, err = run("explain", photo)
    assert code == 1 and "pixels are none, or too many" in err, err


def test_explain_turns_a_photo_upright(run, tmp_path):
    from PIL import Image

    exif, image = Image.Exif(), Image.linear_gradient("L").resize((96, 64)).convert("RGB")
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    image.save(tmp_path / "upright.png")
    for name in ("turned", "upright"):
        assert run("explain", tmp_path / f"{name}.png", "-o", tmp_path / f"{name}.out.png")[0] == 0
    turned, upright = (Image.open(tmp_path / f"{name}.out.png") for name in ("turned", "upright"))
    assert turned.tobytes() == upright.tobytes()


@pytest.fixture
def photo(tmp_path) -> Path:
    from PIL import Image

    Image.linear_gradient("L").save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_explain_takes_what_probe_and_finetune_take(run, training_run, roles, photo, tmp_path, monkeypatch):
    """All of these hold the same target encoder, so all pictures are the same."""
    save_file(roles["target"], tmp_path / "model.safetensors")
    shutil.copytree(training_run / "export", tmp_path / "dseq_jepa_vit_ti16.in1k")
    monkeypatch.chdir(tmp_path)
    pictures = {}
    for name in (
        "dseq_jepa_vit_ti16.in1k",
        "local-dir:dseq_jepa_vit_ti16.in1k",
        "run",
        "run/export",
        "run/checkpoints",
        "run/checkpoints/step-00000003",
        "run/checkpoints/step-00000006/model.safetensors",
        "model.safetensors",
    ):
        code, _, err = run("explain", photo, "--model", name, "-o", "x.png")
        assert code == 0, (name, err)
        pictures[name] = Path("x.png").read_bytes()
    assert len(set(pictures.values())) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet50", "resnet50 is a ResNet, no plain ViT of timm: name one, such as dseq_jepa_vit_b16"),
        ("convnext_tiny", "convnext_tiny is a ConvNeXt, no plain ViT"),
        ("swin_tiny_patch4_window7_224", "is a SwinTransformer, no plain ViT"),
        ("eva02_tiny_patch14_224", "is a Eva, no plain ViT"),
        ("beit_base_patch16_224", "is a Beit, no plain ViT"),
        ("hiera_tiny_224", "is a Hiera, no plain ViT"),
        ("naflexvit_base_patch16_gap", "is a NaFlexVit, no plain ViT"),
        ("vit_base_patch16_siglip_224", "has no class token"),
    ],
)
def test_explain_names_what_it_cannot_explain_before_a_download(hub, run, photo, name, message):
    code, _, err = run("explain", photo, "--model", name)
    assert code == 1 and message in err and err.count("\n") == 1, err
    assert not hub.requests


def test_explain_refuses_files_that_load_but_are_no_plain_vit(run, photo, tmp_path):
    config = {"architecture": "test_resnet", "num_classes": 0, "pretrained_cfg": {"input_size": [3, 64, 64]}}
    model = timm.create_model("test_resnet", num_classes=0)
    (tmp_path / "resnet").mkdir()
    (tmp_path / "resnet" / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), tmp_path / "resnet" / "model.safetensors")
    weights = layouts.random_weights(layouts.encoder_shapes(class_token=False), 1)
    save_file(weights, tmp_path / "ijepa.safetensors")
    for name, message in {"resnet": "is a ResNet, no plain ViT", "ijepa.safetensors": "has no class token"}.items():
        code, _, err = run("explain", photo, "--model", tmp_path / name)
        assert code == 1 and message in err and err.count("\n") == 1, err


def _spoilt(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    size = changes.pop("input_size", None)
    config["pretrained_cfg"] |= {"input_size": size} if size else {}
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "resnet50"}, "resnet50 is a ResNet, no plain ViT"),
        ({"architecture": 5}, "architecture is 5"),
        ({"architecture": ["a"]}, "architecture is ['a']"),
        ({"model_args": {"foo": 1}}, "unexpected keyword argument 'foo'"),
        ({"model_args": {"patch_size": 0}}, "patch_size=0: give a whole number from 1 to 16384"),
        ({"input_size": ["3", "a", "b"]}, "input_size is ['3', 'a', 'b']"),
        ({"num_classes": "ten"}, "num_classes is 'ten'"),
        ({"architecture": "vit_small_patch16_224"}, "config.json does not describe, convert them anew"),
    ],
)
def test_verify_and_push_name_what_is_wrong_in_a_config(run, complete, changes, message):
    _spoilt(complete, **changes)
    for command in (("verify", complete), ("push", complete, "lab/x", "--dry-run")):
        code, _, err = run(*command)
        assert code == 1 and message in err and "config.json" in err and err.count("\n") == 1, err


def test_a_card_that_is_not_utf_8_is_named(run, complete):
    (complete / "README.md").write_bytes(b"\xff\xfe card")
    code, _, err = run("verify", complete)
    assert code == 1 and "README.md is not UTF-8" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("repository", "message"), [("a/b/c", "is no repository of the Hub"), ("alone", "write ORGANISATION/alone")]
)
@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_push_refuses_a_wrong_name_with_and_without_dry_run(hub, run, complete, repository, message, dry_run):
    code, _, err = run("push", complete, repository, *dry_run)
    assert code == 1 and message in err and err.count("\n") == 1, err
    assert not hub.requests


@pytest.mark.slow
def test_verify_of_a_repository_checks_digests_and_names_what_it_lacks(hub, run, complete):
    files = {path.name: path.read_bytes() for path in complete.iterdir()}
    hub.add_repo("lab/damaged", files)
    hub.fault = "flip"
    code, _, err = run("verify", "lab/damaged")
    assert code == 1 and "model.safetensors of lab/damaged arrived damaged" in err, err
    hub.fault = None
    code, out, err = run("verify", "lab/damaged")  # what was damaged is gone from the cache
    assert code == 0, out + err
    for lacking in ("config.json", "model.safetensors"):
        hub.add_repo("lab/lacks", {name: content for name, content in files.items() if name != lacking})
        code, _, err = run("verify", "lab/lacks")
        assert code == 1 and f"lab/lacks has no {lacking}" in err and err.count("\n") == 1, err


@pytest.mark.parametrize("command", [("verify", ""), ("convert", ""), ("convert", "w.pth", "--model", "")])
def test_an_empty_argument_is_one_line(run, command):
    code, _, err = run(*command)
    assert code == 1 and "given is empty" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("truncated", "is truncated or corrupt"),
        ("arguments", "unexpected keyword argument 'foo'"),
        ("nan", "holds numbers that are not finite, in "),
        ("missing", "is no folder"),
    ],
)
def test_explain_names_a_broken_folder(run, complete, tmp_path, fault, message):
    from PIL import Image

    Image.linear_gradient("L").save(tmp_path / "photo.png")
    weights = complete / "model.safetensors"
    if fault == "truncated":
        weights.write_bytes(weights.read_bytes()[:-5000])
    elif fault == "arguments":
        _spoilt(complete, model_args={"foo": 1})
    elif fault == "nan":
        save_file({name: tensor * float("nan") for name, tensor in load_file(weights).items()}, weights)
    else:
        shutil.rmtree(complete)
    model = f"local-dir:{complete}"
    code, _, err = run("explain", tmp_path / "photo.png", "--model", model, "-o", tmp_path / "x.png")
    assert code == 1 and message in err and "timm-dseq models" not in err and err.count("\n") == 1, err


@pytest.mark.parametrize("output", ["x.txt", "x", "."])
def test_explain_refuses_an_output_that_is_no_picture_before_it_loads_anything(run, tmp_path, output):
    code, _, err = run("explain", tmp_path / "nowhere.png", "--model", "nothing", "-o", tmp_path / output)
    assert code == 1 and "names no picture that can be written" in err and err.count("\n") == 1, err


def test_ctrl_c_while_torch_is_loaded_is_one_line(tmp_path):
    """And a program that imports the package keeps its own answer to it."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("import time; print('loading', flush=True); time.sleep(60)")
    command = tmp_path / "timm-dseq"
    command.write_text("import sys\nfrom timm_dseq.cli import main\nsys.exit(main())\n")
    other = tmp_path / "other.py"
    other.write_text(command.read_text())
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    module = "-m", "timm_dseq"
    for program, code in (((command,), 130), (module, 130), ((other,), -signal.SIGINT)):
        process = subprocess.Popen(
            [sys.executable, *program, "models"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout.readline() == "loading\n"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
        assert process.returncode == code, said
        assert program == (other,) or said == "timm-dseq: stopped before it began\n"
