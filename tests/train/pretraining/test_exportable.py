"""What trains can be exported: stock timm and a checkpoint's convert build the run's own encoder, or it is refused."""

import json

import pytest
import timm
import torch
from common.pretraining.export import check_exportable
from common.pretraining.model import build
from common.pretraining.settings import parse
from common.run import checkpoints

from timm_dseq import UserError
from timm_dseq.hub.convert import convert

from ..runs import options

TINY = {"patch_size": 8, "depth": 2}
KINDS = {
    "other heads": {"num_heads": 6},
    "another activation": {"act_layer": "relu"},
    "another width": {"embed_dim": 96},
    "a wider MLP": {"mlp_ratio": 2},
    "layer scale": {"init_values": 1e-5},
    "normed queries": {"qk_norm": True},
    "no bias": {"qkv_bias": False},
    "images of any size": {"dynamic_img_size": True},
}
TIMMS = {
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 4, "patch_size": 8}),
    "timm's own": ("test_vit", {"patch_size": 8}),
}
CASES = {**{kind: ("dseq_jepa_vit_ti16", {**TINY, **args}) for kind, args in KINDS.items()}, **TIMMS}


def config_of(tmp_path, name, args):
    return parse(options(tmp_path / "run", model__name=name, model__args=json.dumps(args), model__query="norm"))[0]


@pytest.mark.parametrize("kind", CASES)
def test_an_export_gives_the_runs_own_outputs_in_stock_timm(kind, tmp_path):
    config = config_of(tmp_path, *CASES[kind])
    model = build(config)
    with torch.no_grad():
        for parameter in model.target.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    check_exportable(config, model.student)
    state = {"done": {}, "config": {"model": vars(config.model)}, "data": ""}
    step = checkpoints.save(tmp_path / "checkpoints", 1, checkpoints.Saved(model.state_dict(), {}, state))
    convert(step / "model.safetensors", tmp_path / "export")
    described = json.loads((tmp_path / "export" / "config.json").read_text())
    assert not described["architecture"].startswith("dseq_jepa")
    image = torch.randn(2, 3, 48, 48)
    ours = model.target.eval()
    theirs = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs.forward_features(image), ours.forward_features(image))


def test_what_stock_timm_would_make_otherwise_is_refused_before_the_first_step(tmp_path):
    config = config_of(tmp_path, "dseq_jepa_vit_ti16", {**TINY, "num_heads": 6})
    model = build(config)
    config.model.args = {**TINY, "num_heads": 12}
    with pytest.raises(UserError, match=r"could not be exported after the run .*makes another model"):
        check_exportable(config, model.student)
    config.model.args = {**TINY, "num_heads": 5}
    with pytest.raises(UserError, match="could not be exported after the run"):
        check_exportable(config, model.student)
