"""What one step costs: packed, dense, I-JEPA packed and stacked, and the target alone, measured in turns.

    python benchmarks/step.py --batch 16 --rounds 3                                   # ViT-S/16 on the CPU
    python benchmarks/step.py --device cuda --model base --batch 256 --amp bfloat16   # on a GPU

Each contender runs forward, backward and EMA; a figure is the least of its rounds, and all contenders take turns
within each round. Beside every time stands the number of FLOPs counted from the token sets.
"""

import argparse
import math
import time
from contextlib import nullcontext
from functools import partial

import torch
from timm.models import VisionTransformer
from torch import nn
from torch.nn import functional as F

import timm_dseq.jepa as jepa_module
from timm_dseq.blocks import Blocks, block_masks
from timm_dseq.encoder import embed, final_norm
from timm_dseq.jepa import DSeqJEPA
from timm_dseq.packing import attention_rule, pack, place, spread
from timm_dseq.plans import plan_regions
from timm_dseq.regions import rank_regions
from timm_dseq.saliency import saliency_from_tokens

SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
PROFILES = {"one (.51/.49)": [0.51], "two (.25, .15/.60)": [0.25, 0.15], "four of .15": [0.15] * 4}
REGIONS = 5


def encoder(name: str, size: int) -> VisionTransformer:
    dim, depth, heads = SIZES[name]
    norm = partial(nn.LayerNorm, eps=1e-6)
    kwargs = {"class_token": True, "no_embed_class": True, "global_pool": "avg", "fc_norm": False, "norm_layer": norm}
    return VisionTransformer(size, 16, embed_dim=dim, depth=depth, num_heads=heads, num_classes=0, **kwargs)


def profile_maps(areas: list[float], grid: tuple[int, int], batch: int) -> torch.Tensor:
    """Maps whose regions have these areas: bands of patches, row by row, kept apart by an empty row."""
    h, w = grid
    one = torch.zeros(h * w)
    at = 0
    for rank, area in enumerate(areas):
        patches = min(round(area * h * w), h * w - at)
        one[at : at + patches] = 1 - 0.05 * rank
        # two bands may not touch, not even by their corners
        at = (math.ceil((at + patches) / w) + 1) * w
    return one.view(1, h, w).expand(batch, -1, -1).clone()


def transformer_flops(length: int, dim: int, depth: int) -> float:
    return depth * (24 * dim**2 * length + 4 * dim * length**2)


def step_flops(model: DSeqJEPA, contexts: list[int], predictions: list[tuple[int, int]], batch: int) -> float:
    """Forward and backward for token sets of these lengths, with the target's forward pass and the patches."""
    vit, predictor = model.student, model.predictor
    n, dim = vit.patch_embed.num_patches, vit.embed_dim
    patches = 2 * n * dim * vit.patch_embed.proj.weight[0].numel()
    total = batch * (transformer_flops(n + 1, dim, len(vit.blocks)) + patches + 3 * patches)
    total += 3 * sum(transformer_flops(size, dim, len(vit.blocks)) for size in contexts)
    for seen, target in predictions:
        total += 3 * transformer_flops(seen + target, predictor.width, len(predictor.blocks))
        total += 3 * 2 * dim * predictor.width * (seen + target)
    return total


def plan_flops(model: DSeqJEPA, plan, batch: int) -> float:
    contexts, views, targets = plan.sizes
    return step_flops(model, [size + 1 for size in contexts], list(zip(views, targets, strict=True)), batch)


class Dense:
    """The same method over N − 1 full copies of every image under masks; it must give the engine's loss."""

    def __init__(self, model: DSeqJEPA) -> None:
        self.model = model

    def __call__(self, images: torch.Tensor, plan) -> torch.Tensor:
        model, copies = self.model, REGIONS - 1
        vit, predictor = model.student, model.predictor
        latents, _ = model._look(images)
        b, n, _ = latents.shape
        image = plan.context_image[plan.target_context]
        seen = torch.ones(b * copies, n, dtype=torch.bool, device=images.device)
        target = torch.zeros_like(seen)
        row = image * copies + plan.step - 1
        seen[row], target[row] = plan.visible(), plan.targets

        tokens = embed(vit, images).repeat_interleave(copies, 0)
        keys = F.pad(seen, (1, 0), value=True)[:, None, None].expand(-1, 1, n + 1, -1)
        for block in vit.blocks:
            tokens = block(tokens, attn_mask=keys)
        tokens = predictor.embed(final_norm(vit)(tokens)[:, 1:])
        tokens = torch.where(target[:, :, None], predictor.mask_token, tokens) + predictor.positions
        keys = (seen | target)[:, None, None].expand(-1, 1, n, -1)
        for block in predictor.blocks:
            tokens = block(tokens, attn_mask=keys)
        predictions = predictor.project(predictor.norm(tokens))
        with torch.autocast(images.device.type, enabled=False):
            goal = latents.repeat_interleave(copies, 0)
            error = F.smooth_l1_loss(predictions.to(goal.dtype), goal, reduction="none").mean(2)
            return (error * target).sum() / target.sum()

    def flops(self, batch: int) -> float:
        n, copies = self.model.student.patch_embed.num_patches, (REGIONS - 1) * batch
        return step_flops(self.model, [n + 1] * copies, [(n, 0)] * copies, batch)


