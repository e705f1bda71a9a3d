"""What has to stand in the environment before torch is loaded: scripts import this file first."""

import os

# Threads of OpenMP that spin while they wait take the cores of the loader's workers.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Every batch has its own number of tokens: segments that grow keep the GPU's memory from falling to pieces.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
