"""Layer decay is timm's for the ViT that a dense model is built on, whatever it is called in it."""

from common.dense.backbone import DenseBackbone
from common.dense.layer_decay import layer_groups
from common.dense.settings import Optim
from timm.optim import param_groups_layer_decay
from torch import nn

from .test_backbone import vit


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.neck = nn.Conv2d(192, 8, 1)
        self.body = DenseBackbone(vit(depth=4), [3])


def test_layer_decay_is_timms_for_the_vit_and_leaves_the_rest_at_full_rate():
    model = Model()
    optim = Optim(layer_decay=0.5, weight_decay=0.3)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ours = {
        names[id(parameter)]: (group["lr_scale"], group["weight_decay"])
        for group in layer_groups(model, optim)
        for parameter in group["params"]
    }
    assert ours.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    plain = vit(depth=4, num_classes=3)  # whose head stands for what is built on the ViT
    own = {id(parameter): name for name, parameter in plain.named_parameters()}
    groups = param_groups_layer_decay(plain, 0.3, plain.no_weight_decay(), layer_decay=0.5)
    timms = {
        own[id(parameter)]: (group["lr_scale"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }
    for name, wanted in ours.items():
        if name.startswith("body.vit."):
            assert wanted == timms[name.removeprefix("body.vit.")], name
        else:
            assert wanted == (1.0, 0.3 if name.endswith("weight") else 0.0)
    assert ours["body.vit.patch_embed.proj.weight"] == (0.5**5, 0.3)
