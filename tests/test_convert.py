import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from timm_dseq import UserError
from timm_dseq.backbone import check_fit, detect
from timm_dseq.checkpoints import parse, read
from timm_dseq.convert import convert

from . import layouts


def _loaded(folder, **kwargs):
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs).eval()


@pytest.mark.parametrize(
    ("save", "suffix", "class_token", "kind", "name"),
    [
        (layouts.save_training, ".safetensors", True, "dseq_jepa", "dseq_jepa_vit_ti16.in1k"),
        (layouts.save_official, ".pth", True, "dseq_official", "dseq_jepa_vit_ti16.in1k_official"),
        (layouts.save_ijepa, ".pth.tar", False, "ijepa", "vit_tiny_patch16_224.ijepa"),
    ],
)
def test_each_kind_becomes_a_folder_that_holds_its_target_encoder(tmp_path, save, suffix, class_token, kind, name):
    shapes = layouts.encoder_shapes(class_token=class_token)
    target, student = layouts.random_weights(shapes, 1), layouts.random_weights(shapes, 2)
    predictor = layouts.random_weights(layouts.predictor_shapes(), 3)
    source = save(tmp_path / f"source{suffix}", target, student, predictor)

    result = convert(source, tmp_path / "out", with_pretraining_state=True)
    assert (result["kind"], result["model"], result["tensors"]) == (kind, name, len(target))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored.keys() == target.keys() and all(torch.equal(stored[key], target[key]) for key in target)
    loaded = _loaded(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[key], target[key]) for key in target)
    rest = load_file(tmp_path / "out" / "pretraining.safetensors")
    assert rest.keys() == {f"student.{key}" for key in student} | {f"predictor.{key}" for key in predictor}
    assert torch.equal(rest["student.norm.weight"], student["norm.weight"])

    student_only = convert(source, tmp_path / "student", encoder="student")
    assert "target" in student_only["left_out"] and "predictor" in student_only["left_out"]
    assert torch.equal(load_file(tmp_path / "student" / "model.safetensors")["norm.weight"], student["norm.weight"])


@pytest.mark.parametrize(
    ("shapes", "stock", "args"),
    [
        (
            layouts.encoder_shapes(1280, 32, 14, 16, class_token=False),
            "vit_huge_patch14_224",
            {"class_token": False, "global_pool": "avg", "fc_norm": False},
        ),
        (
            layouts.encoder_shapes(1280, 32, 16, 28, class_token=False),
            "vit_huge_patch16_gap_448",
            {"class_token": False, "global_pool": "avg", "fc_norm": False},
        ),
        (
            layouts.encoder_shapes(768, 12, 16, 14),
            "vit_base_patch16_224",
            {"class_token": True, "no_embed_class": True, "global_pool": "avg", "fc_norm": False},
        ),
    ],
)
def test_the_released_sizes_are_recognised(tmp_path, shapes, stock, args):
    """Meta's ViT-H/14 and ViT-H/16 at 448, the authors' ViT-B/16, in their true shapes."""
    hollow = layouts.hollow_weights(shapes)
    file = layouts.save_ijepa(tmp_path / "jepa.pth.tar", hollow, hollow, {})
    weights = parse(read(file)).encoder()
    backbone = detect(weights)
    assert (backbone.stock, backbone.model_args) == (stock, args)
    check_fit(weights, backbone)
    assert backbone.blueprint.blocks[0].attn.num_heads == {768: 12, 1280: 16}[shapes["norm.weight"][0]]


def test_metas_vit_g_is_recognised():
    shapes = layouts.encoder_shapes(1408, 40, 16, 14, class_token=False)
    for name, (out, *rest) in list(shapes.items()):  # its MLP is 48 / 11 times as wide
        if ".fc1." in name:
            shapes[name] = (6144, *rest)
        if name.endswith("fc2.weight"):
            shapes[name] = (out, 6144)
    weights = layouts.hollow_weights(shapes)
    check_fit(weights, detect(weights))
    assert detect(weights).stock == "vit_giant_patch16_gap_224"


def test_a_stock_timm_vit_keeps_its_outputs_head_included(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7).eval()
    torch.save({"state_dict": model.state_dict(), "arch": "vit"}, tmp_path / "timm.pth")
    result = convert(tmp_path / "timm.pth", tmp_path / "out", license="mit")
    assert (result["model"], result["left_out"]) == ("vit_tiny_patch16_224.converted", ["arch"])
    image = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(_loaded(tmp_path / "out")(image), model(image))
    assert "license: mit" in (tmp_path / "out" / "README.md").read_text()


