"""Saliency against its definition, said with timm's public functions."""

import pytest
import timm
import torch
from torch.nn import functional as F

from timm_dseq import DSeqJEPA
from timm_dseq.engine.saliency import QUERIES, Query, min_max, saliency_from_tokens, saliency_map
from timm_dseq.engine.vit import block_index
from timm_dseq.errors import UserError

from ..tiny import SHAPES, batch, encoder, jepa


def model_of(img_size=(48, 48), **kwargs):
    torch.manual_seed(0)
    model = encoder(img_size, **kwargs).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


def images_of(img_size, count=4):
    return torch.randn(count, 3, *img_size, generator=torch.Generator().manual_seed(1))


def stretched(values, img_size):
    low, high = values.min(1, keepdim=True).values, values.max(1, keepdim=True).values
    return ((values - low) / (high - low)).unflatten(1, (img_size[0] // 8, img_size[1] // 8))


def block_output(model, images, index, norm):
    patches, prefix = model.forward_intermediates(
        images, [index], norm=norm, output_fmt="NLC", intermediates_only=True, return_prefix_tokens=True
    )[0]
    return patches, prefix


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [0, 1, 11 / 12])
def test_similarity_to_the_class_token(shape, registers, block):
    size = SHAPES[shape]
    model, images = model_of(size, reg_tokens=registers), images_of(size)
    index = 2 if block == 11 / 12 else block
    patches, prefix = block_output(model, images, index, norm=True)
    by_parameter = (patches * model.cls_token).sum(-1) / 32**0.5
    torch.testing.assert_close(
        saliency_map(model, images, block=block), stretched(by_parameter, size), rtol=0, atol=1e-5
    )
    by_output = (patches * prefix[:, :1]).sum(-1) / 32**0.5
    ours = saliency_map(model, images, "cls_out", block)
    torch.testing.assert_close(ours, stretched(by_output, size), rtol=0, atol=1e-5)


@pytest.mark.parametrize("class_token", [True, False])
def test_norm_is_that_of_the_tokens_before_the_final_norm(class_token):
    model, images = model_of(class_token=class_token), images_of((48, 48))
    patches = model.forward_intermediates(images, [1], output_fmt="NLC", intermediates_only=True)[0]
    ours = saliency_map(model, images, "norm", block=1)
    torch.testing.assert_close(ours, stretched(patches.norm(dim=-1), (48, 48)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("registers", [0, 2])
def test_border_is_how_little_a_patch_is_like_five_of_the_border(shape, registers):
    size = SHAPES[shape]
    model, images = encoder(size, reg_tokens=registers).eval(), torch.randn(2, 3, *size)
    h, w = model.patch_embed.grid_size
    patches, _ = block_output(model, images, 1, norm=True)
    maps = saliency_map(model, images, "border", block=1)
    for own, ours in zip(patches, maps, strict=True):
        own = own - own.mean(0)
        border = [i for i in range(h * w) if i // w in (0, h - 1) or i % w in (0, w - 1)]
        scores = torch.stack(
            [
                -torch.stack(sorted((F.cosine_similarity(x, own[i], dim=0) for i in border), reverse=True)[:5]).mean()
                for x in own
            ]
        )
        expected = (scores - scores.min()) / (scores.max() - scores.min())
        torch.testing.assert_close(ours, expected.view(h, w), rtol=0, atol=1e-5)


def test_border_finds_the_object_in_the_middle():
    model = encoder().eval()
    images = torch.zeros(1, 3, 48, 48)
    images[:, :, 16:32, 16:32] = 2.0  # four patches of 6×6
    saliency = saliency_map(model, images, "border", block=0)[0]
    inside = saliency[2:4, 2:4].clone()
    saliency[2:4, 2:4] = 0
    assert inside.min() > saliency.max()


@pytest.mark.parametrize("kwargs", [{}, {"reg_tokens": 2}, {"qk_norm": True}], ids=str)
def test_attention_is_what_the_block_multiplies_its_values_with(kwargs):
    """With values that say which patch they come from, the block's own output is the attention."""
    model, images = model_of(num_heads=1, embed_dim=64, **kwargs), images_of((48, 48))
    index, prefix = 1, model.num_prefix_tokens
    ours = saliency_map(model, images, "attention", index)
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    tokens = model.blocks[0](tokens)
    attn, seen = model.blocks[index].attn, []

    def spy(module, inputs, output):
        q, k, _ = output.unflatten(-1, (3, 64)).unbind(2)
        labels = F.one_hot(torch.arange(36 + prefix), 64).float().expand(len(images), -1, -1)
        seen.append(F.scaled_dot_product_attention(attn.q_norm(q), attn.k_norm(k), labels)[:, 0, prefix : prefix + 36])

    attn.qkv.register_forward_hook(spy)
    model.blocks[index](tokens)
    torch.testing.assert_close(ours, stretched(seen[0], (48, 48)), rtol=0, atol=1e-4)


def test_ncut_separates_two_groups_of_patches():
    model = model_of(class_token=False)
    torch.manual_seed(3)
    group = torch.zeros(6, 6, dtype=torch.bool)
    group[1:3, 1:4] = True
    kinds = F.normalize(torch.randn(2, 32), dim=1)
    tokens = kinds[group.flatten().long()][None] + 0.05 * torch.randn(1, 36, 32)
    saliency = saliency_from_tokens(model, tokens, "ncut")[0]
    assert saliency[group].min() > saliency[~group].max() + 0.5


@pytest.mark.parametrize("query", QUERIES)
def test_maps_lie_in_0_to_1_in_float32_also_under_autocast(query):
    model, images = model_of(), images_of((48, 48))
    with torch.autocast("cpu", torch.bfloat16):
        saliency = saliency_map(model, images, query)
    assert saliency.dtype == torch.float32 and saliency.shape == (4, 6, 6)
    assert (saliency.flatten(1).amin(1) == 0).all() and (saliency.flatten(1).amax(1) == 1).all()
    assert saliency_map(model.double(), images.double(), query).dtype == torch.float64


@pytest.mark.parametrize("query", ["cls_param", "cls_out", "attention"])
def test_a_missing_class_token_is_named(query):
    with pytest.raises(UserError, match=f"{query}.*class token.*norm.*ncut"):
        saliency_map(model_of(class_token=False), images_of((48, 48)), query)
    with pytest.raises(UserError, match="query='clss'"):
        saliency_map(model_of(), images_of((48, 48)), "clss")


OTHERS = {
    "Eva": ("eva02_tiny_patch14_224", {"depth": 1}),
    "Beit": ("beit_base_patch16_224", {"depth": 1}),
    "Hiera": ("hiera_tiny_224", {}),
    "SwinTransformer": ("swin_tiny_patch4_window7_224", {}),
    "ConvNeXt": ("convnext_atto", {}),
    "NaFlexVit": ("naflexvit_base_patch16_gap", {"depth": 1}),
    "ResNet": ("resnet10t", {}),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_model_that_is_no_plain_vit_is_named_in_one_line(kind):
    name, settings = OTHERS[kind]
    with torch.device("meta"):
        model = timm.create_model(name, **settings)
    assert type(model).__name__ == kind
    images, tokens = torch.zeros(1, 3, 224, 224), torch.zeros(1, 197, 32)
    for query in QUERIES:
        refused = pytest.raises(UserError, match=f"^{kind} is no plain ViT: .* timm's VisionTransformer[^\n]*$")
        with refused:
            saliency_map(model, images, query)
        with refused:
            saliency_from_tokens(model, tokens, query)
    with pytest.raises(UserError, match=f"^{kind} cannot be packed: .* timm's plain VisionTransformers$"):
        DSeqJEPA(model)


def test_a_compiled_vit_is_a_plain_one():
    model, images = model_of(), images_of((48, 48))
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(saliency_map(compiled, images), saliency_map(model, images))


def test_a_share_of_the_depth_is_the_papers_block():
    for depth, index in ((12, 10), (24, 21), (32, 28)):
        model = encoder(depth=depth, embed_dim=8, num_heads=1)
        assert block_index(model, 11 / 12) == index and block_index(model, 3) == 3
        with pytest.raises(UserError, match=f"blocks 0 to {depth - 1}"):
            block_index(model, depth)


def test_a_constant_map_becomes_zero():
    assert torch.equal(min_max(torch.full((2, 5), 3.0)), torch.zeros(2, 5))


def test_a_function_of_ones_own_scores_patches_and_trains():
    """Here how long a patch's vector is, which is what the query `norm` does without the norm."""
    seen = []

    def length(model, tokens):
        seen.append(tokens.shape)
        return tokens[:, model.num_prefix_tokens :].norm(dim=-1)

    model = jepa(query=length)
    images, _, blocks = batch()
    loss, _, facts = model(images, None, blocks)
    loss.backward()
    assert facts["regions_found"] > 0 and len(seen) == 1
    ours = saliency_map(model.target, images, length)
    by_hand = saliency_map(model.target, images, Query(lambda model, tokens, *_: tokens[:, 1:].square().sum(-1).sqrt()))
    torch.testing.assert_close(ours, by_hand)
    assert ours.shape[0] == len(images) and len(seen) == 2
    with pytest.raises(UserError, match=r"the query's scores has the shape .*: give \(B, h·w\)"):
        saliency_map(model.target, images, lambda model, tokens: tokens)
