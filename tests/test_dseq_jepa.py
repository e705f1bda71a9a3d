"""The backbones do everything that users of timm do. Contracts run two blocks deep, at every name's own width."""

import io
import re
import sys
import warnings

import pytest
import timm
import timm.optim
import torch
from safetensors.torch import save_file
from timm.models import group_parameters
from timm.models.vision_transformer import VisionTransformer

import timm_dseq
from timm_dseq import UserError
from timm_dseq.dseq_jepa import ARCHITECTURES, BACKBONE, META, SHIPPED, STOCK, TAGS, default_cfgs
from timm_dseq.positions import sincos_positions

from . import layouts

NAMES = list(ARCHITECTURES)
each_name = pytest.mark.parametrize("name", NAMES)


def shallow(name, **kwargs):
    return timm.create_model(name, depth=2, **kwargs).eval()


def image_for(model, batch=1):
    return torch.randn(batch, 3, *model.patch_embed.img_size)


def test_the_registry_knows_names_and_tags_and_claims_the_weights_that_it_has():
    assert sorted(timm.list_models("dseq*")) == sorted(NAMES)
    tagged = {f"{name}.{tag}" for name in NAMES for tag in TAGS}
    assert set(timm.list_models("dseq*", include_tags=True)) == tagged | SHIPPED.keys() | META.keys()
    assert timm.list_pretrained("dseq*") == [*SHIPPED]
    assert timm.list_models(module="dseq_jepa") == timm.list_models("dseq*")
    first = {name.partition(".")[0]: name.partition(".")[2] for name in SHIPPED}
    assert all(cfgs.tags[0] == first.get(name, "in1k") for name, cfgs in default_cfgs.items())


@each_name
def test_each_model_is_the_stock_vit_it_names(name):
    """Same parameters, and with the same weights the same outputs: what lets stock timm load our exports."""
    with torch.device("meta"):
        ours, stock = timm.create_model(f"{name}.in1k"), timm.create_model(STOCK[name], num_classes=0, **BACKBONE)
    assert isinstance(ours, VisionTransformer)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in stock.state_dict().items()}
    assert ours.patch_embed.img_size == stock.patch_embed.img_size

    args = {"depth": 1, "img_size": 4 * ours.patch_embed.patch_size[0]}
    ours = timm.create_model(name, **args).eval()
    stock = timm.create_model(STOCK[name], num_classes=0, **args, **BACKBONE).eval()
    stock.load_state_dict(ours.state_dict())
    image = image_for(ours)
    assert torch.equal(ours(image), stock(image))


@each_name
def test_widths_heads_and_input_are_the_papers(name):
    heads = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
    with torch.device("meta"):
        model = timm.create_model(f"{name}.in1k")
    assert model.blocks[0].attn.num_heads == heads[model.embed_dim]
    assert model.patch_embed.patch_size == ((14, 14) if name.endswith("h14") else (16, 16))
    config = timm.data.resolve_data_config({}, model=model)
    assert config["input_size"] == ((3, 448, 448) if name.endswith("448") else (3, 224, 224))
    assert config["mean"] == timm.data.IMAGENET_DEFAULT_MEAN and config["std"] == timm.data.IMAGENET_DEFAULT_STD
    assert (config["interpolation"], config["crop_pct"]) == ("bicubic", 0.875)
    assert model.num_classes == 0 and model.has_class_token and model.no_embed_class


@pytest.mark.parametrize(("ours", "theirs"), META.items())
def test_metas_weights_are_prepared_for_as_timm_does(ours, theirs):
    ours, theirs = timm.get_pretrained_cfg(ours), timm.get_pretrained_cfg(theirs)
    words = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std", "license")
    assert [getattr(ours, word) for word in words] == [getattr(theirs, word) for word in words]


def test_the_feature_is_the_mean_of_the_normed_patch_tokens():
    model = shallow("dseq_jepa_vit_ti16.in1k")
    image = image_for(model, 2)
    tokens = model.forward_features(image)
    assert tokens.shape == (2, 197, 192)
    torch.testing.assert_close(model(image), tokens[:, 1:].mean(1))
    torch.testing.assert_close(tokens.mean(-1), torch.zeros(2, 197), atol=1e-5, rtol=0)  # after the final norm


