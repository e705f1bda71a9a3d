"""Views: which patches they keep, how these are encoded, what their loss is, and where its gradient goes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_dseq import UserError, view_windows
from timm_dseq.engine.views import recognition
from timm_dseq.engine.views.recognition import Recognition, info_nce
from timm_dseq.engine.views.windows import cut, encode_windows
from timm_dseq.engine.vit import embed, embed_patches, prepare_encoder

from ..tiny import batch, encoder, jepa, mean_loss

GRID, VIEWS = (6, 6), 3


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setattr(recognition, "HIDDEN", 32)
    monkeypatch.setattr(recognition, "OUT", 8)


def views_of(images=4, share=0.25, dtype=torch.float64, seed=0):
    """Pixels and windows of V views of each image."""
    generator = torch.Generator().manual_seed(seed)
    crops = torch.randn(images * VIEWS, 3, 48, 48, generator=generator, dtype=dtype)
    windows = view_windows(GRID, torch.arange(images * VIEWS) + 1000 * seed, share)
    return {"pixels": cut(crops, windows, GRID), "windows": windows}


@settings(deadline=None, max_examples=40)
@given(h=st.integers(2, 9), w=st.integers(2, 9), share=st.floats(0.05, 1.0), seed=st.integers(0, 2**40))
def test_a_view_keeps_so_many_patches_each_once_and_those_of_its_seed(h, w, share, seed):
    seeds = seed + torch.arange(5)
    windows = view_windows((h, w), seeds, share)
    assert windows.shape == (5, 4 * min(max(1, round(share * h * w / 4)), (h // 2) * (w // 2)))
    assert windows.min() >= 0 and windows.max() < h * w
    assert (windows.sort(1).values.diff(dim=1) > 0).all()
    corner = windows[:, ::4]
    assert torch.equal(windows.view(5, -1, 4), corner[..., None] + torch.tensor([0, 1, w, w + 1]))
    assert (corner % w < w - 1).all()
    assert torch.equal(view_windows((h, w), seeds[3:4], share), windows[3:4])


def test_windows_are_whole_squares_of_an_even_grid():
    windows = view_windows((8, 6), torch.arange(200), 1 / 3)  # 16 of 48 patches
    kept = torch.zeros(200, 48).scatter(1, windows, 1).view(200, 4, 2, 3, 2).sum((2, 4))
    assert set(kept.unique().tolist()) == {0.0, 4.0}


@pytest.mark.parametrize("grid", [(8, 8), (7, 7), (5, 8)])
def test_all_patches_but_odd_edges_are_kept_equally_often(grid):
    count, n = 6000, grid[0] * grid[1]
    windows = view_windows(grid, torch.arange(count), 0.25)
    share = windows.shape[1] / n
    often = torch.bincount(windows.flatten(), minlength=n) / count
    edge = torch.ones(grid)  # the first and the last row of an odd number are left out in turn, and so are columns
    edge[:: grid[0] - 1] *= 1 if grid[0] % 2 == 0 else 0.5
    edge[:, :: grid[1] - 1] *= 1 if grid[1] % 2 == 0 else 0.5
    expected = edge.flatten() * windows.shape[1] / edge.sum()
    assert (often - expected).abs().max() < 5 * math.sqrt(share * (1 - share) / count)


def test_windows_of_different_seeds_are_different():
    windows = view_windows((8, 8), torch.arange(300), 0.25)
    assert len(windows.unique(dim=0)) > 250


def test_cut_takes_the_pixels_of_each_patch():
    images = torch.arange(2 * 3 * 40 * 72).view(2, 3, 40, 72)
    patches = torch.tensor([[0, 9, 44], [8, 10, 30]])
    pixels = cut(images, patches, (5, 9))
    assert pixels.shape == (2, 3, 24, 8)
    for i, row in enumerate(patches.tolist()):
        for k, patch in enumerate(row):
            top, left = patch // 9 * 8, patch % 9 * 8
            assert torch.equal(pixels[i, :, 8 * k : 8 * k + 8], images[i, :, top : top + 8, left : left + 8])


@pytest.mark.parametrize("kind", [{}, {"class_token": False}, {"reg_tokens": 2}, {"no_embed_class": False}])
def test_patches_enter_the_encoder_as_those_of_a_whole_image(kind):
    model = encoder(**kind)
    prepare_encoder(model)
    images, windows = torch.randn(5, 3, 48, 48), view_windows(GRID, torch.arange(5), 0.5)
    whole, prefix = embed(model, images), model.num_prefix_tokens
    part = embed_patches(model, cut(images, windows, GRID), windows)
    expected = torch.stack([row[patches + prefix] for row, patches in zip(whole, windows, strict=True)])
    torch.testing.assert_close(part, torch.cat([whole[:, :prefix], expected], dim=1))


@pytest.mark.parametrize("kind", [{}, {"class_token": False}])
def test_a_view_of_all_patches_is_what_timm_makes_of_the_image(kind):
    model = encoder(**kind)
    prepare_encoder(model)
    images, windows = torch.randn(5, 3, 48, 48), view_windows(GRID, torch.arange(5), 1.0)
    tokens = model.forward_features(images)
    expected = tokens[:, model.num_prefix_tokens :].mean(1)
    if model.cls_token is not None:
        expected = torch.cat([expected, tokens[:, 0]], dim=1)
    torch.testing.assert_close(encode_windows(model, cut(images, windows, GRID), windows), expected)


def gradients(model, loss):
    """Of all parameters that the loss reaches."""
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def slow_info_nce(views, temperature):
    """As the formula is written, one number after another."""
    v, b, _ = views.shape
    total = 0.0
    unit = [[views[i, j] / views[i, j].norm() for j in range(b)] for i in range(v)]
    for i in range(v):
        others = [sum(unit[k][j] for k in range(v) if k != i) / (v - 1) for j in range(b)]
        others = [x / x.norm() for x in others]
        score = [[(unit[i][j] @ others[k]).item() / temperature for k in range(b)] for j in range(b)]
        for j in range(b):
            total += math.log(sum(math.exp(x) for x in score[j])) - score[j][j]
            total += math.log(sum(math.exp(score[k][j]) for k in range(b))) - score[j][j]
    return total / (2 * v * b)


@pytest.mark.parametrize("views", [2, 4])
def test_info_nce_equals_the_slow_reference(views):
    z = torch.randn(views, 6, 8, dtype=torch.float64)
    assert info_nce(z, 0.3).item() == pytest.approx(slow_info_nce(z, 0.3), rel=1e-12)


def test_info_nce_is_small_where_views_agree_and_log_of_the_batch_where_all_are_alike():
    same = torch.randn(1, 9, 16).expand(3, -1, -1)
    assert info_nce(same, 0.05) < 0.01
    assert info_nce(torch.ones(3, 9, 16), 0.2).item() == pytest.approx(math.log(9), rel=1e-5)
    assert info_nce(torch.stack([same[0], same[0].roll(1, 0), same[0].roll(2, 0)]), 0.05) > 3


def test_recognition_projects_each_view_with_the_statistics_of_that_view():
    module = Recognition(10, VIEWS, 0.2).double()
    pooled = torch.randn(5 * VIEWS, 10, dtype=torch.float64)
    projected = []
    for v in range(VIEWS):
        x = pooled[v::VIEWS]
        for i in (0, 3):
            linear, norm = module.projector[i], module.projector[i + 1]
            x = x @ linear.weight.T + linear.bias
            x = (x - x.mean(0)) / (x.var(0, correction=0) + norm.eps).sqrt() * norm.weight + norm.bias
            x = x.clamp(min=0)
        projected.append(x @ module.projector[6].weight.T + module.projector[6].bias)
    assert module(pooled).item() == pytest.approx(slow_info_nce(torch.stack(projected), 0.2), rel=1e-10)


def test_views_alone_train_the_student_and_nothing_is_predicted():
    model = jepa("views", dtype=torch.float64, views=VIEWS)
    views = views_of()
    views["pixels"].requires_grad_()
    loss, count, facts = model(**views)
    expected = model.recognition(encode_windows(model.student, **_renamed(views)))
    assert count == 4 and (loss / count).item() == pytest.approx(expected.item())
    learned = gradients(model, loss)
    assert {name.partition(".")[0] for name in learned} == {"student", "recognition"}
    taken_away = {"student.norm.bias", "recognition.projector.0.bias", "recognition.projector.3.bias"}  # by BatchNorm
    assert {name for name, gradient in learned.items() if not gradient.abs().max() > 1e-12} <= taken_away
    assert views["pixels"].grad.abs().amax((1, 2, 3)).min() > 0
    assert facts["target_tokens"] == facts["predictor_tokens"] == facts["encoder_tokens"] == 0
    assert facts["view_tokens"] == 12 * (1 + 8) and facts["view_pairs"] == 12 * 9**2
    assert facts["losses"]["views"].item() == pytest.approx(expected.item())


def _renamed(views):
    return {"pixels": views["pixels"], "patches": views["windows"]}


def test_a_view_is_compared_with_its_own_image():
    """Broken on purpose: views dealt to other images are recognised worse once the model has learned."""
    model = jepa("views", views=VIEWS)
    crops = torch.randn(8, 3, 48, 48).repeat_interleave(VIEWS, 0)
    windows = view_windows(GRID, torch.arange(8 * VIEWS), 0.5)
    right = {"pixels": cut(crops, windows, GRID), "windows": windows}
    wrong = {name: x.unflatten(0, (8, VIEWS)).transpose(0, 1).flatten(0, 1) for name, x in right.items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    for _ in range(60):
        loss = mean_loss_of(model, right)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert mean_loss_of(model, right) < 0.5 < 1.5 < mean_loss_of(model, wrong)


def mean_loss_of(model, views):
    loss, count, _ = model(**views)
    return loss / count


@pytest.mark.parametrize("objective", ["dseq", "ijepa"])
def test_views_beside_a_prediction_add_their_loss_and_its_gradient(objective):
    inputs, views = batch(4, dtype=torch.float64), views_of()
    plain = jepa(objective, dtype=torch.float64)
    both = jepa(objective, dtype=torch.float64, views=VIEWS, views_factor=0.3)
    plain_state = {name: x for name, x in both.state_dict().items() if not name.startswith("recognition")}
    plain.load_state_dict(plain_state)
    loss, count, facts = both(*inputs, **views)
    predicted = mean_loss(plain, *inputs)
    recognised = both.recognition(encode_windows(both.student, **_renamed(views)))
    assert (loss / count).item() == pytest.approx((predicted + 0.3 * recognised).item(), rel=1e-12)
    assert facts["losses"]["prediction"].item() == pytest.approx(predicted.item())
    assert facts["losses"]["views"].item() == pytest.approx(0.3 * recognised.item())
    ours = gradients(both, loss / count)
    first, second = gradients(plain, predicted), gradients(both, 0.3 * recognised)
    for name, gradient in ours.items():
        expected = first.get(name, torch.zeros_like(gradient)) + second.get(name, torch.zeros_like(gradient))
        assert (gradient - expected).abs().max() < 1e-10 * max(1, expected.abs().max()), name


def test_the_target_follows_the_student_though_no_loss_looks_at_it():
    model = jepa("views", views=VIEWS)
    before = model.target.blocks[0].mlp.fc1.weight.clone()
    model.update_target(0.75)
    expected = 0.75 * before + 0.25 * model.student.blocks[0].mlp.fc1.weight
    torch.testing.assert_close(model.target.blocks[0].mlp.fc1.weight, expected)


@pytest.mark.parametrize("settings", [{"views": 1}, {"objective": "views"}, {"objective": "views", "views": 1}])
def test_one_view_cannot_be_recognised(settings):
    with pytest.raises(UserError, match="at least two views"):
        jepa(**settings)


def test_what_is_missing_is_named():
    model = jepa("views", views=VIEWS)
    with pytest.raises(UserError, match="views are missing"):
        model(*batch(4))
    with pytest.raises(UserError, match="at least two images"):
        model(**views_of(1, dtype=torch.float32))


def test_what_the_caller_wants_fetched_comes_back():
    model = jepa("views", views=VIEWS)
    _, _, facts = model(**views_of(dtype=torch.float32), fetch=torch.arange(3.0))
    assert facts["fetched"].tolist() == [0, 1, 2]
