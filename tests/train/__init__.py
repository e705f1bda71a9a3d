"""Tests of the recipes. They import `common` as the scripts in train/ do, whose folder Python puts first."""

import sys
from pathlib import Path

TRAIN = Path(__file__).parents[2] / "train"
sys.path.insert(0, str(TRAIN))