def test_the_class_token_carries_no_position():
    model = shallow("dseq_jepa_vit_ti16.in1k")
    assert model.pos_embed.shape == (1, 196, 192)
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(image_for(model))
    assert torch.equal(seen[0][:, :1], model.cls_token)


@pytest.mark.parametrize("size", [224, (192, 256)])
def test_initial_weights_are_ijepas(size):
    torch.manual_seed(0)
    model = timm.create_model("dseq_jepa_vit_s16", img_size=size)
    grid = model.patch_embed.grid_size
    torch.testing.assert_close(model.pos_embed[0], sincos_positions(grid, 384))
    assert model.pos_embed.requires_grad
    for index, block in enumerate(model.blocks, start=1):
        assert block.attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert block.attn.proj.weight.std().item() == pytest.approx(0.02 / (2 * index) ** 0.5, rel=0.03)
        assert block.mlp.fc2.weight.std().item() == pytest.approx(0.02 / (2 * index) ** 0.5, rel=0.03)
        assert block.attn.qkv.bias.abs().max() == 0 and block.mlp.fc1.bias.abs().max() == 0
    assert model.patch_embed.proj.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert model.patch_embed.proj.bias.abs().max() == 0


def test_timms_own_initialisations_stay_available():
    torch.manual_seed(0)
    model = timm.create_model("dseq_jepa_vit_ti16.in1k", weight_init="jax")
    assert (model.pos_embed[0] - sincos_positions((14, 14), 192)).abs().max() > 0.1
    fixed = timm.create_model("dseq_jepa_vit_ti16", fix_init=True)
    assert fixed.blocks[0].attn.proj.weight.std().item() == pytest.approx(0.02 / 2**0.5, rel=0.03)


def test_a_model_materialised_from_the_meta_device_is_initialised():
    with torch.device("meta"):
        model = timm.create_model("dseq_jepa_vit_ti16", depth=2)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu").init_weights()
    torch.testing.assert_close(model.pos_embed[0], sincos_positions(model.patch_embed.grid_size, 192))
    assert torch.isfinite(model(image_for(model))).all()


