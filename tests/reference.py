"""The paper's definitions, as plainly as they can be written: one image, one prediction, one token set at a time.

It shares the parameters of a `DSeqJEPA` and timm's blocks with the engine, and none of the engine's own code.
"""

import numpy as np
import torch
from scipy import ndimage

LAYER_NORM_EPS = 1e-5


def saliency(model, image):
    """Class-token parameter · normed patches of the block / √D, stretched to [0, 1]: (C, H, W) → (h·w,)."""
    vit = model.target
    tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(image[None])))
    for block in vit.blocks[: round(11 / 12 * len(vit.blocks))]:
        tokens = block(tokens)
    patches = vit.norm(tokens)[0, vit.num_prefix_tokens :]
    values = torch.stack([(patch * vit.cls_token[0, 0]).sum() / patch.numel() ** 0.5 for patch in patches])
    return (values - values.min()) / (values.max() - values.min())


def otsu_threshold(levels):
    """The level with the greatest variance between those at or below it and those above."""
    best, threshold = -1.0, 0
    for t in range(255):
        low, high = levels[levels <= t], levels[levels > t]
        if len(low) and len(high):
            variance = len(low) * len(high) * (low.mean() - high.mean()) ** 2
            if variance > best * (1 + 1e-12):
                best, threshold = variance, t
    return threshold


def regions(values, grid, num_regions, min_area):
    """The ranked regions of one map, the remainder last: a list of sets of patches; no region found: none at all."""
    values = np.asarray(values, dtype=np.float64).reshape(grid)
    levels = np.round(values * 255)
    labels, count = ndimage.label(levels > otsu_threshold(levels), np.ones((3, 3)))
    found = []
    for label in range(1, count + 1):
        inside = np.flatnonzero(labels == label)
        if len(inside) >= min_area * values.size:
            found.append((-values.flat[inside].mean(), -len(inside), inside[0], set(inside.tolist())))
    ranked = [patches for *_, patches in sorted(found, key=lambda r: r[:3])][: num_regions - 1]
    rest = set(range(values.size)).difference(*ranked)
    return [*ranked, rest] if ranked and rest else []


def sequence(ranked, objective):
    """(ranked patches of the context, step, target) of each prediction; in the plain form every rank is 0."""
    out = []
    for k in range(1, len(ranked)):
        if objective == "dseq_causal":
            context = [(patch, r) for r, region in enumerate(ranked[:-1]) for patch in region]
        else:
            context = [(patch, 0) for region in ranked[:k] for patch in region]
        out.append((context, k, ranked[k]))
    return out


def block_sequence(context, targets):
    """I-JEPA's four predictions from masks (h, w) and (4, h, w)."""
    seen = [(patch, 0) for patch in context.flatten().nonzero().flatten().tolist()]
    blocks = [set(target.flatten().nonzero().flatten().tolist()) for target in targets]
    return [(seen, k, block) for k, block in enumerate([b for b in blocks if b], 1)]


def predict(model, image, context, step, target):
    """One prediction: (C, H, W), [(patch, rank)], place, {patches} → (patches in the target, D), by patch number."""
    vit, predictor = model.student, model.predictor
    prefix = vit.num_prefix_tokens
    tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(image[None])))
    context = sorted(context)
    chosen = list(range(prefix)) + [prefix + patch for patch, _ in context]
    ranks = [0] * prefix + [rank for _, rank in context]
    sees = torch.tensor([[theirs <= mine for theirs in ranks] for mine in ranks])
    tokens = torch.cat([tokens[:, i : i + 1] for i in chosen], dim=1)
    for block in vit.blocks:
        tokens = block(tokens, attn_mask=sees)
    tokens = vit.norm(tokens)

    causal = any(rank for _, rank in context)
    parts = []
    for i, (patch, rank) in enumerate(context):
        if not causal or rank < step:
            parts.append(predictor.embed(tokens[0, prefix + i]) + predictor.positions[patch])
    seen = len(parts)
    parts += [predictor.mask_token[0] + predictor.positions[patch] for patch in sorted(target)]
    tokens = torch.stack(parts)[None]
    for block in predictor.blocks:
        tokens = block(tokens)
    return predictor.project(predictor.norm(tokens))[0, seen:]


def latents(model, image):
    """What is to be predicted: (C, H, W) → (h·w, D)."""
    vit = model.target
    tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(image[None])))
    for block in vit.blocks:
        tokens = block(tokens)
    patches = vit.norm(tokens)[0, vit.num_prefix_tokens :]
    centred = patches - patches.mean(1, keepdim=True)
    return centred / (centred.square().mean(1, keepdim=True) + LAYER_NORM_EPS).sqrt()


def smooth_l1(a, b):
    gap = (a - b).abs()
    return torch.where(gap < 1, gap.square() / 2, gap - 0.5)


def plan_as_lists(plan):
    """(image, context, step, target) of every prediction of a Plan, without the engine's help."""
    out = []
    for p in range(len(plan.targets)):
        e = int(plan.target_context[p])
        context = plan.contexts[e].nonzero().flatten().tolist()
        ranks = [0] * len(context) if plan.context_rank is None else [int(plan.context_rank[e, i]) for i in context]
        target = set(plan.targets[p].nonzero().flatten().tolist())
        out.append((int(plan.context_image[e]), list(zip(context, ranks, strict=True)), int(plan.step[p]), target))
    return out


def predict_plan(model, images, plan):
    return torch.cat([predict(model, images[i], *rest) for i, *rest in plan_as_lists(plan)])


def step(model, images, use_regions, blocks, num_regions=5, min_area=0.02):
    """The loss of one batch."""
    grid = model.student.patch_embed.grid_size
    errors, means, wanted = [], [], []  # the last two: {(step, image): mean}
    for i, image in enumerate(images):
        parts = []
        if model.objective != "ijepa" and use_regions[i]:
            with torch.no_grad():
                values = saliency(model, image)
            parts = sequence(regions(values, grid, num_regions, min_area), model.objective)
        parts = parts or block_sequence(blocks.context[i], blocks.targets[i])
        with torch.no_grad():
            target_latents = latents(model, image)
        for context, k, target in parts:
            prediction = predict(model, image, context, k, target)
            goal = torch.stack([target_latents[patch] for patch in sorted(target)])
            errors.append(smooth_l1(prediction, goal))
            means.append((k, prediction.mean(0)))
            wanted.append((k, goal.mean(0)))
    loss = torch.cat(errors if model.loss == "token" else [error.mean()[None] for error in errors]).mean()
    if factor := model.terms.get("contrastive"):
        loss = loss + factor * 0.001 * vicreg(model.contrastive.projector, means, wanted)
    return loss


def vicreg(projector, means, wanted):
    pairs = [(projector(x), projector(y)) for (_, x), (_, y) in zip(means, wanted, strict=True)]
    alike = torch.stack([(x - y).square().mean() for x, y in pairs]).mean()
    variance, covariance = [], []
    for k in sorted({k for k, _ in means}):
        of_k = [pair for pair, (place, _) in zip(pairs, means, strict=True) if place == k]
        if len(of_k) < 2:
            continue
        for side in (0, 1):
            z = torch.stack([pair[side] for pair in of_k])
            table = torch.cov(z.T)
            variance.append(torch.relu(1 - (table.diagonal() + 1e-4).sqrt()).mean())
            covariance.append((table.square().sum() - table.diagonal().square().sum()) / z.shape[1])
    # per k the two sides add up; over k they are averaged
    terms = len(variance) / 2
    return 25 * alike + (25 * sum(variance) + sum(covariance)) / terms if terms else 25 * alike
