import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from timm_dseq import UserError
from timm_dseq.hub.convert import convert
from timm_dseq.hub.load import load_backbone
from timm_dseq.hub.stock import check_fit, detect
from timm_dseq.hub.verify import verify
from timm_dseq.hub.weights import parse, read

from .. import layouts


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

    cards = [(tmp_path / "out" / "README.md").read_text()]
    student_only = convert(source, tmp_path / "student", encoder="student")
    cards.append((tmp_path / "student" / "README.md").read_text())
    lone = convert(save(tmp_path / f"lone{suffix}", {}, student, predictor), tmp_path / "lone")
    cards.append((tmp_path / "lone" / "README.md").read_text())
    assert [result["encoder"], student_only["encoder"], lone["encoder"]] == ["target", "student", "lone student"]
    said = ["the target encoder (the moving average)", "not the target encoder", "its checkpoint held no target"]
    assert [[words in card for words in said] for card in cards] == torch.eye(3).bool().tolist()
    assert "target" in student_only["left_out"] and "predictor" in student_only["left_out"]
    assert torch.equal(load_file(tmp_path / "student" / "model.safetensors")["norm.weight"], student["norm.weight"])


@pytest.mark.parametrize(
    ("shapes", "architecture", "args"),
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
def test_the_released_sizes_are_recognised(tmp_path, shapes, architecture, args):
    """Meta's ViT-H/14 and ViT-H/16 at 448, the authors' ViT-B/16, in their true shapes."""
    hollow = layouts.hollow_weights(shapes)
    file = layouts.save_ijepa(tmp_path / "jepa.pth.tar", hollow, hollow, {})
    weights = parse(read(file)).encoder()
    stock = detect(weights)
    assert (stock.architecture, stock.model_args) == (architecture, args)
    check_fit(weights, stock)
    assert stock.blueprint.blocks[0].attn.num_heads == {768: 12, 1280: 16}[shapes["norm.weight"][0]]


def test_metas_vit_g_is_recognised():
    shapes = layouts.encoder_shapes(1408, 40, 16, 14, class_token=False)
    for name, (out, *rest) in list(shapes.items()):  # its MLP is 48 / 11 times as wide
        if ".fc1." in name:
            shapes[name] = (6144, *rest)
        if name.endswith("fc2.weight"):
            shapes[name] = (out, 6144)
    weights = layouts.hollow_weights(shapes)
    check_fit(weights, detect(weights))
    assert detect(weights).architecture == "vit_giant_patch16_gap_224"


def test_a_stock_timm_vit_keeps_its_outputs_head_included(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7).eval()
    torch.save({"state_dict": model.state_dict(), "arch": "vit"}, tmp_path / "timm.pth")
    result = convert(tmp_path / "timm.pth", tmp_path / "out", license="mit")
    assert (result["model"], result["left_out"]) == ("vit_tiny_patch16_224.converted", ["arch"])
    image = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(_loaded(tmp_path / "out")(image), model(image))
    assert "license: mit" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    "args", [{}, {"no_embed_class": True, "global_pool": "avg", "fc_norm": False}, {"init_values": 0.1}]
)
def test_registers_and_layer_scale_show_in_the_weights(args, tmp_path):
    torch.manual_seed(0)
    args = {"reg_tokens": 3, "depth": 2, "img_size": 64, "num_classes": 0, **args}
    model = timm.create_model("vit_tiny_patch16_224", **args).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    save_file(model.state_dict(), tmp_path / "some.safetensors")
    result = convert(tmp_path / "some.safetensors", tmp_path / "out")
    image = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(_loaded(tmp_path / "out")(image), model(image))
    loaded, shown = load_backbone(str(tmp_path / "some.safetensors"))
    torch.testing.assert_close(loaded.forward_features(image), model.forward_features(image))
    assert result["assumed_heads"] == 3 and shown.endswith("some.safetensors (3 heads assumed)")


