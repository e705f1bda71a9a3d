"""DSeq-JEPA for timm and the Hugging Face Hub. Importing this package registers the `dseq_jepa_vit_*` backbones."""

from .blocks import Blocks, block_masks
from .dseq_jepa import DSeqVisionTransformer
from .errors import UserError
from .jepa import DSeqJEPA
from .plans import Plan, plan_blocks, plan_regions
from .predictor import Predictor
from .regions import Regions, rank_regions
from .saliency import saliency_from_tokens, saliency_map

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
    "rank_regions",
    "saliency_from_tokens",
    "saliency_map",
]