@each_name
@pytest.mark.parametrize("pool", ["token", "map", "avg", ""])
def test_arguments_of_timm_users_build_and_run(name, pool):
    patch = ARCHITECTURES[name]["patch_size"]
    size = (12 * patch, 16 * patch)
    model = timm.create_model(
        name,
        depth=2,
        num_classes=10,
        in_chans=1,
        img_size=size,
        dynamic_img_size=True,
        drop_path_rate=0.1,
        global_pool=pool,
    )
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
    for side in (size, (4 * patch, 6 * patch)):
        logits = model(torch.randn(2, 1, *side))
        assert logits.shape == ((2, 10) if pool else (2, 1 + (side[0] // patch) * (side[1] // patch), 10))
    logits.float().mean().backward()
    unused = [n for n, parameter in model.named_parameters() if parameter.grad is None]
    assert not unused


@each_name
def test_features_and_intermediates(name):
    model = shallow(name)
    image, grid = image_for(model), model.patch_embed.grid_size
    final, (first, second) = model.forward_intermediates(image, norm=True)
    assert first.shape == second.shape == (1, model.embed_dim, *grid)
    torch.testing.assert_close(final[:, 1:], second.flatten(2).mT)
    (layer,) = model.get_intermediate_layers(image, n=1, reshape=True, norm=True)
    torch.testing.assert_close(layer, second)
    features = timm.create_model(name, depth=2, features_only=True, out_indices=(0, 1)).eval()
    assert [f.shape[1:] for f in features(image)] == [(model.embed_dim, *grid)] * 2
    assert features.feature_info.reduction() == [ARCHITECTURES[name]["patch_size"]] * 2


@each_name
def test_pruning_keeps_the_features_of_the_blocks_that_stay(name):
    model = shallow(name)
    image = image_for(model)
    expected = model.forward_intermediates(image, indices=[0], intermediates_only=True)[0]
    model.prune_intermediate_layers([0], prune_norm=True)
    assert len(model.blocks) == 1
    torch.testing.assert_close(model.forward_intermediates(image, intermediates_only=True)[0], expected)


@each_name
def test_input_size_and_patch_size_change_after_the_build(name):
    model = shallow(name)
    patch = ARCHITECTURES[name]["patch_size"]
    model.set_input_size(img_size=(6 * patch, 10 * patch))
    assert model.pos_embed.shape[1] == 60 and model(torch.randn(1, 3, 6 * patch, 10 * patch)).isfinite().all()
    model.set_input_size(img_size=(64, 96), patch_size=(8, 8))
    assert model(torch.randn(1, 3, 64, 96)).isfinite().all()
    assert shallow(name, patch_size=8, img_size=64)(torch.randn(1, 3, 64, 64)).isfinite().all()


@each_name
def test_reset_classifier_layer_decay_and_weight_decay(name):
    with torch.device("meta"):
        model = timm.create_model(name)
        model.reset_classifier(5, "token")
    assert model.head.out_features == 5 and model.global_pool == "token"
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    depth = ARCHITECTURES[name]["depth"]
    assert groups["cls_token"] == groups["pos_embed"] == groups["patch_embed.proj.weight"] == 0
    assert [groups[f"blocks.{i}.attn.qkv.weight"] for i in range(depth)] == list(range(1, depth + 1))
    assert groups["head.weight"] > depth
    assert {"pos_embed", "cls_token"} <= model.no_weight_decay()
    decayed = timm.optim.param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.75)
    assert {group["lr_scale"] for group in decayed} >= {0.75**0, 0.75**depth}


@each_name
def test_gradient_checkpointing_changes_no_gradient(name):
    torch.manual_seed(0)
    model = shallow(name, img_size=4 * ARCHITECTURES[name]["patch_size"], num_classes=3)
    image = image_for(model, 2)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(image).square().sum().backward()
        gradients.append(model.patch_embed.proj.weight.grad.clone())
    torch.testing.assert_close(*gradients)


@each_name
def test_script_fx_export_and_compile_keep_the_outputs(name):
    from torchvision.models.feature_extraction import create_feature_extractor

    model = shallow(name, img_size=4 * ARCHITECTURES[name]["patch_size"])
    image = image_for(model)
    expected = model(image)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript's own deprecation
        buffer = io.BytesIO()
        torch.jit.save(torch.jit.script(model), buffer)
        buffer.seek(0)
        torch.testing.assert_close(torch.jit.load(buffer)(image), expected)
    extractor = create_feature_extractor(model, ["blocks.1"])
    assert extractor(image)["blocks.1"].shape == (1, 17, model.embed_dim)
    torch.testing.assert_close(torch.export.export(model, (image,)).module()(image), expected)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(image), expected)


def test_onnx_keeps_the_outputs(tmp_path):
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    model = shallow("dseq_jepa_vit_ti16", img_size=64)
    image = image_for(model)
    torch.onnx.export(model, (image,), tmp_path / "model.onnx", dynamo=True)
    onnx.checker.check_model(str(tmp_path / "model.onnx"))
    (found,) = ReferenceEvaluator(str(tmp_path / "model.onnx")).run(None, {"x": image.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(image), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_the_largest_model_runs_at_its_own_size():
    """timm's suite skips images of 448."""
    model = timm.create_model("dseq_jepa_vit_h16_448").eval()
    with torch.inference_mode():
        features = model(image_for(model))
    assert features.shape == (1, 1280) and features.isfinite().all()
    assert len(model.blocks) == 32 and model.patch_embed.grid_size == (28, 28)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_token": False}, "always has a class token.*vit_tiny_patch16_224 with class_token=False"),
        ({"reg_tokens": 4}, "no register tokens.*reg_tokens=4"),
        ({"use_naflex": True}, "plain ViT.*dynamic_img_size=True"),
        ({"img_size": 200}, r"img_size=\(200, 200\) is not divisible by the patch \(16, 16\).*dynamic_img_pad=True"),
        ({"img_size": (224, 100)}, r"\(224, 100\) is not divisible"),
        ({"img_size": -16}, "-16 is no image size"),
        ({"img_size": "224"}, "'224' is no image size"),
        ({"img_size": (3, 224, 224)}, "is no image size"),
        ({"patch_size": 0}, "patch_size=0 is no patch size"),
        ({"num_classes": -1}, "num_classes=-1 is no class count"),
        ({"num_classes": 10.0}, "num_classes=10.0 is no class count"),
        ({"num_classes": "ten"}, "num_classes='ten' is no class count"),
        ({"in_chans": 0}, "in_chans=0 is no channel count"),
    ],
)
@pytest.mark.parametrize("pretrained", [False, True])
def test_arguments_that_cannot_work_are_refused_in_one_line(arguments, message, pretrained):
    with pytest.raises(UserError, match=message) as error:
        timm.create_model("dseq_jepa_vit_ti16", pretrained=pretrained, **arguments)
    assert "\n" not in str(error.value)


def test_unknown_arguments_are_still_an_error():
    with pytest.raises(TypeError, match="not_an_argument"):
        timm.create_model("dseq_jepa_vit_ti16", not_an_argument=1)


def test_padding_admits_sizes_that_are_no_multiple():
    model = shallow("dseq_jepa_vit_ti16", img_size=(100, 200), dynamic_img_pad=True, dynamic_img_size=True)
    assert model(torch.randn(1, 3, 100, 200)).shape == (1, 192)


@pytest.mark.parametrize("name", ["dseq_jepa_vit_b16", "dseq_jepa_vit_h16_448.in1k_official"])
def test_unpublished_weights_are_one_line_with_the_mend_before_anything_is_built(name, monkeypatch):
    monkeypatch.setattr(timm_dseq.dseq_jepa, "build_model_with_cfg", lambda *a, **k: pytest.fail("it was built"))
    with pytest.raises(UserError, match=re.escape(name)) as error:
        timm.create_model(name, pretrained=True)
    assert "\n" not in str(error.value)
    assert all(
        word in str(error.value)
        for word in ("timm-dseq get", "timm-dseq convert", "timm-dseq push", "TIMM_DSEQ_NAMESPACE")
    )


class TestPretrained:
    """Loading weights, here from a file: the download is tested in hub/test_download.py."""

    NAME = "dseq_jepa_vit_ti16.in1k"

    @pytest.fixture
    def load(self, tmp_path, roles):
        def load(weights=None, **kwargs):
            save_file(roles["target"] if weights is None else weights, tmp_path / "w.safetensors")
            overlay = {"file": str(tmp_path / "w.safetensors")}
            return timm.create_model(self.NAME, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()

        return load

    def test_every_weight_is_loaded(self, load, roles):
        model = load()
        assert all(torch.equal(tensor, roles["target"][name]) for name, tensor in model.state_dict().items())

    def test_other_sizes_channels_and_feature_extraction(self, load, roles):
        assert load(img_size=(192, 256)).pos_embed.shape == (1, 192, 192)
        grey = load(in_chans=1).patch_embed.proj.weight
        torch.testing.assert_close(grey, roles["target"]["patch_embed.proj.weight"].sum(1, keepdim=True))
        features = load(features_only=True)(torch.randn(1, 3, 224, 224))
        assert features[-1].shape == (1, 192, 14, 14)

    @pytest.mark.parametrize(
        ("arguments", "fresh"),
        [({"num_classes": 10}, "head.weight, head.bias"), ({"global_pool": "map"}, "attn_pool.latent")],
    )
    def test_a_fresh_head_or_pool_is_named_in_a_warning(self, load, roles, arguments, fresh):
        with pytest.warns(UserWarning, match=f"freshly initialised: .*{fresh}"):
            model = load(**arguments)
        assert torch.equal(model.norm.weight, roles["target"]["norm.weight"])

    def test_without_anything_fresh_nothing_is_said(self, load):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load()

    def test_fc_norm_takes_the_weights_of_the_norm(self, load, roles):
        model = load(fc_norm=True)
        assert isinstance(model.norm, torch.nn.Identity)
        assert torch.equal(model.fc_norm.weight, roles["target"]["norm.weight"])

    def test_a_checkpoint_of_ours_or_of_ijepas_layout_gives_its_target(self, tmp_path, roles):
        for save, file in ((layouts.save_training, "w.safetensors"), (layouts.save_official, "w.pth")):
            save(tmp_path / file, **roles)
            overlay = {"file": str(tmp_path / file)}
            model = timm.create_model(self.NAME, pretrained=True, pretrained_cfg_overlay=overlay)
            assert torch.equal(model.norm.weight, roles["target"]["norm.weight"])

    @pytest.mark.parametrize(
        ("spoil", "arguments", "message"),
        [
            (lambda w: w.pop("blocks.5.attn.qkv.bias"), {"num_classes": 10}, "have no blocks.5.attn.qkv.bias"),
            (lambda w: w.update(stranger=torch.zeros(1)), {}, "also hold stranger"),
            (
                lambda w: w.update({"norm.bias": torch.zeros(1)}),
                {"num_classes": 10},
                r"norm.bias is \(1,\) in the file",
            ),
            (lambda w: None, {"depth": 6}, r"also hold blocks\.\d+"),
            (lambda w: None, {"init_values": 1e-5}, "have no blocks.0.ls1.gamma"),
            (lambda w: None, {"embed_dim": 384}, r"is \(1, 1, 192\) in the file and \(1, 1, 384\) in the model"),
        ],
    )
    def test_backbone_weights_that_do_not_all_fit_are_an_error(self, load, roles, spoil, arguments, message):
        weights = dict(roles["target"])
        spoil(weights)
        with pytest.raises(UserError, match=message) as error:
            load(weights, **arguments)
        assert "\n" not in str(error.value)

    def test_a_corrupt_file_is_named_before_the_build(self, tmp_path, monkeypatch):
        (tmp_path / "w.safetensors").write_bytes(b"not weights")
        monkeypatch.setattr(timm_dseq.dseq_jepa, "build_model_with_cfg", lambda *a, **k: pytest.fail("it was built"))
        overlay = {"file": str(tmp_path / "w.safetensors")}
        with pytest.raises(UserError, match=r"w\.safetensors is truncated or corrupt"):
            timm.create_model(self.NAME, pretrained=True, pretrained_cfg_overlay=overlay)


def test_the_namespace_gives_every_tag_its_repository(run_python):
    code = """
import timm, timm_dseq
names = [name for name in timm.list_pretrained("dseq*") if name not in timm_dseq.dseq_jepa.SHIPPED]
assert len(names) == 26, names
for name in names:
    cfg = timm.get_pretrained_cfg(name)
    assert (cfg.hf_hub_id, cfg.hf_hub_filename) == (f"some-lab/{name}", "model.safetensors")
"""
    run = run_python(code, TIMM_DSEQ_NAMESPACE="some-lab")
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    "namespace", ["some/lab", *(pytest.param(word, marks=pytest.mark.slow) for word in ("-lab", "a b"))]
)
def test_a_wrong_namespace_spoils_no_import_and_is_named_when_weights_are_asked_for(run_python, namespace):
    code = """
import timm_dseq, timm
from timm_dseq.cli import main
assert timm.list_pretrained("dseq*") == ["dseq_jepa_vit_ti16.photos65k"]
timm.create_model("dseq_jepa_vit_ti16", depth=1)
assert main(["models"]) == 1
timm.create_model("dseq_jepa_vit_s16", pretrained=True)
"""
    run = run_python(code, TIMM_DSEQ_NAMESPACE=namespace)
    lines = [
        line for line in run.stderr.splitlines() if f"TIMM_DSEQ_NAMESPACE={namespace!r} is no organisation" in line
    ]
    assert run.returncode and len(lines) == 2 and lines[0].startswith("timm-dseq models: "), run.stderr
    assert lines[1] == run.stderr.splitlines()[-1]


def test_importing_loads_no_third_party_module_that_timm_does_not(run_python):
    code = """
import sys, timm
before = set(sys.modules)
import timm_dseq
new = {name for name in set(sys.modules) - before if name.split(".")[0] not in sys.stdlib_module_names}
print(sorted(name for name in new if name.split(".")[0] != "timm_dseq"))
"""
    run = run_python(code)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr


def test_stock_timm_alone_does_not_know_the_names(run_python):
    """Nothing of ours runs at start-up: without the import the name is unknown, as for any timm plug-in."""
    run = run_python("import timm; timm.create_model('dseq_jepa_vit_b16')")
    assert "Unknown model (dseq_jepa_vit_b16)" in run.stderr.splitlines()[-1]
    assert sys.version_info >= (3, 10)