class Stacked:
    """I-JEPA as usual: equal blocks gathered and stacked, no masks anywhere."""

    def __init__(self, model: DSeqJEPA) -> None:
        self.model = model

    def __call__(self, images: torch.Tensor, blocks: Blocks) -> torch.Tensor:
        model = self.model
        vit, predictor = model.student, model.predictor
        latents, _ = model._look(images)
        b, _, dim = latents.shape
        seen = blocks.context.flatten(1).nonzero()[:, 1].view(b, -1)  # (B, K)
        targets = blocks.targets.flatten(2).nonzero()[:, 2].view(b, 4, -1)  # (B, 4, T)
        tokens = embed(vit, images)
        patches = tokens[:, 1:].gather(1, seen[:, :, None].expand(-1, -1, dim))
        tokens = vit.blocks(torch.cat([tokens[:, :1], patches], 1))
        tokens = predictor.embed(final_norm(vit)(tokens)[:, 1:]) + predictor.positions[seen]
        masks = predictor.mask_token + predictor.positions[targets]  # (B, 4, T, width)
        tokens = torch.cat([tokens[:, None].expand(-1, 4, -1, -1), masks], 2).flatten(0, 1)
        for block in predictor.blocks:
            tokens = block(tokens)
        predictions = predictor.project(predictor.norm(tokens[:, seen.shape[1] :]))
        goal = latents[:, None].expand(-1, 4, -1, -1).gather(2, targets[..., None].expand(-1, -1, -1, dim))
        with torch.autocast(images.device.type, enabled=False):
            return F.smooth_l1_loss(predictions.to(goal.dtype), goal.flatten(0, 1))


def equal_blocks(grid: tuple[int, int], batch: int, device: torch.device) -> Blocks:
    """Blocks of one size for every sample, as stacking needs them: contexts are cut to the smallest."""
    blocks = block_masks(grid, torch.arange(batch), target_scale=(0.18, 0.18), target_aspect=(1.0, 1.0))
    context = blocks.context.flatten(1)
    least = int(context.sum(1).min())
    context = context & (context.cumsum(1) <= least)
    return Blocks(context.view_as(blocks.context), blocks.targets, blocks.seeds).to(device)


