"""One long row with boundaries gives what rows with a mask give, through timm's own blocks."""

import pytest
import torch
import torch.nn.attention.varlen
from torch.nn import functional as F

from timm_dseq.engine.attention import Boundaries

from ..tiny import PLANS, SHAPES, batch, jepa, mean_loss, plan
from .test_jepa import TOLERANCE, check_flow, check_loss, check_predictions


def attend_in_turn(q, k, v, ends, _ends, longest, _longest):
    """What torch's kernel computes on CUDA, set by set: (T, heads, d)."""
    assert int(ends.diff().max()) <= longest
    parts = [x.transpose(0, 1).split(ends.diff().tolist(), dim=1) for x in (q, k, v)]
    return torch.cat([F.scaled_dot_product_attention(*each) for each in zip(*parts, strict=True)], 1).transpose(0, 1)


def attend_by_a_mask(q, k, v, ends, _ends, _longest, _max):
    """The same for compilers, which cannot follow sizes."""
    owner = torch.bucketize(torch.arange(len(q), dtype=torch.int32), ends[1:], right=True)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=owner[:, None] == owner)[0].transpose(0, 1)


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", attend_in_turn)


def with_chains(model):
    model.varlen = model.predictor.varlen = True
    return model


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float64"])
def test_one_long_row_equals_the_reference(kind, shape, dtype, kernel):
    model = with_chains(jepa(img_size=SHAPES[shape], dtype=dtype))
    images, _, _ = batch(4, SHAPES[shape], dtype)
    check_predictions(model, images, plan(kind, 4, model.student.patch_embed.grid_size, 1), TOLERANCE[dtype])


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float64"])
def test_explicit_attention_equals_the_reference(kind, dtype):
    """What CPUs compute in bf16, in other precisions."""
    model = jepa(dtype=dtype)
    model.explicit_attention(True)
    images, _, _ = batch(4, dtype=dtype)
    check_predictions(model, images, plan(kind, 4, (6, 6), 1), TOLERANCE[dtype])


@pytest.mark.parametrize("objective", ["dseq", "dseq_causal", "ijepa"])
def test_losses_in_one_long_row_equal_the_reference(objective, kernel):
    facts = check_loss(with_chains(jepa(objective, dtype=torch.float64)), batch(6, dtype=torch.float64), 1e-10)
    assert facts["predictor_fill"] > 0.5


def test_nothing_flows_between_sets_of_one_long_row(kernel):
    check_flow(with_chains(jepa()), batch(3)[0], plan("mixed", 3, (6, 6), seed=5))


def test_sets_that_are_not_kept_apart_are_caught(monkeypatch):
    """The check above can fail: a kernel that looks beyond the boundaries."""
    everything = lambda q, k, v, *_: attend_in_turn(q, k, v, torch.tensor([0, len(q)]), None, len(q), None)  # noqa: E731
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", everything)
    with pytest.raises(AssertionError):
        check_flow(with_chains(jepa()), batch(3)[0], plan("mixed", 3, (6, 6), seed=5))


@pytest.mark.slow  # it compiles
@pytest.mark.parametrize("chains", [True, False], ids=["one long row", "rows"])
def test_no_graph_is_made_again_for_batches_of_other_sizes(chains, monkeypatch):
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", attend_by_a_mask)
    plain, compiled = (with_chains(jepa()) if chains else jepa() for _ in range(2))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled.compile(backend="aot_eager", fullgraph=True)
    made = []
    for seed in range(5):
        images, coins, blocks = batch(4 + seed, seed=seed)
        losses = [mean_loss(model, images, coins, blocks) for model in (plain, compiled)]
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
        losses[1].backward()
        made.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert made == made[:1] * 5 and made[0] < torch._dynamo.config.recompile_limit


def test_boundaries_are_a_tensor_that_answers_for_attention_alone():
    ends = Boundaries.of(torch.tensor([0, 3, 5], dtype=torch.int32), 3)
    assert (ends + 1).tolist() == [1, 4, 6] and ends.longest == 3 and type(ends.ends) is torch.Tensor
