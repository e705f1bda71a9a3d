"""What only a GPU can show. Every check takes a device: on the CPU it runs with all other tests, so it cannot rot.

`pytest tests/gpu -m gpu -n 0` on a machine that has one; benchmarks/gpu/figures.py does so.
"""

from ..train import TRAIN  # noqa: F401  # puts `common` on the path
