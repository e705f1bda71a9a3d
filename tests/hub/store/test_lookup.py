"""What is in the store is found by its name, offline; a name without a tag takes ours first, and says what it took."""

import logging

import pytest
import timm
import torch
from safetensors.torch import load_file

from timm_dseq import UserError
from timm_dseq.dseq_jepa import META_TAG, STOCK, default_cfgs
from timm_dseq.hub.load import data_config, load_backbone
from timm_dseq.hub.stock import described
from timm_dseq.hub.store.folders import weights_of

from .tiny_sources import META, OFFICIAL

each = pytest.mark.parametrize("name", [OFFICIAL, META])
LOG = "timm_dseq.hub.store.lookup"


@pytest.fixture
def nobody(drive, hub):
    """After the block of a test nobody has been asked for anything."""
    yield
    assert not hub.requests and not drive.requests


@pytest.fixture
def in_store(drive, bring, hub):
    """Bring weights by hand; returns the state that they hold."""

    def in_store(name):
        folder = bring(name)
        drive.requests.clear()
        hub.requests.clear()
        return load_file(folder / "model.safetensors")

    return in_store


@each
def test_a_tagged_name_loads_features_a_head_other_sizes_and_channels(in_store, nobody, name):
    weights = in_store(name)
    model = timm.create_model(name, pretrained=True).eval()
    assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 192) and (model.cls_token is None) == (name == META)
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())
    assert "file" not in model.pretrained_cfg and model.pretrained_cfg["tag"] == name.partition(".")[2]
    with pytest.warns(UserWarning, match="freshly initialised: head"):
        head = timm.create_model(name, pretrained=True, num_classes=7)
    assert head(torch.zeros(1, 3, 224, 224)).shape == (1, 7)
    other = timm.create_model(name, pretrained=True, img_size=128, in_chans=1)
    assert other(torch.zeros(1, 1, 128, 128)).shape == (1, 192)
    features = timm.create_model(name, pretrained=True, features_only=True)
    assert len(features(torch.zeros(1, 3, 224, 224))) == 3 and "file" not in features.pretrained_cfg


@each
def test_every_command_takes_the_name(in_store, nobody, name):
    weights = in_store(name)
    model, shown = load_backbone(name)
    assert shown == name and data_config(model)["input_size"] == (3, 224, 224)
    assert torch.equal(model.norm.weight, weights["norm.weight"])
    with pytest.raises(UserError, match=r"has no published weights: (?!.*timm-dseq get)"):  # it has none of this size
        load_backbone("dseq_jepa_vit_s16")


def test_metas_weights_keep_their_licence_and_have_no_class_token(in_store, nobody):
    in_store(META)
    assert timm.create_model(META, pretrained=True).pretrained_cfg["license"] == "cc-by-nc-4.0"
    with pytest.raises(UserError, match="has no class token, as Meta's I-JEPA: leave class_token out"):
        timm.create_model(META, class_token=True)
    for name in ("dseq_jepa_vit_h14", "dseq_jepa_vit_h16_448"):
        with torch.device("meta"):
            assert timm.create_model(f"{name}.{META_TAG}").cls_token is None
            assert timm.create_model(name).cls_token is not None
        # what a run that is told to build it will export
        stock = described(f"{name}.{META_TAG}", 224, {})
        assert stock.blueprint.cls_token is None and stock.architecture == STOCK[name]


def test_the_weights_in_this_package_come_before_the_store(in_store, nobody, caplog):
    weights = in_store(OFFICIAL)
    with caplog.at_level(logging.INFO, LOG):
        model = timm.create_model("dseq_jepa_vit_ti16", pretrained=True)
    assert not torch.equal(model.norm.weight, weights["norm.weight"])
    assert caplog.messages == ["dseq_jepa_vit_ti16: the weights are those of dseq_jepa_vit_ti16.photos65k"]