def test_heads_that_a_description_tells_are_not_assumed(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32)
    save_file(model.state_dict(), tmp_path / "some.safetensors")
    assert convert(tmp_path / "some.safetensors", tmp_path / "out")["assumed_heads"] == 3
    assert convert(tmp_path / "out", tmp_path / "again")["assumed_heads"] is None
    named = convert(tmp_path / "some.safetensors", tmp_path / "named", model="vit_tiny_patch16_224")
    assert named["assumed_heads"] is None


def test_registers_of_no_shape_are_one_line(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, depth=1)
    save_file({**model.state_dict(), "reg_token": torch.zeros(4)}, tmp_path / "some.safetensors")
    with pytest.raises(UserError, match=r"^reg_token is \(4,\), no registers of a ViT"):
        convert(tmp_path / "some.safetensors", tmp_path / "out")


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks.3.mlp.fc1.bias": None}, "blocks.3.mlp.fc1.bias is not in the checkpoint"),
        ({"stranger": torch.zeros(1)}, "stranger has no place in the model"),
        ({"blocks.x.foo": torch.zeros(1)}, "blocks.x.foo has no place in the model"),
        ({"blocks.999999.foo": torch.zeros(1)}, r"blocks\.\S+ is not in the checkpoint"),
        ({"norm.weight": torch.zeros(191)}, r"norm.weight is \(191,\) in the checkpoint and \(192,\)"),
        ({"pos_embed": None}, "it has no pos_embed"),
        ({"pos_embed": torch.zeros(1, 195, 192)}, "pos_embed holds 195 positions"),
        ({"pos_embed": torch.zeros(3)}, r"its pos_embed is \(3,\)"),
        ({"pos_embed": torch.zeros(1, 0, 192)}, r"its pos_embed is \(1, 0, 192\)"),
        ({"patch_embed.proj.weight": torch.zeros(3)}, r"its patch_embed.proj.weight is \(3,\)"),
        ({"patch_embed.proj.weight": torch.zeros(192, 3, 0, 0)}, r"its patch_embed.proj.weight is \(192, 3, 0, 0\)"),
        ({"head.weight": torch.tensor(1.0)}, r"head.weight is \(\)"),
    ],
)
@pytest.mark.parametrize("model", [None, "dseq_jepa_vit_ti16"])
def test_weights_that_do_not_fit_are_named(tmp_path, roles, changes, message, model):
    weights = {name: tensor for name, tensor in {**roles["target"], **changes}.items() if tensor is not None}
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=message if model is None else None) as error:
        convert(tmp_path / "w.safetensors", tmp_path / "out", model=model)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
    if model:
        assert "name it with" not in str(error.value) and "name its model" not in str(error.value)
        assert next(iter(changes)).split(".")[0] in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"img_size": (0, 0)}, "--img-size 0 0 is no image size"),
        ({"img_size": (-16, 224)}, "--img-size -16 224 is no image size"),
        ({"img_size": (16 * 10**18, 16)}, "--img-size 16000000000000000000 16 is no image size"),
        ({"img_size": (10**5, 10**5)}, "two numbers from 1, of at most 134,217,728 pixels together"),
        ({"model": "resnet50"}, "resnet50 .*no plain ViT"),
        ({"model": "swin_tiny_patch4_window7_224"}, "swin_tiny_patch4_window7_224 .*no plain ViT"),
        ({"model": "vit_small_patch16_224"}, r"\(1, 1, 192\) in the checkpoint and \(1, 1, 384\) in .*: check --model"),
        ({"model": ""}, "An empty name is no model"),
        ({"license": "cc0-1.0", "model": "nonsense"}, "nonsense is no model"),
    ],
)
def test_arguments_that_cannot_work_are_one_line(tmp_path, roles, arguments, message):
    source = layouts.save_training(tmp_path / "w.safetensors", **roles)
    with pytest.raises(UserError, match=message) as error:
        convert(source, tmp_path / "out", **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "built", "asked", "size"),
    [
        ("vit_small_patch14_dinov2", 224, None, (224, 224)),  # not its native 518
        ("vit_tiny_patch16_224", (96, 160), (96, 160), (96, 160)),  # no square: the size asked for is that of the file
        ("vit_tiny_patch16_224", 96, (96, 160), (96, 160)),  # a square, resampled
    ],
)
def test_a_named_model_takes_its_size_from_the_positions(tmp_path, name, built, asked, size):
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=built, num_classes=0).eval()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    convert(tmp_path / "w.safetensors", tmp_path / "out", model=name, img_size=asked)
    loaded, image = _loaded(tmp_path / "out"), torch.randn(1, 3, *size)
    model.set_input_size(img_size=size)
    torch.testing.assert_close(loaded(image), model(image))


