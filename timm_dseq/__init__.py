"""DSeq-JEPA for timm and the Hugging Face Hub. Importing this package registers the `dseq_jepa_vit_*` backbones."""

from .dseq_jepa import DSeqVisionTransformer
from .errors import UserError

__version__ = "0.1.0"
__all__ = ["DSeqVisionTransformer", "UserError"]
