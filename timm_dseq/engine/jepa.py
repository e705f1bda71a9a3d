"""DSeqJEPA: student, EMA target and predictor; images (B, C, H, W) → the loss of a batch, as a sum and its count."""

from copy import deepcopy

import timm
import torch
from timm.layers import Attention
from timm.models import VisionTransformer
from torch import nn
from torch.nn import functional as F

from ..errors import UserError
from .curriculum import Choice
from .loss import MEANS, batch_loss
from .packing import attention_rule, chain, pack, scatter_to_slots, slots_of
from .plans import Plan
from .predictor import Predictor
from .regions import Regions, check_options, rank_regions
from .saliency import TRAINING_QUERIES, check_query, saliency_from_tokens
from .target_blocks import Blocks
from .terms import TERMS, check_terms
from .vit import block_index, check_packable, embed, final_norm, full_precision, grid_of, prepare_encoder, run_blocks

OBJECTIVES = ("dseq", "dseq_causal", "ijepa")


class DSeqJEPA(nn.Module):
    """Everything one pretraining step needs.

    encoder: the name of a timm ViT, or a model, which becomes the student itself. pretrained: keep the weights it has,
    or load those that belong to the name; otherwise all start as I-JEPA's. Regions, their order and the saliency query
    are those of `rank_regions` and `saliency_map`; `flat` predicts every region from R_1 alone. terms: losses to add,
    name → factor; contrastive=True is short for terms={"contrastive": 1.0}.
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
        terms: dict[str, float] | None = None,
        predictor_width: int = 384,
        predictor_depth: int | None = None,
    ) -> None:
        super().__init__()
        if objective not in OBJECTIVES:
            raise UserError(f"objective={objective!r} is unknown: choose one of {', '.join(OBJECTIVES)}")
        if loss not in MEANS:
            raise UserError(f"loss={loss!r} is unknown: choose 'token' or 'step'")
        if flat and objective == "dseq_causal":
            raise UserError("flat=True and objective='dseq_causal' exclude each other: use objective='dseq'")
        check_options(num_regions, min_area, order, regions, stop_after)
        terms = {**({"contrastive": 1.0} if contrastive else {}), **(terms or {})}
        check_terms(terms)
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
        self.terms = terms
        for name in terms:  # each a module of its own name, as checkpoints have it
            self.add_module(name, TERMS[name](encoder.embed_dim))
        self.varlen = False  # of the student's pass; see Predictor.varlen

    def train(self, mode: bool = True) -> "DSeqJEPA":
        super().train(mode)
        self.target.eval()
        return self

    def compile(self, **options) -> None:
        """torch.compile the blocks of the three transformers, in place.

        They are nearly all of the work, and the same few graphs serve every batch. The rest follows the sizes of each
        batch's regions and is not compiled.
        """
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
        """The loss of a batch summed over its target tokens, (); how many these are; and facts about the batch.

        The mean is loss / count; sums and counts of several batches or processes add up. With loss="step" they are the
        sum over predictions, each the mean over its tokens, and the number of predictions.

        use_regions (B,) bool: the curriculum's coin of each image (None: regions for all). blocks: the target blocks
        that an image without regions, or whose coin says so, is trained on. fetch: numbers on the device that the
        caller wants on the host: they come as facts["fetched"] in the step's one copy.

        Given a plan, the student's predictions for it (see `predict`); with look, see `look`.
        """
        if plan is not None:
            return self._predictions(images, plan)[0]
        if look:
            return self._features(images)
        if blocks is None or len(blocks) != len(images):
            raise UserError("blocks are missing: give one for each image, by block_masks(grid, seeds)")
        tokens = self._begin_target(images)
        choice = Choice(self._regions(images, tokens, blocks), use_regions, blocks, images.device, fetch)
        latents = self._latents(tokens)  # the device computes them while the numbers of `choice` come to the host
        plan, facts = choice.plan(self.flat, self.objective == "dseq_causal")
        predictions, work = self._predictions(images, plan)
        steps = max(self.region_options["num_regions"] - 1, blocks.targets.shape[1])
        terms = {name: (factor, getattr(self, name)) for name, factor in self.terms.items()}
        with torch.autocast(images.device.type, enabled=False):
            loss, count, losses = batch_loss(full_precision(predictions), latents, plan, steps, self.loss, terms)
        return loss, count, {**facts, **losses, **work}

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
        tokens = self._begin_target(images)
        return self._end_target(tokens), self._saliency(images, tokens)

    def _saliency(self, images: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return saliency_from_tokens(self.target, tokens, self.query, grid=grid_of(self.target, images))

    def _regions(self, images: torch.Tensor, tokens: torch.Tensor, blocks: Blocks) -> Regions | None:
        """Ranked regions of a batch; None where the objective has none."""
        if self.objective == "ijepa":
            return None
        return rank_regions(self._saliency(images, tokens), seeds=blocks.seeds, **self.region_options)

    def _predictions(self, images: torch.Tensor, plan: Plan) -> tuple[torch.Tensor, dict]:
        """Predictions (T, D) in the order of `plan.targets.nonzero()`, and what the two transformers computed."""
        model = self.student
        tokens = embed(model, images)  # (B, prefix + N, D)
        length, dim = tokens.shape[1:]
        prefix = model.num_prefix_tokens
        sizes = prefix + plan.sizes[0]
        varlen = self.varlen and plan.context_rank is None  # its kernel knows no ranks
        layout = chain(sizes) if varlen else pack(sizes, length, dim)
        slots = slots_of(layout, F.pad(plan.contexts, (prefix, 0), value=True))  # (E, prefix + N)
        source = plan.context_image[:, None] * length + torch.arange(length, device=slots.device)
        source = scatter_to_slots(layout, slots, source, empty=0)
        rank = None
        if plan.context_rank is not None:
            rank = scatter_to_slots(layout, slots, F.pad(plan.context_rank, (prefix, 0)), empty=0)
        rows = tokens.flatten(0, 1).index_select(0, source).view(layout.rows, layout.length, dim)
        rows = run_blocks(model.blocks, rows, attention_rule(layout, slots, rank), model.grad_checkpointing)
        encoded = final_norm(model)(rows).flatten(0, 1)
        predictions, predictor_layout = self.predictor(encoded, slots[:, prefix:], plan)
        return predictions, {**layout.facts("encoder"), **predictor_layout.facts("predictor")}