def test_positions_of_no_square_ask_for_the_size(tmp_path):
    weights = layouts.random_weights(layouts.encoder_shapes(depth=2) | {"pos_embed": (1, 60, 192)}, 1)
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"60 positions, which is no square image: .*--model NAME --img-size H W"):
        convert(tmp_path / "w.safetensors", tmp_path / "out")
    for size in (None, (96, 96)):
        with pytest.raises(UserError, match=r"pos_embed is \(1, 60, 192\) .*--img-size H W"):
            convert(tmp_path / "w.safetensors", tmp_path / "out", model="dseq_jepa_vit_ti16", img_size=size)


@pytest.mark.parametrize(
    ("save", "model"),
    [
        (layouts.save_training, None),
        (layouts.save_official, None),
        (layouts.save_training, "vit_tiny_patch16_224.mine"),
    ],
)
def test_card_and_config_carry_the_licence_asked_for(tmp_path, roles, save, model):
    if model:
        save_file(timm.create_model("vit_tiny_patch16_224").state_dict(), source := tmp_path / "w.safetensors")
    else:
        source = save(tmp_path / f"w.{'pth' if save is layouts.save_official else 'safetensors'}", **roles)
    convert(source, tmp_path / "out", license="cc-by-4.0", model=model)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    card = (tmp_path / "out" / "README.md").read_text()
    assert config["pretrained_cfg"]["license"] == "cc-by-4.0"
    assert "\nlicense: cc-by-4.0\n" in card and card.split("## Licence\n\n")[1].startswith("cc-by-4.0")
    assert "pache" not in card and "not-stated" not in card and "no licence is stated" not in card