def test_other_patches_depths_channels_and_sizes_are_kept(tmp_path):
    torch.manual_seed(0)
    args = {"class_token": True, "no_embed_class": True, "global_pool": "avg", "fc_norm": False, "num_classes": 0}
    model = timm.create_model("vit_tiny_patch16_224", patch_size=8, depth=3, in_chans=1, img_size=64, **args).eval()
    save_file(model.state_dict(), tmp_path / "small.safetensors")
    convert(tmp_path / "small.safetensors", tmp_path / "out")
    loaded, image = _loaded(tmp_path / "out"), torch.randn(2, 1, 64, 64)
    torch.testing.assert_close(loaded(image), model(image))


def test_positions_are_resampled_only_when_asked(tmp_path, roles):
    source = layouts.save_training(tmp_path / "w.safetensors", **roles)
    convert(source, tmp_path / "same")
    assert load_file(tmp_path / "same" / "model.safetensors")["pos_embed"].shape == (1, 196, 192)
    convert(source, tmp_path / "other", img_size=(192, 320))
    assert load_file(tmp_path / "other" / "model.safetensors")["pos_embed"].shape == (1, 240, 192)
    expected = timm.create_model(f"local-dir:{tmp_path / 'same'}", pretrained=True, img_size=(192, 320)).eval()
    image = torch.randn(1, 3, 192, 320)
    torch.testing.assert_close(_loaded(tmp_path / "other")(image), expected(image))
    with pytest.raises(UserError, match="200 320 is not divisible by the patch 16×16"):
        convert(source, tmp_path / "no", img_size=(200, 320))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_storage_is_a_rounding_of_the_weights(tmp_path, roles, dtype):
    source = layouts.save_training(tmp_path / "w.safetensors", **roles)
    convert(source, tmp_path / "out", dtype=dtype)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(stored[key], roles["target"][key].to(getattr(torch, dtype))) for key in stored)


def test_keys_that_do_not_fit_are_named(tmp_path, roles):
    cases = {
        "blocks.3.mlp.fc1.bias is not in the checkpoint": lambda w: w.pop("blocks.3.mlp.fc1.bias"),
        "stranger has no place in the model": lambda w: w.update(stranger=torch.zeros(1)),
        r"norm.weight is \(191,\) in the checkpoint and \(192,\)": lambda w: w.update(
            {"norm.weight": torch.zeros(191)}
        ),
        "it has no pos_embed": lambda w: w.pop("pos_embed"),
        "pos_embed holds 195 positions": lambda w: w.update(pos_embed=torch.zeros(1, 195, 192)),
    }
    for number, (message, spoil) in enumerate(cases.items()):
        weights = dict(roles["target"])
        spoil(weights)
        save_file(weights, tmp_path / f"{number}.safetensors")
        with pytest.raises(UserError, match=message) as error:
            convert(tmp_path / f"{number}.safetensors", tmp_path / "out")
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_an_unknown_width_asks_for_the_name(tmp_path):
    save_file(layouts.random_weights(layouts.encoder_shapes(width=256, depth=2), 1), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"256 wide is not known.*--model"):
        convert(tmp_path / "w.safetensors", tmp_path / "out")
    with pytest.raises(UserError, match=r"nonsense is no model of timm"):
        convert(tmp_path / "w.safetensors", tmp_path / "out", model="nonsense")


def test_nothing_is_left_behind_when_writing_fails(tmp_path, roles, monkeypatch):
    source = layouts.save_training(tmp_path / "w.safetensors", **roles)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("timm_dseq.convert.save_file", full)
    with pytest.raises(UserError, match=r"out cannot be written .No space left on device"):
        convert(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w.safetensors"]


def test_an_existing_folder_is_not_overwritten(tmp_path, roles):
    source = layouts.save_training(tmp_path / "w.safetensors", **roles)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out exists already"):
        convert(source, tmp_path / "out")


def test_a_missing_role_is_named(tmp_path, roles):
    save_file(roles["target"], tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="holds no student and predictor"):
        convert(tmp_path / "w.safetensors", tmp_path / "out", with_pretraining_state=True)


def test_the_config_names_the_stock_architecture_and_architecture_keys_only(exported):
    config = json.loads((exported / "config.json").read_text())
    assert config["architecture"] == "vit_tiny_patch16_224"
    assert config["model_args"].keys() == {"class_token", "no_embed_class", "global_pool", "fc_norm"}
