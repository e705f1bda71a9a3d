"""The engine learns: what the first region says about the second is found, and features do not collapse.

Each image holds two striped regions on noise. The first has level or upright stripes, and its kind decides the
second's; the phase is random, so that every image is as likely as its negative and no linear function of the pixels
tells the kinds apart. Only who sees the first region can predict the second.
"""

import math

import torch

import timm_dseq.engine.jepa as engine
from timm_dseq.engine.jepa import DSeqJEPA
from timm_dseq.engine.target_blocks import block_masks

from ..tiny import encoder

GRID, PATCH = (4, 6), 8
STEPS, BATCH = 140, 32


def draw(count, generator):
    """Images (B, 3, 32, 48) and the kind of each."""
    kind = torch.randint(0, 2, (count,), generator=generator)
    y, x = torch.meshgrid(torch.arange(GRID[0] * PATCH), torch.arange(GRID[1] * PATCH), indexing="ij")

    def stripes():
        phase = torch.rand(count, 1, 1, generator=generator) * 2 * math.pi
        return torch.sin(2 * math.pi / 6 * torch.where(kind[:, None, None] == 0, x, y) + phase)

    image = 0.3 * torch.randn(count, *x.shape, generator=generator)
    image[:, :, : 2 * PATCH] += stripes()[:, :, : 2 * PATCH]
    image[:, :, 3 * PATCH : 5 * PATCH] += stripes()[:, :, 3 * PATCH : 5 * PATCH]
    return 5 * image[:, None].expand(-1, 3, -1, -1), kind


def probe(train, train_kind, test, test_kind):
    """Accuracy of ridge regression to the kinds."""
    mean, scale = train.mean(0), train.std(0) + 1e-6
    a, b = ((x - mean) / scale for x in (train, test))
    a, b = (torch.cat([x, torch.ones(len(x), 1)], 1).double() for x in (a, b))
    weights = torch.linalg.solve(a.T @ a + 10 * torch.eye(a.shape[1]), a.T @ (train_kind.double() * 2 - 1))
    return ((b @ weights > 0) == test_kind.bool()).double().mean().item()


@torch.no_grad()
def features(model, images):
    """Mean of the first region's patch features: (B, D)."""
    return model.target.forward_features(images)[:, 1:].unflatten(1, GRID)[:, :, :2].mean((1, 2))


def effective_rank(x):
    values = torch.linalg.svdvals((x - x.mean(0)).double())
    share = values / values.sum()
    return math.exp(-(share * share.clamp(min=1e-12).log()).sum().item())


def test_the_next_region_is_learned_and_features_do_not_collapse(monkeypatch):
    maps = torch.zeros(GRID)
    maps[:, :2], maps[:, 3:5] = 1.0, 0.8
    monkeypatch.setattr(engine, "saliency_from_tokens", lambda model, x, *a, **k: maps.expand(len(x), -1, -1))
    torch.manual_seed(0)
    model = DSeqJEPA(encoder((32, 48), embed_dim=48, num_heads=4), predictor_width=48, predictor_depth=2)
    generator = torch.Generator().manual_seed(0)
    (train, train_kind), (test, test_kind) = draw(600, generator), draw(600, generator)
    first_region = [x[:, 0, :, : 2 * PATCH].flatten(1) for x in (train, test)]
    raw = probe(first_region[0], train_kind, first_region[1], test_kind)
    before = probe(features(model, train), train_kind, features(model, test), test_kind)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3, weight_decay=0.02)
    blocks = block_masks(GRID, torch.arange(BATCH), min_context=1)
    losses = []
    for step in range(STEPS):
        optimiser.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 20)
        loss, count, facts = model(draw(BATCH, generator)[0], None, blocks)
        optimiser.zero_grad()
        (loss / count).backward()
        optimiser.step()
        model.update_target(0.95)
        losses.append(facts["loss_by_step"][0])
    after = probe(features(model, train), train_kind, features(model, test), test_kind)
    rank = effective_rank(features(model, test))
    assert sum(losses[-10:]) / 10 < 0.7 * losses[0]
    assert raw < 0.6
    assert after > 0.95 and after > before + 0.1
    assert rank > 5
