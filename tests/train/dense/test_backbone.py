"""The dense backbone gives what timm's own ViT gives, at any size, and refuses what is no plain ViT."""

import pytest
import timm
import torch
from common.dense.backbone import DenseBackbone, at_depth, load_dense
from common.dense.pyramid import EVERYWHERE, TAPS, Pyramid

import timm_dseq
from timm_dseq import UserError

KINDS = {
    "class token without position": ("dseq_jepa_vit_ti16", {}),
    "class token": ("vit_tiny_patch16_224", {}),
    "no prefix": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 4}),
    "two tokens": ("deit_tiny_distilled_patch16_224", {}),
    "norm after the pooling": ("vit_tiny_patch16_224", {"global_pool": "avg", "fc_norm": True}),
    "no positions": ("vit_tiny_patch16_224", {"pos_embed": "none"}),
}
SMALL = {"depth": 3, "num_classes": 0}


def vit(name="vit_tiny_patch16_224", size=64, seed=0, **args):
    torch.manual_seed(seed)
    return timm.create_model(name, img_size=size, **{**SMALL, **args}).eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(64, 64), (96, 48)])
def test_its_maps_are_timms(kind, size):
    assert timm_dseq  # registers the names
    name, args = KINDS[kind]
    images = torch.randn(2, 3, *size)
    own = vit(name, **args, dynamic_img_size=True)
    expected = own.forward_intermediates(images, indices=[0, 2], norm=False, intermediates_only=True)
    maps = DenseBackbone(vit(name, **args), taps=[0, 2])(images)
    assert list(maps) == [0, 2]
    for ours, theirs in zip(maps.values(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_normed_maps_pass_the_final_norm():
    images = torch.randn(1, 3, 64, 64)
    for args in ({}, {"global_pool": "avg", "fc_norm": True}):
        model = vit(**args)
        norm = model.fc_norm if args else model.norm
        torch.nn.init.normal_(norm.weight)
        plain, normed = (DenseBackbone(model, [1], norm=flag)(images)[1] for flag in (False, True))
        torch.testing.assert_close(normed, norm(plain.movedim(1, -1)).movedim(-1, 1))


def test_an_image_is_padded_with_zeros_to_whole_patches():
    backbone, images = DenseBackbone(vit(), [2], window=3), torch.randn(1, 3, 50, 70)
    padded = torch.nn.functional.pad(images, (0, 10, 0, 14))
    assert backbone(images)[2].shape == (1, 192, 4, 5)
    torch.testing.assert_close(backbone(images)[2], backbone(padded)[2])


def test_blocks_see_their_windows_and_the_named_ones_see_all():
    """By gradients: whether a corner of the map depends on the pixels of the far corner."""

    def reaches(**options):
        images = torch.randn(1, 3, 64, 64, requires_grad=True)
        maps = DenseBackbone(vit(class_token=False, global_pool="avg"), [1, 2], window=2, **options)(images)
        reached = {}
        for tap, one in maps.items():
            (gradient,) = torch.autograd.grad(one[0, :, 0, 0].sum(), images, retain_graph=True)
            reached[tap] = bool(gradient[..., -16:, -16:].abs().sum())
        return reached

    assert reaches() == {1: True, 2: True}  # the tapped ones by default
    assert reaches(everywhere=[2]) == {1: False, 2: True}
    assert reaches(everywhere=[]) == {1: False, 2: False}


def test_every_parameter_that_may_learn_gets_a_gradient():
    for options in ({}, {"norm": True}, {"window": 2}):
        backbone = DenseBackbone(vit(reg_tokens=1, weight_init=""), [0, 1], **options).train()
        sum(one.sum() for one in backbone(torch.randn(1, 3, 64, 64)).values()).backward()
        idle = [name for name, weight in backbone.named_parameters() if weight.requires_grad and weight.grad is None]
        assert idle == []
        frozen = {name.split(".")[1] for name, weight in backbone.named_parameters() if not weight.requires_grad}
        assert frozen == ({"blocks"} if "norm" in options else {"blocks", "norm"})  # block 2 is behind the last tap


@pytest.mark.parametrize("depth", [2, 6, 12, 24, 32])
def test_taps_lie_at_the_same_shares_of_any_depth(depth):
    found = [at_depth(share, depth) for share in TAPS["dseq"]]
    assert found[-1] == depth - 1 and found == sorted(found)
    if depth == 12:
        assert found == [3, 5, 7, 11]
        assert [at_depth(share, 12) for share in EVERYWHERE["vitdet"]] == [2, 5, 8, 11]
    if depth == 24:
        assert found == [7, 11, 15, 23]


@pytest.mark.parametrize("kind", TAPS)
def test_levels_have_four_times_to_half_the_maps_sides(kind):
    backbone = DenseBackbone(vit(), taps := [at_depth(share, 3) for share in TAPS[kind]])
    pyramid = Pyramid(192, taps)
    levels = pyramid(backbone(torch.randn(2, 3, 64, 96)))
    assert [level.shape for level in levels] == [(2, 48, 16, 24), (2, 96, 8, 12), (2, 192, 4, 6), (2, 192, 2, 3)]
    assert pyramid.channels == [48, 96, 192, 192]
    assert [level.shape[-1] for level in pyramid(backbone(torch.randn(1, 3, 16, 16)))] == [4, 2, 1, 1]


@pytest.mark.parametrize("kind", TAPS)
def test_a_level_depends_on_its_own_tap_alone(kind):
    taps = {"dseq": [0, 1, 2, 3], "vitdet": [3, 3, 3, 3]}[kind]
    maps = {tap: torch.randn(1, 8, 2, 2, requires_grad=True) for tap in range(4)}
    for level, tap in zip(Pyramid(8, taps)(maps), taps, strict=True):
        gradients = torch.autograd.grad(level.sum(), list(maps.values()), allow_unused=True)
        assert [number for number, gradient in enumerate(gradients) if gradient is not None] == [tap]


@pytest.mark.parametrize(
    ("name", "args", "says"),
    [
        ("resnet18", {}, "model=resnet18, random is no plain ViT"),
        ("swin_tiny_patch4_window7_224", {}, "is no plain ViT"),
        ("pixels", {}, "model=raw pixels, random is no plain ViT"),
        ("vit_tiny_patch16_224", {"patch_drop_rate": 0.1}, "leave args.patch_drop_rate out"),
    ],
)
def test_what_is_no_plain_vit_is_refused_in_one_line(name, args, says):
    with pytest.raises(UserError, match=says) as error:
        load_dense(name, [1.0], random=True, args=args)
    assert "\n" not in str(error.value)


def test_load_dense_gives_the_named_weights_and_the_taps_of_their_depth():
    backbone, shown = load_dense("dseq_jepa_vit_ti16", TAPS["dseq"], random=True, seed=3, args={}, window=2)
    again, _ = load_dense("dseq_jepa_vit_ti16", TAPS["dseq"], random=True, seed=3, args={})
    assert (shown, backbone.taps, backbone.patch, backbone.dim) == (
        "dseq_jepa_vit_ti16, random",
        [3, 5, 7, 11],
        16,
        192,
    )
    assert all(torch.equal(one, other) for one, other in zip(backbone.parameters(), again.parameters(), strict=True))
