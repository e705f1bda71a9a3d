"""Doors of the `timm-dseq` command to the recipes: programs of their own, which train and judge.

In a checkout they lie in train/; in an installed package, whole, in timm_dseq/train/.
"""

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

RECIPES = {
    "pretrain": "pretrain a ViT on a folder of images, or go on from weights",
    "probe": "judge a frozen backbone: kNN, linear and attentive probes",
    "finetune": "fine-tune a backbone on labelled images",
    "detect": "train a detector on a backbone",
    "segment": "train semantic segmentation on a backbone",
    "discover": "measure whether saliency finds objects",
    "faithfulness": "measure whether a classifier needs what is salient",
    "table": "show results side by side",
}
_NEEDED = ("accelerate", "datasets", "jsonargparse", "rich")
_INSTALLED = Path(__file__).with_name("train")
FOLDER = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[1] / "train"


def enter(recipe: str, arguments: Sequence[str]) -> str:
    """Become the recipe, with these arguments: nothing comes back but why it cannot be.

    A data set may stand first, without a name: `timm-dseq pretrain FOLDER`, which takes the recipe of speedrun.yaml if
    no other file is named.
    """
    program = FOLDER / f"{recipe}.py"
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing or not program.is_file():
        lacking = missing[0] if missing else str(program)
        return f"timm-dseq {recipe}: {lacking} is not here: pip install 'timm-dseq[train]'"
    words = [*arguments]
    if words and not words[0].startswith("-") and recipe != "table":
        words.insert(0, "--data.path")
        if recipe == "pretrain" and not any(word.split("=")[0] == "--config" for word in words):
            words.insert(0, f"--config={FOLDER / 'configs' / 'speedrun.yaml'}")
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, str(program), *words])
