"""DSeqJEPA: student, EMA target and predictor; images (B, C, H, W) → the loss of a batch, as a sum and its count."""

from copy import deepcopy

import timm
import torch
from timm.layers import Attention, trunc_normal_
from timm.models import VisionTransformer
from torch import nn
from torch.nn import functional as F

from ..errors import UserError
from ..host import to_device
from ..positions import sincos_positions
from .curriculum import Choice
from .packing import Layout, attention_rule, chain, order_of, pack, place, spread
from .plans import Plan
from .predictor import Predictor, init_weights
from .regions import Regions, check_options, rank_regions
from .saliency import TRAINING_QUERIES, check_query, saliency_from_tokens
from .target_blocks import Blocks
from .terms.vicreg import Contrastive
from .vit import block_index, check_packable, embed, final_norm, full_precision, grid_of, run_blocks

OBJECTIVES = ("dseq", "dseq_causal", "ijepa")


class DSeqJEPA(nn.Module):
    """Everything one pretraining step needs.

    encoder: the name of a timm ViT, or one that exists (it becomes the student itself). pretrained: keep the weights it
    has, or load those that belong to the name; otherwise all start as I-JEPA's. Regions, their order and the saliency
    query are those of `rank_regions` and `saliency_map`; `flat` predicts every region from R_1 alone.
    """

    def __init__(
        self,
        encoder: str | VisionTransformer,
        objective: str = "dseq",
        *,
        img_size: int | tuple[int, int] | None = None,
        pretrained: bool = False,
        query: str = "cls_param",
        block: int | float = 11 / 12,
        num_regions: int = 5,
        min_area: float = 0.02,
        order: str = "saliency",
        regions: str = "components",
        stop_after: int | None = None,
        flat: bool = False,
        loss: str = "token",
        contrastive: bool = False,
        predictor_width: int = 384,
        predictor_depth: int | None = None,
    ) -> None:
        super().__init__()
        if objective not in OBJECTIVES:
            raise UserError(f"objective={objective!r} is unknown: choose one of {', '.join(OBJECTIVES)}")
        if loss not in ("token", "step"):
            raise UserError(f"loss={loss!r} is unknown: choose 'token' or 'step'")
        if flat and objective == "dseq_causal":
            raise UserError("flat=True and objective='dseq_causal' exclude each other: use objective='dseq'")
        check_options(num_regions, min_area, order, regions, stop_after)
        if isinstance(encoder, str):
            size = {} if img_size is None else {"img_size": img_size}
            encoder = timm.create_model(encoder, pretrained=pretrained, num_classes=0, **size)
        elif img_size is not None:
            raise UserError("img_size is for an encoder given by name: this one has its size already")
        check_packable(encoder)
        if objective != "ijepa":
            check_query(encoder, query)
            if query not in TRAINING_QUERIES:
                raise UserError(f"query={query!r} is for analysis: pretrain with one of {', '.join(TRAINING_QUERIES)}")
        self.objective, self.loss, self.flat = objective, loss, flat
        self.query, self.saliency_block = query, block_index(encoder, block)
        self.region_options = {
            "num_regions": num_regions,
            "min_area": min_area,
            "order": order,
            "regions": regions,
            "stop_after": stop_after,
        }
        prepare_encoder(encoder, keep_weights=pretrained)
        self.student = encoder
        self.target = deepcopy(encoder).requires_grad_(False).eval()
        depth = predictor_depth or (6 if len(encoder.blocks) <= 12 else 12)
        heads = encoder.blocks[0].attn.num_heads
        self.predictor = Predictor(encoder.patch_embed.grid_size, encoder.embed_dim, heads, predictor_width, depth)
        self.contrastive = Contrastive(encoder.embed_dim) if contrastive else None
        self.varlen = False  # of the student's pass; see Predictor.varlen

    def train(self, mode: bool = True) -> "DSeqJEPA":
        super().train(mode)
        self.target.eval()
        return self

    def compile(self, **options) -> None:
        """torch.compile the blocks of the three transformers, in place: nearly all of the work, and the same few graphs
        for every batch. The rest follows the sizes of each batch's regions and runs as it is."""
        for block in (*self.student.blocks, *self.target.blocks, *self.predictor.blocks):
            block.compile(**options)

    def explicit_attention(self, on: bool) -> None:
        """Attention as two products and a softmax instead of one fused operation: faster in bf16 on CPUs."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.fused_attn = not on

    @torch.compiler.disable  # torch.compile(model) would make a new graph of every batch's sizes
    def forward(
        self,
        images: torch.Tensor,
        use_regions: torch.Tensor | None = None,
        blocks: Blocks | None = None,
        plan: Plan | None = None,
        look: bool = False,
        fetch: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, int, dict] | tuple[torch.Tensor, torch.Tensor] | torch.Tensor:
        """The loss of a batch, summed over its target tokens; how many they are; and facts about the batch.

        The mean is loss / count. Over several batches or processes, sums and counts add up: no process asks another
        here. With loss="step" the sum and the count are those of predictions, each the mean over its tokens.
        Given a plan: its predictions (see `predict`). With look: see `look`.

        use_regions (B,) bool: the curriculum's coin of each image (None: regions for all). blocks: what an image
        without regions, or whose coin says so, is trained on. fetch: numbers on the device that the caller wants on the
        host: they come as facts["fetched"] in the step's one copy.
        """
        if plan is not None:
            return self._predictions(images, plan)[0]
        if look:
            return self._features(images)
        if blocks is None or len(blocks) != len(images):
            raise UserError("blocks are missing: give one for each image, by block_masks(grid, seeds)")
        seen = self._begin_target(images)
        choice = Choice(self._regions(images, seen, blocks), use_regions, blocks, images.device, fetch)
        latents = self._latents(seen)  # what is asked for travels meanwhile
        plan, facts = choice.plan(self.flat, self.objective == "dseq_causal")
        predictions, run = self._predictions(images, plan)
        with torch.autocast(images.device.type, enabled=False):
            loss, count, by_step = self._loss(full_precision(predictions), latents, plan)
        return loss, count, {**facts, **by_step, **run}

    def predict(self, images: torch.Tensor, plan: Plan) -> torch.Tensor:
        """The student's differentiable predictions, in the order of `plan.targets.nonzero()`: (T, D)."""
        return self(images, plan=plan)

    def look(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the target makes of images: patch features behind the final norm (B, N, D), and saliency (B, h, w)."""
        return self(images, look=True)

    @torch.no_grad()
    def update_target(self, momentum: float) -> None:
        """target ← momentum · target + (1 − momentum) · student."""
        torch._foreach_lerp_(list(self.target.parameters()), list(self.student.parameters()), 1 - momentum)

    @torch.no_grad()
    def _begin_target(self, images: torch.Tensor) -> torch.Tensor:
        """The target's pass up to the block that saliency is read from: its tokens (B, prefix + N, D)."""
        return run_blocks(self.target.blocks[: self.saliency_block + 1], embed(self.target, images))

    @torch.no_grad()
    def _end_target(self, tokens: torch.Tensor) -> torch.Tensor:
        """The rest of the pass: patch features behind the final norm (B, N, D)."""
        tokens = run_blocks(self.target.blocks[self.saliency_block + 1 :], tokens)
        return final_norm(self.target)(tokens)[:, self.target.num_prefix_tokens :]

    def _latents(self, tokens: torch.Tensor) -> torch.Tensor:
        """What is to be predicted (B, N, D): the target's features, normed without parameters."""
        features = self._end_target(tokens)
        with torch.autocast(tokens.device.type, enabled=False):
            return F.layer_norm(full_precision(features), features.shape[-1:])

    def _features(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen = self._begin_target(images)
        return self._end_target(seen), self._saliency(images, seen)

    def _saliency(self, images: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return saliency_from_tokens(self.target, tokens, self.query, grid=grid_of(self.target, images))

    def _regions(self, images: torch.Tensor, tokens: torch.Tensor, blocks: Blocks) -> Regions | None:
        """Ranked regions of a batch; None where the objective has none."""
        if self.objective == "ijepa":
            return None
        return rank_regions(self._saliency(images, tokens), seeds=blocks.seeds, **self.region_options)

    def _predictions(self, images: torch.Tensor, plan: Plan) -> tuple[torch.Tensor, dict]:
        """Predictions (T, D) in the order of `plan.targets.nonzero()`."""
        model = self.student
        everything = embed(model, images)  # (B, prefix + N, D)
        length, dim = everything.shape[1:]
        prefix = model.num_prefix_tokens
        sizes = prefix + plan.sizes[0]
        varlen = self.varlen and plan.context_rank is None  # its kernel knows no ranks
        layout = chain(sizes) if varlen else pack(sizes, length, dim)
        members = F.pad(plan.contexts, (prefix, 0), value=True)  # (E, prefix + N)
        slots = place(layout, members)
        source = plan.context_image[:, None] * length + torch.arange(length, device=slots.device)
        source = spread(layout, slots, source, empty=0)
        rank = None
        if plan.context_rank is not None:
            rank = spread(layout, slots, F.pad(plan.context_rank, (prefix, 0)), empty=0)
        rows = everything.flatten(0, 1).index_select(0, source).view(layout.rows, layout.length, dim)
        rule = attention_rule(layout, slots, rank)
        rows = run_blocks(model.blocks, rows, rule, model.grad_checkpointing)
        encoded = final_norm(model)(rows).flatten(0, 1)
        predictions, its_layout = self.predictor(encoded, slots[:, prefix:], plan)
        return predictions, {**_counts("encoder", layout), **_counts("predictor", its_layout)}

    def _loss(self, predictions: torch.Tensor, latents: torch.Tensor, plan: Plan) -> tuple[torch.Tensor, int, dict]:
        """Smooth L1 to the target's latents (B, N, D), summed as `loss` says, and over how many."""
        b, n = latents.shape[:2]
        total, device = int(plan.sizes[2].sum()), latents.device
        sizes = to_device(plan.sizes[2], device)
        owner = order_of(plan.targets, torch.arange(len(sizes), device=device)[:, None], total)  # (T,)
        image = plan.context_image.index_select(0, plan.target_context)  # (P,)
        patch = image[:, None] * n + torch.arange(n, device=device)
        target = latents.flatten(0, 1).index_select(0, order_of(plan.targets, patch, total))
        error = F.smooth_l1_loss(predictions, target, reduction="none").mean(1)  # (T,)

        if self.loss == "token":
            loss, count = error.sum(), total
        else:
            loss = (error * sizes.to(error.dtype).reciprocal().index_select(0, owner)).sum()
            count = len(sizes)
        steps = max(self.region_options["num_regions"] - 1, 4)
        step = plan.step.index_select(0, owner) - 1
        sums = torch.zeros(2, steps, device=device, dtype=error.dtype)
        both = torch.stack([error.detach(), torch.ones_like(error)])
        sums = sums.scatter_add(1, step.expand(2, -1), both)
        facts = {
            "loss_by_step": sums[0] / sums[1],  # (K,), nan where no image came so far
            "tokens_by_step": sums[1],
            "target_tokens": total,
        }
        if self.contrastive is not None:
            means = [_means(x, owner, sizes) for x in (predictions, target)]
            term = self.contrastive(*means, plan.step, image, (steps, b))
            facts["prediction_loss"], facts["contrastive_loss"] = loss.detach() / count, term.detach()
            loss = loss + count * term  # a mean over the batch is so added to the mean over tokens
        return loss, count, facts


def prepare_encoder(encoder: VisionTransformer, keep_weights: bool = False) -> None:
    """Frozen sin-cos positions, I-JEPA's first weights, no head, and nothing trainable that pretraining leaves out."""
    encoder.reset_classifier(0)
    for unused in (encoder.attn_pool, encoder.fc_norm if final_norm(encoder) is encoder.norm else None):
        if unused is not None:
            unused.requires_grad_(False)
    if not keep_weights:
        init_weights(encoder, encoder.blocks)
        for token in (encoder.cls_token, encoder.reg_token):
            if token is not None:
                trunc_normal_(token, std=0.02)
    positions = sincos_positions(encoder.patch_embed.grid_size, encoder.embed_dim)
    with torch.no_grad():
        encoder.pos_embed.zero_()  # prefix tokens have no place
        encoder.pos_embed[:, encoder.pos_embed.shape[1] - len(positions) :] = positions
    encoder.pos_embed.requires_grad_(False)


def _counts(name: str, layout: Layout) -> dict:
    """What a transformer computes: tokens, pairs of tokens that may attend to each other, and how full its rows are."""
    tokens, pairs = int(layout.sizes.sum()), int((layout.sizes**2).sum())
    return {f"{name}_tokens": tokens, f"{name}_pairs": pairs, f"{name}_fill": layout.fill}


def _means(x: torch.Tensor, owner: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens of each prediction: (T, D) → (P, D)."""
    return x.new_zeros(len(sizes), x.shape[1]).index_add(0, owner, x) / sizes[:, None]
