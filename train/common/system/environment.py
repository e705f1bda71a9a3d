"""Environment variables that torch reads when it is loaded: scripts import this file first."""

import os

# By default OpenMP's threads spin while they wait, and take the cores from the loader's workers.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Every batch has another number of tokens: segments that can grow keep the GPU's memory from fragmentation.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
