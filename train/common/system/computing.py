"""The settings that say how a run is computed, of all programs that train with labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class System:
    """How the run is computed. Processes and nodes are accelerate's: `accelerate launch --help`.

    Args:
        precision: no (float32) or bf16 (autocast)
        checkpointing: recompute activations in the backward pass instead of keeping them
    """

    precision: Literal["no", "bf16"] = "no"
    checkpointing: bool = False
