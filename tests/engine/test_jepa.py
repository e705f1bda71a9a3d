"""The engine equals the slow reference, and nothing flows where the plan does not let it."""

import re

import pytest
import timm
import torch
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock
from torch import nn

from timm_dseq.engine.jepa import DSeqJEPA
from timm_dseq.engine.plans import plan_regions
from timm_dseq.engine.regions import rank_regions
from timm_dseq.engine.target_blocks import block_masks
from timm_dseq.errors import UserError
from timm_dseq.positions import sincos_positions

from .. import reference
from ..tiny import PLANS, SHAPES, batch, encoder, jepa, mean_loss, plan

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
OBJECTIVES = ("dseq", "dseq_causal", "ijepa")


def gradients(model, value):
    model.zero_grad(set_to_none=True)
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same_gradients(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name in ours:
        scale = max(1.0, theirs[name].abs().max().item())
        assert (ours[name] - theirs[name]).abs().max() <= tolerance * scale, name


def check_predictions(model, images, a_plan, tolerance):
    ours = model.predict(images, a_plan)
    theirs = reference.predict_plan(model, images, a_plan)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * max(1.0, theirs.detach().abs().max().item())
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=ours.dtype) / len(ours)
    assert_same_gradients(
        gradients(model, (ours * weights).sum()), gradients(model, (theirs * weights).sum()), tolerance
    )