def saved_bytes(run, model: nn.Module) -> int:
    """Activations kept for the backward pass, every storage once, weights apart."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = run()
    total = sum(kept.values())
    del loss
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small", choices=SIZES)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", choices=["bfloat16", "float16"])
    parser.add_argument("--photos", help="a Parquet file of images, for real maps")
    parser.add_argument("--no-dense", action="store_true", help="leave out the dense pass, the slowest")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)
    model = DSeqJEPA(encoder(args.model, args.size)).to(device)
    grid = model.student.patch_embed.grid_size
    images = torch.randn(args.batch, 3, args.size, args.size, device=device)
    if args.photos:
        from photos import photos, tensors

        images = tensors(photos(args.photos, args.batch), args.size).to(device)
    amp = torch.autocast(device.type, getattr(torch, args.amp)) if args.amp else nullcontext()
    dense, stacked = Dense(model), Stacked(model)
    blocks = block_masks(grid, torch.arange(args.batch))
    equal = equal_blocks(grid, args.batch, device)
    real = jepa_module.saliency_from_tokens

    def sync() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def engine(objective: str, maps: torch.Tensor | None, its_blocks: Blocks):
        """The whole forward pass; the profile's maps take the place of the saliency after it was computed."""

        def run() -> torch.Tensor:
            model.objective = objective
            seen = (lambda *a, **k: (real(*a, **k), maps)[1]) if maps is not None else real
            jepa_module.saliency_from_tokens = seen
            loss, run.facts = model(images, None, its_blocks)
            return loss

        return run

    contenders, flops = {}, {}
    plans = {name: profile_maps(areas, grid, args.batch).to(device) for name, areas in PROFILES.items()}
    with amp, torch.no_grad():
        tokens = model._look(images)[1]
    maps_real = saliency_from_tokens(model.target, tokens)
    plans["real maps"] = maps_real
    for name, maps in plans.items():
        regions = rank_regions(maps)
        print(f"{name}: mean areas {[round(a, 3) for a in (regions.area.float().mean(0) / maps[0].numel()).tolist()]}")
        for objective in ("dseq", "dseq_causal"):
            plan = plan_regions(regions, causal=objective == "dseq_causal")
            contenders[f"{objective}: {name}"] = engine(objective, maps, blocks)
            flops[f"{objective}: {name}"] = plan_flops(model, plan, args.batch)
    two = plan_regions(rank_regions(plans["two (.25, .15/.60)"]))
    if not args.no_dense:
        contenders["dense, N-1 copies"] = lambda: dense(images, two)
        flops["dense, N-1 copies"] = dense.flops(args.batch)
    for label, its_blocks in (("I-JEPA packed", blocks), ("I-JEPA packed, equal", equal)):
        plan = jepa_module.plan_blocks(its_blocks)
        contenders[label] = engine("ijepa", None, its_blocks)
        flops[label] = plan_flops(model, plan, args.batch)
    contenders["I-JEPA stacked, equal"] = lambda: stacked(images, equal)
    flops["I-JEPA stacked, equal"] = flops["I-JEPA packed, equal"]

    def step(run) -> float:
        model.zero_grad(set_to_none=True)
        sync()
        start = time.perf_counter()
        with amp:
            loss = run()
        loss.backward()
        model.update_target(0.996)
        sync()
        return time.perf_counter() - start

    def target_only() -> float:
        sync()
        start = time.perf_counter()
        with amp:
            model._look(images)
        sync()
        return time.perf_counter() - start

    if not args.no_dense:
        gap = abs(contenders["dense, N-1 copies"]().item() - contenders["dseq: two (.25, .15/.60)"]().item())
        print(f"dense and packed agree: the losses differ by {gap:.1e}")
    gap = abs(contenders["I-JEPA stacked, equal"]().item() - contenders["I-JEPA packed, equal"]().item())
    print(f"stacked and packed agree: the losses differ by {gap:.1e}")

    least = dict.fromkeys([*contenders, "target encoder alone"], float("inf"))
    for _ in range(args.rounds):
        for name, run in contenders.items():
            least[name] = min(least[name], step(run))
        least["target encoder alone"] = min(least["target encoder alone"], target_only())
    memory = {}
    for name, run in contenders.items():
        if device.type == "cuda":
            model.zero_grad(set_to_none=True)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            with amp:
                run().backward()
            memory[name] = torch.cuda.max_memory_allocated() - before
        else:
            with amp:
                memory[name] = saved_bytes(run, model)

    base = "dense, N-1 copies" if not args.no_dense else "I-JEPA packed"
    threads = torch.get_num_threads() if device.type == "cpu" else torch.cuda.get_device_name()
    print(f"ViT {args.model}/16 {args.size}, batch {args.batch}, {device} ({threads}), {args.amp or 'float32'}")
    print(f"{'':36}{'ms':>9}{'img/s':>8}{'GFLOP/img':>10}{'GFLOP/s':>9}{'× FLOPs':>9}{'× time':>8}{'of it':>7}", end="")
    print(f"{'MiB':>8}{'× mem':>7}{'fill':>12}  of {base}")
    for name, seconds in least.items():
        count = flops.get(name, args.batch * transformer_flops(grid[0] * grid[1] + 1, *SIZES[args.model][:2]))
        by_flops, by_time = flops[base] / count, least[base] / seconds
        print(f"{name:36}{seconds * 1e3:9.0f}{args.batch / seconds:8.1f}{count / args.batch / 1e9:10.1f}", end="")
        print(f"{count / seconds / 1e9:9.0f}{by_flops:9.2f}{by_time:8.2f}{by_time / by_flops:7.2f}", end="")
        if name in memory:
            print(f"{memory[name] / 2**20:8.0f}{memory[name] / memory[base]:7.2f}", end="")
        facts = getattr(contenders.get(name), "facts", None)
        print(f"   {facts['encoder_fill']:.2f} / {facts['predictor_fill']:.2f}" if facts else "")

    overhead = float("inf")
    for _ in range(args.rounds + 2):
        sync()
        start = time.perf_counter()
        regions = rank_regions(saliency_from_tokens(model.target, tokens))
        plan = plan_regions(regions)
        for sizes, width in ((plan.sizes[0], SIZES[args.model][0]), (plan.sizes[1], model.predictor.width)):
            layout = pack(sizes, grid[0] * grid[1] + 1, width)
            masks = plan.contexts if width == SIZES[args.model][0] and sizes is plan.sizes[0] else plan.visible()
            slots = place(layout, masks)
            spread(layout, slots, torch.arange(masks.shape[1], device=device), 0)
            attention_rule(layout, device)
        sync()
        overhead = min(overhead, time.perf_counter() - start)
    share = overhead / least["dseq: real maps"]
    print(f"saliency + regions + plan + packing on real maps: {overhead * 1e3:.1f} ms, {share:.1%} of the step")


if __name__ == "__main__":
    main()