def test_metas_licence_cannot_be_exchanged(tmp_path):
    weights = layouts.random_weights(layouts.encoder_shapes(class_token=False), 1)
    source = layouts.save_ijepa(tmp_path / "jepa.pth.tar", weights, weights, {})
    with pytest.raises(UserError, match=r"Meta's I-JEPA .*cc-by-nc-4\.0, not mit: leave --license out"):
        convert(source, tmp_path / "out", license="mit")
    convert(source, tmp_path / "out", license="cc-by-nc-4.0")


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

    monkeypatch.setattr("timm_dseq.hub.convert.save_tensors", full)
    with pytest.raises(UserError, match=r"out cannot be written .No space left on device"):
        convert(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w.safetensors"]


def test_an_existing_folder_is_not_overwritten(tmp_path, roles):
    source = layouts.save_training(tmp_path / "w.safetensors", **roles)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out exists already"):
        convert(source, tmp_path / "out")


def test_a_file_in_the_way_of_the_folder_is_named(tmp_path, roles):
    source = layouts.save_training(tmp_path / "w.safetensors", **roles)
    for output in (source / "out", source / "deep" / "out"):
        with pytest.raises(UserError, match=r"w\.safetensors is a file, no folder: name another --output"):
            convert(source, output)


def test_a_missing_role_is_named(tmp_path, roles):
    save_file(roles["target"], tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="holds no student and predictor"):
        convert(tmp_path / "w.safetensors", tmp_path / "out", with_pretraining_state=True)


def test_the_config_names_the_stock_architecture_and_architecture_keys_only(exported):
    config = json.loads((exported / "config.json").read_text())
    assert config["architecture"] == "vit_tiny_patch16_224"
    assert config["model_args"].keys() == {"class_token", "no_embed_class", "global_pool", "fc_norm"}


def spoilt(how):
    """Weights of a ViT of which one is no weight."""
    weights = layouts.random_weights(layouts.encoder_shapes(), 1)
    weights["norm.bias"] = {
        "nan": torch.full((192,), torch.nan),
        "inf": torch.full((192,), torch.inf),
        "whole numbers": torch.arange(192),
        "complex numbers": torch.zeros(192, dtype=torch.complex64),
        "truths": torch.zeros(192, dtype=torch.bool),
        "eight bits": torch.zeros(192).to(torch.float8_e4m3fn),
    }[how]
    return weights


@pytest.mark.parametrize("how", ["nan", "inf", "whole numbers", "complex numbers", "truths", "eight bits"])
def test_what_is_no_weight_is_not_stored(how, tmp_path):
    torch.save(spoilt(how), tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"norm\.bias (is of type|holds numbers that are not finite)"):
        convert(tmp_path / "w.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_number_that_a_type_cannot_hold_is_not_made_infinite(tmp_path):
    weights = layouts.random_weights(layouts.encoder_shapes(), 1)
    weights["norm.bias"] += 1e6
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"norm\.bias holds numbers too large for float16: give --dtype bfloat16"):
        convert(tmp_path / "w.safetensors", tmp_path / "out", dtype="float16")
    convert(tmp_path / "w.safetensors", tmp_path / "out", dtype="bfloat16")


@pytest.mark.parametrize("student", [{"x": torch.zeros(3)}, None, "nan"])
def test_a_student_that_is_none_is_no_state_to_train_on(student, tmp_path):
    target = layouts.random_weights(layouts.encoder_shapes(), 1)
    student = (
        spoilt("nan")
        if student == "nan"
        else student or {**{name: w.clone() for name, w in target.items()}, "norm.bias": torch.zeros(3)}
    )
    predictor = layouts.random_weights(layouts.predictor_shapes(), 3)
    source = layouts.save_training(tmp_path / "w.safetensors", target, student, predictor)
    with pytest.raises(UserError, match=r"the student is not of the model|not finite"):
        convert(source, tmp_path / "out", with_pretraining_state=True)
    assert not (tmp_path / "out").exists()


def test_a_folder_keeps_what_its_config_says_of_the_preprocessing_and_the_model(tmp_path):
    torch.manual_seed(0)
    args = {"class_token": True, "no_embed_class": True, "global_pool": "avg", "fc_norm": False, "num_heads": 6}
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64, num_classes=0, **args).eval()
    first, second = tmp_path / "first", tmp_path / "second"
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    convert(tmp_path / "w.safetensors", first)
    config = json.loads((first / "config.json").read_text())
    config["model_args"]["num_heads"] = 6
    config["pretrained_cfg"] |= {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear", "crop_pct": 1.0}
    (first / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(config).encode())
    convert(first, second)
    again = json.loads((second / "config.json").read_text())
    for name in ("mean", "std", "interpolation", "crop_pct"):
        assert again["pretrained_cfg"][name] == config["pretrained_cfg"][name]
    image = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(_loaded(second)(image), model(image))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"interpolation": "wurst"}, "interpolation is 'wurst', none of bicubic"),
        ({"std": [0, 0, 0]}, "std is .*, of which each has to be above 0"),
        ({"mean": "x"}, "mean is 'x'"),
        ({"crop_mode": 3}, "crop_mode is 3"),
    ],
)
def test_preprocessing_that_is_none_is_named(change, says, tmp_path):
    save_file(layouts.random_weights(layouts.encoder_shapes(), 1), tmp_path / "w.safetensors")
    convert(tmp_path / "w.safetensors", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["pretrained_cfg"] |= change
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=says):
        convert(tmp_path / "out", tmp_path / "more")
    with pytest.raises(UserError, match=says):
        verify(tmp_path / "out")
