"""Pruned models against a slow reference, and in all the ways a plain ViT is used."""

import copy
import pickle

import pytest
import timm
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import timm_dseq
from timm_dseq import UserError, prune
from timm_dseq.engine.saliency import saliency_from_tokens
from timm_dseq.hub.load import load_backbone

from .tiny import encoder

QUERIES = ("border", "norm", "cls_out", "cls_param")


def model_of(img_size=(48, 48), **kwargs):
    torch.manual_seed(0)
    model = encoder(img_size, **{"num_classes": 5, **kwargs}).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


def images_of(size=(48, 48), count=3, seed=1):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def entering(model, images, block):
    """The tokens that a block receives."""
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    for layer in model.blocks[:block]:
        tokens = layer(tokens)
    return tokens


def kept_of(model, tokens, grid, keep, block, query):
    """The places of the kept patches of one image, from the public saliency."""
    saliency = saliency_from_tokens(model, tokens, query, block, grid).flatten()
    count = max(1, int(keep * len(saliency) + 0.5))
    return sorted(saliency.argsort(descending=True)[:count].tolist())


def reference(model, images, keep, block, query):
    """Image by image: all tokens stay, and attention cannot see the dropped ones from this block on. Tokens, places."""
    grid = model.patch_embed.dynamic_feat_size(images.shape[-2:])
    outputs, places = [], []
    for image in images:
        tokens = entering(model, image[None], block)
        kept = kept_of(model, tokens, grid, keep, block, query)
        visible = torch.zeros(tokens.shape[1], dtype=torch.bool)
        visible[[*range(model.num_prefix_tokens), *(model.num_prefix_tokens + i for i in kept)]] = True
        hidden = torch.zeros(tokens.shape[1]).masked_fill(~visible, float("-inf"))
        for layer in model.blocks[block:]:
            normed = layer.norm1(tokens)
            q, k, v = layer.attn.qkv(normed).unflatten(-1, (3, layer.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
            weights = (q @ k.mT / q.shape[-1] ** 0.5 + hidden).softmax(-1)
            tokens = tokens + layer.attn.proj((weights @ v).transpose(1, 2).flatten(2))
            tokens = tokens + layer.mlp(layer.norm2(tokens))
        outputs.append(model.norm(tokens)[0, visible])
        places.append(kept)
    return torch.stack(outputs), places


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("size", [(48, 48), (40, 72)], ids=str)
@pytest.mark.parametrize("registers", [0, 2])
def test_dropped_patches_are_as_if_attention_never_saw_them(size, query, registers):
    model, images = model_of(size, reg_tokens=registers), images_of(size)
    expected, _ = reference(model, images, 0.6, 1, query)
    pruned = prune(model, 0.6, 1, query)
    torch.testing.assert_close(pruned.forward_features(images), expected, rtol=0, atol=1e-5)
    mean = expected[:, 1 + registers :].mean(1)
    torch.testing.assert_close(pruned(images), model.head(mean), rtol=0, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    st.floats(0.01, 1), st.integers(1, 6), st.integers(1, 6), st.integers(0, 2), st.sampled_from(QUERIES), st.booleans()
)
def test_any_share_size_and_block(keep, rows, columns, block, query, dynamic):
    assume(query != "border" or rows * columns != 2)  # of two patches, each is as unlike the other: a tie
    size = (8 * rows, 8 * columns)
    model = model_of((48, 48) if dynamic else size, dynamic_img_size=dynamic)
    images = images_of(size, count=2)
    found = prune(model, keep, block, query).forward_features(images)
    assert found.shape == (2, 1 + max(1, int(keep * rows * columns + 0.5)), 32)
    expected, _ = reference(model, images, keep, block, query)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("query", QUERIES)
def test_all_patches_kept_is_the_unpruned_model_to_the_last_bit(query):
    model, images = model_of(), images_of()
    assert torch.equal(prune(model, 1, 1, query)(images), model(images))
    assert torch.equal(prune(model, 1.0, 0, query).forward_features(images), model.forward_features(images))


def test_kept_patches_stay_in_their_order_behind_the_prefix():
    """A block that does nothing, and no norm: what comes out is what came in."""
    model, images = model_of(reg_tokens=1), images_of()
    for layer in model.blocks:
        for part in (layer.attn.proj, layer.mlp.fc2):
            torch.nn.init.zeros_(part.weight), torch.nn.init.zeros_(part.bias)
    model.norm = torch.nn.Identity()
    tokens = entering(model, images, 0)
    found = prune(model, 0.5, 1, "norm").forward_features(images)
    assert torch.equal(found[:, :2], tokens[:, :2])
    for own, out in zip(tokens[:, 2:], found[:, 2:], strict=True):
        places = [(own == token).all(1).nonzero().item() for token in out]
        assert places == sorted(places)
        assert set(places) == set(own.norm(dim=1).topk(18).indices.tolist())


def test_only_kept_patches_get_a_gradient_behind_the_block():
    model, images = model_of(), images_of(count=1)
    _, (kept,) = reference(model, images, 0.4, 1, "norm")
    pruned, seen = prune(model, 0.4, 1), {}
    for at in (0, 1):  # of block 0: what it returns; of block 1: what it receives, after the pruning
        pruned.blocks[at].register_forward_hook(
            lambda _, inputs, output, at=at: seen.update({at: output if at == 0 else inputs[0]})
        )
    images.requires_grad_()
    output = pruned.forward_features(images)
    before, behind = torch.autograd.grad(output.square().sum(), [seen[0], seen[1]], retain_graph=True)
    moved = before[0, 1:].abs().sum(1) > 0
    assert moved.nonzero().flatten().tolist() == kept
    assert (behind[0].abs().sum(1) > 0).all()
    output.sum().backward()
    assert images.grad.abs().sum() > 0 and pruned.blocks[0].mlp.fc1.weight.grad.abs().sum() > 0


POOLS = ["avg", "avgmax", "max", "token", "map", ""]


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("classes", [0, 4])
def test_every_pooling_and_head_takes_what_is_left(pool, classes):
    model, images = model_of(global_pool=pool, num_classes=classes), images_of()
    pruned = prune(model, 0.5, 1)
    expected, _ = reference(model, images, 0.5, 1, "norm")
    torch.testing.assert_close(pruned(images), model.forward_head(expected), rtol=0, atol=1e-5)
    both = pruned.forward_head(pruned.forward_features(images), pre_logits=True)
    torch.testing.assert_close(both, model.forward_head(expected, pre_logits=True), rtol=0, atol=1e-5)


def test_the_original_stays_and_weights_have_the_same_names():
    model, images = model_of(), images_of()
    before, kind = model(images), type(model)
    pruned = prune(model, 0.5)
    assert pruned.state_dict().keys() == model.state_dict().keys() and isinstance(pruned, kind)
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.add_(1.0)
    assert torch.equal(model(images), before) and type(model) is kind
    pruned.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(pruned(images), prune(model, 0.5)(images))
    assert torch.equal(copy.deepcopy(pruned)(images), pruned(images))
    pruned.reset_classifier(7)
    assert pruned(images).shape == (3, 7) and model(images).shape == (3, 5)


def test_it_takes_a_new_size_after_the_pruning():
    model = model_of()
    pruned = prune(model, 0.5, 1)
    for each in (model, pruned):
        each.set_input_size(img_size=(64, 32))
    expected, _ = reference(model, images_of((64, 32)), 0.5, 1, "norm")
    torch.testing.assert_close(pruned.forward_features(images_of((64, 32))), expected, rtol=0, atol=1e-5)


def test_bf16_weights_and_autocast_keep_as_many_patches():
    model, images = model_of(), images_of()
    pruned = prune(model, 0.5, 1)
    expected = pruned(images)
    with torch.autocast("cpu", torch.bfloat16):
        found = pruned.forward_features(images)
    assert found.shape == (3, 19, 32)
    half = prune(copy.deepcopy(model).bfloat16(), 0.5, 1)
    found = half(images.bfloat16())
    assert found.dtype == torch.bfloat16
    assert F.cosine_similarity(found.float(), expected).min() > 0.98  # other patches may be kept where scores are near


def test_gradient_checkpointing_changes_nothing():
    model, images = model_of(), images_of()
    pruned = prune(model, 0.5, 1)
    expected = pruned(images)
    pruned.set_grad_checkpointing()
    torch.testing.assert_close(pruned(images), expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("query", QUERIES)
def test_compile_trace_and_export_give_what_eager_gives(query):
    pruned, images = prune(model_of(), 0.6, 1, query), images_of()
    expected = pruned(images)
    compiled = torch.compile(pruned, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), expected)
    torch.testing.assert_close(torch.jit.trace(pruned, (images,))(images_of(seed=2)), pruned(images_of(seed=2)))
    exported = torch.export.export(pruned, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    for count in (3, 5):
        fresh = images_of(count=count, seed=count)
        torch.testing.assert_close(exported(fresh), pruned(fresh))


def test_a_compiled_model_is_pruned_as_the_model_in_it():
    model, images = model_of(), images_of()
    assert torch.equal(prune(torch.compile(model), 0.5)(images), prune(model, 0.5)(images))


@pytest.mark.slow
def test_the_default_backend_compiles_it_once_for_each_size():
    pruned, images = prune(model_of(), 0.6, 1), images_of()
    torch.testing.assert_close(torch.compile(pruned, fullgraph=True)(images), pruned(images), rtol=1e-4, atol=1e-4)


def test_onnx_keeps_the_outputs(tmp_path):
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    pruned, images = prune(model_of(), 0.6, 1), images_of()
    torch.onnx.export(pruned, (images,), tmp_path / "model.onnx", dynamo=True)
    onnx.checker.check_model(str(tmp_path / "model.onnx"))
    (found,) = ReferenceEvaluator(str(tmp_path / "model.onnx")).run(None, {"x": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), pruned(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_vits_of_timm_are_pruned_and_stay_what_they_are(name):
    model = timm.create_model(name, num_classes=3, depth=4).eval()
    pruned, images = prune(model, 0.5), images_of((224, 224), count=1)
    assert pruned.forward_features(images).shape == (1, model.num_prefix_tokens + 98, 192)
    assert pruned(images).shape == (1, 3) and isinstance(pruned, type(model))


def test_a_function_of_ones_own_says_what_stays():
    model, images = model_of(), images_of()
    last = prune(model, 0.25, 1, lambda model, tokens: torch.arange(36.0).expand(len(tokens), -1))
    tokens = entering(model, images, 1)
    tokens = torch.cat([tokens[:, :1], tokens[:, -9:]], dim=1)
    for layer in model.blocks[1:]:
        tokens = layer(tokens)
    torch.testing.assert_close(last.forward_features(images), model.norm(tokens))
    with pytest.raises(UserError, match=r"^the query's scores has the shape .*: give \(B, n\)"):
        prune(model, 0.25, 1, lambda model, tokens: tokens)(images)


def test_the_shipped_weights_prune_by_one_line():
    model, _ = load_backbone("dseq_jepa_vit_ti16")
    pruned = timm_dseq.prune(model.eval())
    assert pruned(images_of((128, 128))).shape == (3, 192)
    assert pruned.forward_features(images_of((128, 128))).shape == (3, 1 + 45, 192)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"keep": 0}, "keep=0 is no share"),
        ({"keep": 1.2}, "keep=1.2 is no share"),
        ({"keep": float("nan")}, "keep=nan is no share"),
        ({"keep": "half"}, "keep='half' is no share"),
        ({"block": 3}, "block=3 is block 3, but the ViT has blocks 0 to 2"),
        ({"block": -1}, "blocks 0 to 2"),
        ({"block": 0.0}, "block=0.0 is no share of the depth: give one of 1/3 to 1, or an index, 0 to 2"),
        ({"block": 0.01}, "block=0.01 is no share"),
        ({"block": 3.0}, "block=3.0 is no share"),
        ({"block": float("inf")}, "block=inf is no share"),
        ({"query": "attention"}, "query='attention' is for analysis: prune by one of cls_param, cls_out, norm, border"),
        ({"query": "ncut"}, "query='ncut' is for analysis"),
        ({"query": "edges"}, "query='edges' is unknown"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(arguments, says):
    with pytest.raises(UserError, match=f"^[^\n]*{says}[^\n]*$"):
        prune(model_of(), **arguments)


def test_models_that_cannot_be_pruned_are_named():
    with pytest.raises(UserError, match=r"^ResNet is no plain ViT[^\n]*$"):
        prune(timm.create_model("resnet10t"))
    with pytest.raises(UserError, match=r"^query='cls_out' needs a class token[^\n]*$"):
        prune(model_of(class_token=False), query="cls_out")
    assert prune(model_of(class_token=False), 0.5)(images_of()).shape == (3, 5)
    pruned = prune(model_of(), 0.5)
    with pytest.raises(UserError, match=r"^this model is pruned already"):
        prune(pruned)
    with pytest.raises(UserError, match=r"^a pruned ViT has no maps"):
        pruned.forward_intermediates(images_of())
    with pytest.raises(UserError, match=r"^a pruned ViT takes no attn_mask"):
        pruned(images_of(), attn_mask=torch.ones(1, 1, 37, 37))


def by_length(model, tokens):
    """A query of one's own, where a pickle finds it."""
    return tokens[:, model.num_prefix_tokens :].norm(dim=-1)


def _in_a_worker(pruned, images, answers):
    answers.put(pruned(images).detach().numpy())


@pytest.mark.parametrize("query", ["border", by_length])
def test_a_pickle_a_file_and_a_spawned_process_hold_it(tmp_path, query):
    pruned, images = prune(model_of(), 0.5, 1, query), images_of()
    expected = pruned(images)
    torch.save(pruned, tmp_path / "pruned.pt")
    for again in (pickle.loads(pickle.dumps(pruned)), torch.load(tmp_path / "pruned.pt", weights_only=False)):
        assert type(again) is type(pruned) and torch.equal(again(images), expected)
        with pytest.raises(UserError, match="pruned already"):
            prune(again)
    spawn = torch.multiprocessing.get_context("spawn")
    answers = spawn.SimpleQueue()
    process = spawn.Process(target=_in_a_worker, args=(pruned, images, answers))
    process.start()
    torch.testing.assert_close(torch.from_numpy(answers.get()), expected.detach())
    process.join(60)
    assert process.exitcode == 0


def test_scores_that_are_no_numbers_are_refused_and_infinite_ones_have_an_order():
    def first_last(model, tokens):
        scores = torch.zeros(len(tokens), tokens.shape[1] - 1)
        scores[:, 0], scores[:, 1] = float("-inf"), float("inf")
        return scores

    assert prune(model_of(), 0.5, 1, first_last)(images_of()).isfinite().all()
    with pytest.raises(UserError, match=r"^the query's scores hold NaN[^\n]*$"):
        prune(model_of(), 0.5, 1, lambda *both: first_last(*both) * 0)(images_of())
