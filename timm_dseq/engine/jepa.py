"""DSeqJEPA: student, EMA target and predictor; images (B, C, H, W) → the loss of a batch, as a sum and its count."""

from collections.abc import Mapping
from copy import deepcopy

import timm
import torch
from timm.layers import Attention
from timm.models import VisionTransformer
from torch import nn
from torch.nn import functional as F

from ..arguments import check_images, check_positive, check_share, check_tensor, check_whole
from ..errors import UserError
from ..host import Fetch
from .curriculum import Choice, region_facts
from .loss import MEANS, batch_loss, by_step
from .packing import pack_contexts
from .plans import Plan
from .predictor import Predictor
from .regions import Regions, check_options, rank_regions
from .saliency import AnyQuery, check_query, saliency_from_tokens
from .target_blocks import Blocks
from .terms import TERMS, AnyTerm, check_terms
from .views.recognition import Recognition
from .views.windows import encode_windows, pooled_width
from .vit import block_index, check_packable, embed, final_norm, full_precision, grid_of, prepare_encoder, run_blocks

OBJECTIVES = ("dseq", "dseq_causal", "ijepa", "views")


class DSeqJEPA(nn.Module):
    """Everything one pretraining step needs.

    encoder: the name of a timm ViT, or a model, which becomes the student itself. pretrained: keep the model's weights,
    or load those that belong to the name; otherwise it is initialised as I-JEPA's. query and block are those of
    `saliency_map`, num_regions to stop_after those of `rank_regions`; flat=True predicts every region from R_1 alone.
    loss: the mean over target tokens ("token"), or over predictions of the mean over each one's tokens ("step").
    terms: losses to add, name → factor, or → (factor, your own function or module, as `terms` describes it);
    contrastive=True is short for terms={"contrastive": 1.0}.
    views: crops of each image that have to recognise one another, each by a few windows of patches (0: none);
    objective="views" is that alone, with others it is added times views_factor. temperature: of its InfoNCE.
    """

    def __init__(
        self,
        encoder: str | VisionTransformer,
        objective: str = "dseq",
        *,
        img_size: int | tuple[int, int] | None = None,
        pretrained: bool = False,
        query: AnyQuery = "cls_param",
        block: int | float = 11 / 12,
        num_regions: int = 5,
        min_area: float = 0.02,
        order: str = "saliency",
        regions: str = "components",
        stop_after: int | None = None,
        flat: bool = False,
        loss: str = "token",
        contrastive: bool = False,
        terms: dict[str, AnyTerm] | None = None,
        views: int = 0,
        views_factor: float = 1.0,
        temperature: float = 0.2,
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
        if views == 1 or (objective == "views" and not views):
            raise UserError(f"views={views}: an image has to be recognised in at least two views")
        self.region_options = {"num_regions": num_regions, "min_area": min_area, "order": order}
        self.region_options |= {"regions": regions, "stop_after": stop_after}
        check_options(**self.region_options)
        check_whole("views", views, 0)
        check_positive("views_factor", views_factor)
        check_positive("temperature", temperature)
        check_whole("predictor_width", predictor_width, 1)
        if predictor_depth is not None:
            check_whole("predictor_depth", predictor_depth, 1)
        if not isinstance(terms, Mapping | None):
            raise UserError(f"terms={terms!r}: give a mapping, name → factor")
        terms = {**({"contrastive": 1.0} if contrastive else {}), **(terms or {})}
        check_terms(terms)
        if isinstance(encoder, str):
            size = {} if img_size is None else {"img_size": img_size}
            encoder = timm.create_model(encoder, pretrained=pretrained, num_classes=0, **size)
        elif img_size is not None:
            raise UserError("img_size is for an encoder given by name: this one has its size already")
        check_packable(encoder)
        self.objective, self.loss, self.flat = objective, loss, flat
        if self.with_regions:
            check_query(encoder, query, training=True)
        self.query, self.saliency_block = query, block_index(encoder, block)
        prepare_encoder(encoder, keep_weights=pretrained)
        self.student = encoder
        self.target = deepcopy(encoder).requires_grad_(False).eval()
        depth = predictor_depth or (6 if len(encoder.blocks) <= 12 else 12)
        heads = encoder.blocks[0].attn.num_heads
        self.predictor = Predictor(encoder.patch_embed.grid_size, encoder.embed_dim, heads, predictor_width, depth)
        self.terms: dict[str, float] = {}
        for name, given in terms.items():
            factor, term = given if isinstance(given, tuple) else (given, TERMS[name](encoder.embed_dim))
            if not name.isidentifier() or hasattr(self, name):
                raise UserError(f"terms: {name!r} is no free name: the model has one of its own, choose another")
            self.terms[name] = factor
            setattr(self, name, term)  # a module has this name in checkpoints, too
        self.predictor.requires_grad_(self.predicts)  # DDP waits for the gradient of what has one
        self.views, self.views_factor = views, views_factor
        self.recognition = Recognition(pooled_width(encoder), views, temperature) if views else None
        self.varlen = False  # of the student's pass; see Predictor.varlen

    @property
    def with_regions(self) -> bool:
        """Whether images are divided into regions."""
        return self.objective.startswith("dseq")

    @property
    def predicts(self) -> bool:
        """Whether latents are predicted; otherwise views alone are trained."""
        return self.objective != "views"

    def train(self, mode: bool = True) -> "DSeqJEPA":
        """As of any module, but the target stays in evaluation mode."""
        super().train(mode)
        self.target.eval()
        return self

    def compile(self, **options) -> None:
        """torch.compile the transformer blocks of student, target and predictor, in place.

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
        images: torch.Tensor | None = None,
        use_regions: torch.Tensor | None = None,
        blocks: Blocks | None = None,
        plan: Plan | None = None,
        pixels: torch.Tensor | None = None,
        windows: torch.Tensor | None = None,
        encode: str | None = None,
        fetch: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, int, dict] | tuple[torch.Tensor, torch.Tensor] | torch.Tensor:
        """The loss of a batch as a sum, (); the number of target tokens, or predictions, in it; facts about the batch.

        The mean is loss / count. Sums and counts of several batches or processes add up.

        use_regions (B,) bool: the curriculum's coin of each image (None: regions for all). blocks: the target blocks
        for images whose coin is False, or whose map has no region. fetch: numbers on the device that the caller wants
        on the host; they come as facts["fetched"], in the step's only copy from the device.

        pixels (B·V, C, K·p, q) and windows (B·V, K): the patches of each view, by `view_windows` and `cut`, the V views
        of an image side by side. Where views alone are trained, images are not needed.

        With a plan it returns `predict`, with encode="target" or "student" `features_and_saliency`: DDP and FSDP2 wrap
        no other method.
        """
        if images is not None or self.predicts or plan is not None or encode is not None:
            self._check_images(images)
        self._check(images, use_regions, blocks, plan, pixels, windows)
        if plan is not None:
            return self._predictions(images, plan)[0]
        if encode is not None:
            if encode not in ("target", "student"):
                raise UserError(f"encode={encode!r}: give 'target' or 'student'")
            encoder = {"target": self.target, "student": self.student}[encode]
            tokens = self._begin(encoder, images)
            return self._end(encoder, tokens), self._saliency(encoder, images, tokens)
        copying = None if fetch is None or self.predicts else Fetch(fetch)  # ends before the device has seen the views
        recognised, seen = self._recognised(pixels, windows)
        if not self.predicts:
            count = len(windows) // self.views
            return recognised * count, count, {**self._nothing_predicted(recognised, copying), **seen}
        if blocks is None or len(blocks) != len(images):
            raise UserError("blocks are missing: give one for each image, by block_masks(grid, seeds)")
        tokens = self._begin(self.target, images)
        choice = Choice(self._regions(images, tokens, blocks), use_regions, blocks, images.device, fetch)
        latents = self._latents(tokens)  # the device computes them while the numbers of `choice` come to the host
        plan, facts = choice.plan(self.flat, self.objective == "dseq_causal")
        predictions, work = self._predictions(images, plan)
        steps = max(self.region_options["num_regions"] - 1, blocks.targets.shape[1])
        terms = {name: (factor, getattr(self, name)) for name, factor in self.terms.items()}
        with torch.autocast(images.device.type, enabled=False):
            loss, count, losses = batch_loss(full_precision(predictions), latents, plan, steps, self.loss, terms)
        if self.views:
            loss = loss + count * self.views_factor * recognised
            losses["losses"]["views"] = self.views_factor * recognised.detach()
        return loss, count, {**facts, **losses, **work, **seen}

    def _check_images(self, images: torch.Tensor) -> None:
        """Images of the grid in which this model predicts."""
        check_images(self.student, images)
        found, grid = grid_of(self.student, images), tuple(self.student.patch_embed.grid_size)
        if found != grid:
            raise UserError(f"images of {found} patches: this model predicts in {grid}")

    def _check(
        self,
        images: torch.Tensor | None,
        use_regions: torch.Tensor | None,
        blocks: Blocks | None,
        plan: Plan | None,
        pixels: torch.Tensor | None,
        windows: torch.Tensor | None,
    ) -> None:
        """Name the argument of `forward` that does not fit the model or the others."""
        grid = self.student.patch_embed.grid_size
        if not isinstance(blocks, Blocks | None) or not isinstance(plan, Plan | None):
            raise UserError("blocks and plan are those of block_masks, plan_regions and plan_blocks")
        if blocks is not None and images is not None:
            check_tensor("blocks.context", blocks.context, (len(images), *grid), "(B, h, w)", "bool")
        if use_regions is not None:
            check_tensor("use_regions", use_regions, (len(images),), "(B,)", "bool")
        if pixels is not None and windows is not None:
            check_tensor("windows", windows, (None, None), "(B·V, K)", "int")
            check_tensor("pixels", pixels, (len(windows), None, None, None), "(B·V, C, K·p, q)")

    def predict(self, images: torch.Tensor, plan: Plan) -> torch.Tensor:
        """The student's differentiable predictions, in the order of `plan.targets.nonzero()`: (T, D)."""
        return self(images, plan=plan)

    def features_and_saliency(self, images: torch.Tensor, encoder: str = "target") -> tuple[torch.Tensor, torch.Tensor]:
        """Patch features of the target, or of the student, after the final norm (B, N, D), and saliency (B, h, w)."""
        return self(images, encode=encoder)

    @torch.no_grad()
    def update_target(self, momentum: float) -> None:
        """target ← momentum · target + (1 − momentum) · student."""
        check_share("momentum", momentum)
        torch._foreach_lerp_(list(self.target.parameters()), list(self.student.parameters()), 1 - momentum)

    @torch.no_grad()
    def _begin(self, encoder: VisionTransformer, images: torch.Tensor) -> torch.Tensor:
        """A pass up to the transformer block that saliency is read from: its tokens (B, prefix + N, D)."""
        return run_blocks(encoder.blocks[: self.saliency_block + 1], embed(encoder, images))

    @torch.no_grad()
    def _end(self, encoder: VisionTransformer, tokens: torch.Tensor) -> torch.Tensor:
        """The rest of the pass: patch features after the final norm (B, N, D)."""
        tokens = run_blocks(encoder.blocks[self.saliency_block + 1 :], tokens)
        return final_norm(encoder)(tokens)[:, encoder.num_prefix_tokens :]

    def _latents(self, tokens: torch.Tensor) -> torch.Tensor:
        """What is to be predicted (B, N, D): the target's features, layer-normed without parameters."""
        features = self._end(self.target, tokens)
        with torch.autocast(tokens.device.type, enabled=False):
            return F.layer_norm(full_precision(features), features.shape[-1:])

    def _saliency(self, encoder: VisionTransformer, images: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Saliency of images (B, C, H, W) from an encoder's tokens (B, prefix + N, D): (B, h, w)."""
        return saliency_from_tokens(encoder, tokens, self.query, grid=grid_of(encoder, images))

    def _regions(self, images: torch.Tensor, tokens: torch.Tensor, blocks: Blocks) -> Regions | None:
        """Ranked regions of a batch; None where the objective has none."""
        if not self.with_regions:
            return None
        return rank_regions(self._saliency(self.target, images, tokens), seeds=blocks.seeds, **self.region_options)

    def _predictions(self, images: torch.Tensor, plan: Plan) -> tuple[torch.Tensor, dict]:
        """Predictions (T, D) in the order of `plan.targets.nonzero()`, and how much the two transformers computed."""
        model = self.student
        rows, rule, slots, layout = pack_contexts(embed(model, images), plan, model.num_prefix_tokens, self.varlen)
        rows = run_blocks(model.blocks, rows, rule, model.grad_checkpointing)
        encoded = final_norm(model)(rows).flatten(0, 1)
        predictions, predictor_layout = self.predictor(encoded, slots, plan)
        return predictions, {**layout.facts("encoder"), **predictor_layout.facts("predictor")}

    def _recognised(
        self, pixels: torch.Tensor | None, windows: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, dict]:
        """The mean loss of the views, (), None without views; and how much the student computed for it."""
        if not self.views:
            return None, {"view_tokens": 0, "view_pairs": 0}
        if windows is None or pixels is None or len(windows) % self.views:
            raise UserError("views are missing: give the pixels and windows of each, by view_windows and cut")
        loss = self.recognition(encode_windows(self.student, pixels, windows))
        length = self.student.num_prefix_tokens + windows.shape[1]
        tokens = len(windows) * length
        return loss, {"view_tokens": tokens, "view_pairs": tokens * length}

    def _nothing_predicted(self, recognised: torch.Tensor, copying: Fetch | None) -> dict:
        """The facts of a batch of which only the views are trained."""
        parts = [f"{part}_{fact}" for part in ("encoder", "predictor") for fact in ("tokens", "pairs", "fill")]
        facts = dict.fromkeys(["target_tokens", *parts], 0)
        none = recognised.detach().new_zeros(0)
        return {
            **facts,
            **region_facts(None),
            **by_step(none, none.long(), self.region_options["num_regions"] - 1),
            "region_share": 0.0,
            "losses": {"views": recognised.detach()},
            "fetched": None if copying is None else copying.read()[0],
        }