def check_loss(model, inputs, tolerance):
    total, count, facts = model(*inputs)
    loss = total / count
    theirs = reference.step(model, *inputs)
    assert abs(loss.item() - theirs.item()) <= tolerance * max(1.0, abs(theirs.item()))
    assert_same_gradients(gradients(model, loss), gradients(model, theirs), tolerance)
    return facts


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float64"])
def test_predictions_and_gradients_equal_the_reference_for_random_plans(kind, shape, dtype):
    model = jepa(img_size=SHAPES[shape], dtype=dtype)
    images, _, _ = batch(4, SHAPES[shape], dtype)
    for seed in range(3):
        check_predictions(model, images, plan(kind, 4, model.student.patch_embed.grid_size, seed), TOLERANCE[dtype])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("loss", ["token", "step"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float64"])
def test_loss_and_gradients_equal_the_reference(objective, loss, shape, dtype):
    model = jepa(objective, SHAPES[shape], dtype, loss=loss)
    facts = check_loss(model, batch(6, SHAPES[shape], dtype), TOLERANCE[dtype])
    assert (facts["region_share"] > 0) == (objective != "ijepa")  # both kinds were in the batch
    assert (facts["regions_found"] > 1) == (objective != "ijepa")


@pytest.mark.parametrize(
    "encoder_args",
    [{"reg_tokens": 2}, {"class_token": False}, {"no_embed_class": False}, {"pre_norm": True}, {"init_values": 0.5}],
    ids=str,
)
def test_every_plain_vit_equals_the_reference(encoder_args):
    model = jepa(encoder_args=encoder_args, dtype=torch.float64, query="norm")
    images, _, _ = batch(3, dtype=torch.float64)
    check_predictions(model, images, plan("causal", 3, (6, 6)), 1e-10)


def test_first_causal_step_equals_the_paper_form():
    model = jepa(dtype=torch.float64)
    images, _, _ = batch(4, dtype=torch.float64)
    plain, causal = plan("regions", 4, (6, 6)), plan("causal", 4, (6, 6))
    assert torch.equal(plain.targets, causal.targets)
    first = (plain.step == 1)[plain.targets.nonzero()[:, 0]]
    ours, theirs = (model.predict(images, p)[first] for p in (plain, causal))
    assert len(ours) > 0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def pixel_gradients(model, images, a_plan):
    """How strongly each patch of each image acts on each prediction: (P, B, N)."""
    images = images.clone().requires_grad_()
    predictions = model.predict(images, a_plan)
    owner = a_plan.targets.nonzero()[:, 0]
    weights = torch.randn(predictions.shape, generator=torch.Generator().manual_seed(2), dtype=predictions.dtype)
    h, w = model.student.patch_embed.grid_size
    out = []
    for p in range(len(a_plan.targets)):
        value = (predictions * weights)[owner == p].sum()
        (grad,) = torch.autograd.grad(value, images, retain_graph=True)
        out.append(grad.unflatten(2, (h, 8)).unflatten(4, (w, 8)).abs().amax((1, 3, 5)).flatten(1))
    return torch.stack(out)


def check_flow(model, images, a_plan):
    acts = pixel_gradients(model, images, a_plan)
    visible = a_plan.visible()
    assert not (visible & a_plan.targets).any()
    assert visible.any(1).all() and a_plan.targets.any(1).all()
    for p in range(len(acts)):
        own = int(a_plan.context_image[a_plan.target_context[p]])
        others = [i for i in range(len(images)) if i != own]
        assert (acts[p, others] == 0).all(), "another image acts on a prediction"
        assert (acts[p, own][a_plan.targets[p]] == 0).all(), "a target acts on its own prediction"
        assert (acts[p, own][~visible[p]] == 0).all(), "a hidden patch acts on a prediction"
        assert (acts[p, own][visible[p]] > 0).all(), "a visible patch does not act on a prediction"


def one_region_plan(causal=False):
    maps = torch.zeros(3, 6, 6)
    maps[0, 1:4, 1:3] = maps[1, :, :2] = maps[2, 4:, 4:] = 1.0
    return plan_regions(rank_regions(maps), causal=causal)


def check_one_region_trains_the_encoder(model, images):
    a_plan = one_region_plan(model.objective == "dseq_causal")
    owner = a_plan.targets.nonzero()[:, 0]
    for p in range(len(images)):
        grads = gradients(model, model.predict(images, a_plan)[owner == p].square().sum())
        for name, grad in grads.items():
            assert grad.abs().max() > 0, name


def check_mask_token_learns(model, inputs):
    assert gradients(model, mean_loss(model, *inputs))["predictor.mask_token"].abs().max() > 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", PLANS)
def test_only_visible_patches_of_the_own_image_act_on_a_prediction(kind, shape):
    model = jepa(img_size=SHAPES[shape])
    images, _, _ = batch(3, SHAPES[shape])
    check_flow(model, images, plan(kind, 3, model.student.patch_embed.grid_size, seed=5))


@pytest.mark.parametrize("objective", ["dseq", "dseq_causal"])
def test_an_image_with_one_region_trains_every_parameter(objective):
    check_one_region_trains_the_encoder(jepa(objective), batch(3)[0])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_mask_token_learns(objective):
    check_mask_token_learns(jepa(objective), batch(3))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_permuting_the_batch_changes_nothing(objective):
    model = jepa(objective, dtype=torch.float64)
    images, coins, blocks = batch(5, dtype=torch.float64)
    order = torch.tensor([3, 0, 4, 2, 1])
    a = mean_loss(model, images, coins, blocks)
    b = mean_loss(model, images[order], coins[order], blocks[order])
    assert abs(a.item() - b.item()) < 1e-10


def test_target_follows_by_the_momentum_and_never_learns():
    model = jepa()
    before = {name: p.clone() for name, p in model.target.named_parameters()}
    students = dict(model.student.named_parameters())
    model.update_target(0.75)
    for name, p in model.target.named_parameters():
        torch.testing.assert_close(p, 0.75 * before[name] + 0.25 * students[name], rtol=1e-5, atol=1e-6)
        assert not p.requires_grad
    assert not model.train().target.training


def test_positions_are_written_and_frozen_and_weights_start_as_in_ijepa():
    model = DSeqJEPA(encoder(embed_dim=64, depth=4), predictor_width=48, predictor_depth=3)
    for vit in (model.student, model.target):
        assert torch.equal(vit.pos_embed[0], sincos_positions((6, 6), 64)) and not vit.pos_embed.requires_grad
    for blocks in (model.student.blocks, model.predictor.blocks):
        for number, block in enumerate(blocks, 1):
            assert block.attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.1)
            for layer in (block.attn.proj, block.mlp.fc2):
                assert layer.weight.std().item() == pytest.approx(0.02 / (2 * number) ** 0.5, rel=0.1)
                assert not layer.bias.any()
    kept = encoder()
    weight = kept.blocks[0].attn.qkv.weight.clone()
    assert torch.equal(DSeqJEPA(kept, predictor_width=24, pretrained=True).student.blocks[0].attn.qkv.weight, weight)


def test_facts_of_a_step_are_those_of_its_plan():
    model = jepa()
    images, _, blocks = batch(4)
    loss, count, facts = model(images, torch.tensor([True, True, False, False]), blocks)
    assert facts["region_share"] == 0.5 and facts["regions_found"] >= 1
    assert sum(facts["region_area"]) == pytest.approx(36 / 37, abs=0.03)
    assert 0 < facts["encoder_fill"] <= 1 and 0 < facts["predictor_fill"] <= 1
    assert facts["loss_by_step"].shape == (4,) and loss.requires_grad
    assert count == facts["target_tokens"] == facts["tokens_by_step"].sum()
    assert facts["encoder_tokens"] > 0 and facts["predictor_tokens"] > facts["encoder_tokens"] / 2


def test_images_may_have_more_target_blocks_than_regions():
    images, _, blocks = batch(4, (96, 96))
    blocks = block_masks((12, 12), blocks.seeds, target_scale=(0.05, 0.1), num_targets=6)
    facts = jepa("ijepa", (96, 96))(images, None, blocks)[-1]
    assert facts["tokens_by_step"].tolist() == blocks.targets.sum((0, 2, 3)).tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_near_full_precision(dtype):
    model = jepa()
    inputs = batch(3)
    exact = mean_loss(model, *inputs)
    with torch.autocast("cpu", dtype):
        loss = mean_loss(model, *inputs)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.05)
    assert all(g.isfinite().all() for g in gradients(model, loss).values())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: DSeqJEPA(nn.Linear(2, 2)), "Linear cannot be packed"),
        (lambda: DSeqJEPA(timm.create_model("resnet10t")), "ResNet cannot be packed"),
        (lambda: DSeqJEPA(encoder(pos_embed="none")), "pos_embed='learn'"),
        (lambda: DSeqJEPA(encoder(drop_path_rate=0.1)), "drop_path_rate=0"),
        (lambda: DSeqJEPA(encoder(patch_drop_rate=0.1)), "patch_drop_rate=0"),
        (lambda: DSeqJEPA(encoder(proj_drop_rate=0.1)), "dropout"),
        (lambda: DSeqJEPA(encoder(attn_drop_rate=0.1)), "dropout"),
        (lambda: DSeqJEPA(encoder(block_fn=ParallelThingsBlock)), "ParallelThingsBlock does not attend by a mask"),
        (lambda: DSeqJEPA(encoder(block_fn=ParallelScalingBlock)), "ParallelScalingBlock does not attend by a mask"),
        (lambda: DSeqJEPA(encoder(class_token=False)), "class token"),
        (lambda: DSeqJEPA(encoder(), "jepa"), "objective='jepa'"),
        (lambda: DSeqJEPA(encoder(), loss="mean"), "loss='mean'"),
        (lambda: DSeqJEPA(encoder(), query="attention"), "query='attention'"),
        (lambda: DSeqJEPA(encoder(), terms={"vicreg": 1.0}), "terms: 'vicreg' is unknown: choose from contrastive"),
        (lambda: DSeqJEPA(encoder(), predictor_width=25), "predictor_width=25"),
        (lambda: jepa()(batch(2)[0]), "blocks are missing"),
        (lambda: jepa("ijepa", (16, 16))(*batch(2, (16, 16))), "too small"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(make, says):
    with pytest.raises(UserError, match=re.escape(says)) as error:
        make()
    assert "\n" not in str(error.value)


def test_compiled_blocks_keep_the_loss_and_make_no_graph_after_the_second_batch():
    from torch._dynamo.utils import counters

    model, plain = jepa(), jepa()
    torch._dynamo.reset()
    model.compile(backend="aot_eager")
    graphs = []
    for count, seed in ((4, 0), (5, 1), (3, 2), (6, 3), (4, 4), (7, 5)):
        inputs = batch(count, seed=seed)
        loss, theirs = mean_loss(model, *inputs), mean_loss(plain, *inputs)
        assert_same_gradients(gradients(model, loss), gradients(plain, theirs), 1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[1:] == graphs[1:2] * 5


def test_gradient_checkpointing_changes_no_gradient():
    model, plain = jepa(), jepa()
    model.student.set_grad_checkpointing()
    model.predictor.grad_checkpointing = True
    inputs = batch(4)
    ours, theirs = (gradients(each, mean_loss(each, *inputs)) for each in (model, plain))
    assert_same_gradients(ours, theirs, 1e-6)
