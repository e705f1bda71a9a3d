"""Published figures to print beside ours: other backbones, at other resolutions.

All stand on DINO's features (v1). maxF, IoU and accuracy as here; CorLoc of VOC's and COCO's training images.
"""

from typing import Any

_TOKENCUT = "TokenCut, DINO ViT-S/16"
_SOLVER = "TokenCut + bilateral solver, DINO ViT-S/16"
_SELFMASK = "SelfMask (trained), ViT-S; its maxF is of each image's best level"
_LOST = "LOST, DINO ViT-S/16"

# A data set, by what its name holds → method → (maxF, IoU, accuracy).
MASKS = {
    "ecssd": {_TOKENCUT: (80.3, 71.2, 91.8), _SOLVER: (87.4, 77.2, 93.4), _SELFMASK: (95.6, 81.8, 95.5)},
    "duts": {_TOKENCUT: (67.2, 57.6, 90.3), _SOLVER: (75.5, 62.4, 91.4), _SELFMASK: (88.2, 66.0, 93.3)},
    "omron": {_TOKENCUT: (60.0, 53.3, 88.0), _SOLVER: (69.7, 61.8, 89.7), _SELFMASK: (85.2, 65.5, 91.9)},
}
# → CorLoc.
BOXES = {
    "voc2007": {_LOST: 61.9, _TOKENCUT: 68.8, "SelfMask (trained), ViT-S": 72.3},
    "voc2012": {_LOST: 64.0, _TOKENCUT: 72.1, "SelfMask (trained), ViT-S": 75.3},
    "coco20k": {_LOST: 50.7, _TOKENCUT: 58.8, "SelfMask (trained), ViT-S": 62.7},
}


def published(kind: dict[str, dict[str, Any]], data: str) -> dict[str, Any]:
    """The figures of a data set of this name or path, if there are any. kind: MASKS or BOXES."""
    name = data.lower().replace("-", "").replace("_", "")
    return next((rows for word, rows in kind.items() if word in name), {})