@pytest.fixture
def without_ours(monkeypatch):
    """As if this package held no weights of the smallest model."""
    monkeypatch.delitem(default_cfgs["dseq_jepa_vit_ti16"].cfgs, "photos65k")
    cfg = timm.get_pretrained_cfg("dseq_jepa_vit_ti16.in1k")
    monkeypatch.setitem(timm.models._registry._model_pretrained_cfgs, "dseq_jepa_vit_ti16", cfg)
    monkeypatch.setattr(timm.models._registry, "_model_has_pretrained", set())


def test_without_ours_a_name_without_a_tag_takes_the_stores_and_warns(in_store, nobody, without_ours, caplog, capsys):
    weights = in_store(OFFICIAL)
    model = timm.create_model("dseq_jepa_vit_ti16", pretrained=True)
    assert torch.equal(model.norm.weight, weights["norm.weight"]) and model.pretrained_cfg["tag"] == "in1k_official"
    assert caplog.messages == [f"dseq_jepa_vit_ti16: the weights are those of {OFFICIAL}, from the local store"]
    assert load_backbone("dseq_jepa_vit_ti16")[1] == OFFICIAL  # a table says whose they are
    fresh = timm.create_model("dseq_jepa_vit_ti16")
    assert not torch.equal(fresh.norm.bias, weights["norm.bias"])


def test_what_the_caller_names_comes_before_the_store(in_store, without_ours, exported, hub, tmp_path):
    weights = in_store(OFFICIAL)
    hub.add_repo("lab/x", {path.name: path.read_bytes() for path in exported.iterdir()})
    for overlay in ({"hf_hub_id": "lab/x"}, {"file": str(exported / "model.safetensors")}):
        for name in (OFFICIAL, "dseq_jepa_vit_ti16"):
            model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path)
            assert not torch.equal(model.norm.bias, weights["norm.bias"]), (name, overlay)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("dseq_jepa_vit_b16", "timm-dseq get dseq_jepa_vit_b16.in1k_official"),
        (
            "dseq_jepa_vit_b16.in1k",
            r"timm-dseq get dseq_jepa_vit_b16.in1k_official \(it loads as dseq_jepa_vit_b16.in1k_official\), ",
        ),
        ("dseq_jepa_vit_h14.in1k_ijepa_meta", "timm-dseq get dseq_jepa_vit_h14.in1k_ijepa_meta, "),
        ("dseq_jepa_vit_s16", "are here: convert a checkpoint"),  # nothing can be brought
        ("dseq_jepa_vit_ti16.in1k", "are here: take dseq_jepa_vit_ti16.photos65k, which is in this package, "),
    ],
)
def test_where_there_is_nothing_the_line_names_the_command_and_nobody_is_asked(store, nobody, name, command):
    with torch.device("meta"), pytest.raises(UserError, match=command) as error:
        timm.create_model(name, pretrained=True)
    assert "\n" not in str(error.value)


def test_weights_that_were_damaged_in_the_store_are_named_with_the_mend(in_store, nobody):
    in_store(OFFICIAL)
    with open(weights_of(OFFICIAL), "r+b") as file:
        file.truncate(10**6)
    with pytest.raises(UserError, match=f"truncated or corrupt .*timm-dseq get {OFFICIAL} brings it anew"):
        timm.create_model(OFFICIAL, pretrained=True)


@pytest.mark.parametrize("home", [None, pytest.param("/dev/null/nowhere", marks=pytest.mark.slow)])
def test_a_home_in_which_nothing_is_or_can_be_is_an_empty_store(run_python, nobody, home):
    """And an import does not look: it makes no folder, and is as cheap as before."""
    code = """
import sys, os, timm
before = set(sys.modules)
import timm_dseq
assert not {name for name in set(sys.modules) - before if "hub.store" in name or not name.startswith("timm_dseq")}
assert not os.path.exists(os.path.join(os.environ["HF_HOME"], "assets"))
timm.create_model("dseq_jepa_vit_ti16", pretrained=True)
timm.create_model("dseq_jepa_vit_b16", pretrained=True)
"""
    run = run_python(code, **({"HF_HOME": home} if home else {}))
    assert "No weights of dseq_jepa_vit_b16.in1k are here" in run.stderr.splitlines()[-1], run.stderr
