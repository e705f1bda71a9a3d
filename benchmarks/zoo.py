"""What the package costs a user of timm: seconds of import, and of create_model against timm's own ViT-B/16.

    python benchmarks/zoo.py

Everything is warmed, interleaved and repeated; the figures are medians and their ratio.
"""

import statistics
import subprocess
import sys
import time

import timm

import timm_dseq  # noqa: F401

ROUNDS = 9


def import_seconds() -> tuple[float, float]:
    """Of `import timm`, and what `import timm_dseq` adds: each in a process of its own, as a user meets it."""
    code = """
import time
start = time.perf_counter()
import timm
middle = time.perf_counter()
import timm_dseq
print(middle - start, time.perf_counter() - middle)
"""
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True) for _ in range(ROUNDS)]
    pairs = [tuple(map(float, run.stdout.split())) for run in runs]
    return tuple(statistics.median(column) for column in zip(*pairs, strict=True))


def create_seconds(ours: str, theirs: str) -> tuple[list[float], list[float]]:
    """Seconds of create_model(name, num_classes=0) in each round; who goes first changes from round to round."""
    seconds = {ours: [], theirs: []}
    for round_ in range(ROUNDS + 1):
        for name in (ours, theirs) if round_ % 2 else (theirs, ours):
            start = time.perf_counter()
            timm.create_model(name, num_classes=0)
            if round_:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    return seconds[ours], seconds[theirs]


if __name__ == "__main__":
    stock, added = import_seconds()
    print(f"import timm {stock * 1e3:.0f} ms; import timm_dseq adds {added * 1e3:.1f} ms")
    ours, theirs = create_seconds("dseq_jepa_vit_b16", "vit_base_patch16_224")
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    print(f"create_model: dseq_jepa_vit_b16 {statistics.median(ours):.3f} s, ", end="")
    print(f"vit_base_patch16_224 {statistics.median(theirs):.3f} s, ", end="")
    print(f"ratio {statistics.median(ratios):.3f} (single rounds {min(ratios):.2f} to {max(ratios):.2f})")
