"""DSeq-JEPA for timm and the Hugging Face Hub. Importing this package registers the `dseq_jepa_vit_*` backbones."""

from . import early  # noqa: F401  # before torch is loaded
from .dseq_jepa import DSeqVisionTransformer
from .engine.jepa import DSeqJEPA
from .engine.plans import Plan, plan_blocks, plan_regions
from .engine.predictor import Predictor
from .engine.regions import Regions, rank_regions
from .engine.saliency import saliency_from_tokens, saliency_map
from .engine.target_blocks import Blocks, block_masks
from .engine.views.windows import view_windows
from .errors import UserError
from .prune import prune

__version__ = "0.1.0"
__all__ = [
    "Blocks",
    "DSeqJEPA",
    "DSeqVisionTransformer",
    "Plan",
    "Predictor",
    "Regions",
    "UserError",
    "block_masks",
    "plan_blocks",
    "plan_regions",
    "prune",
    "rank_regions",
    "saliency_from_tokens",
    "saliency_map",
    "view_windows",
]
