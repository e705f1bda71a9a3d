"""What windows of attention save a detector's backbone: time and memory beside the same ViT with global attention.

    python benchmarks/dense.py                                         # on the CPU: ViT-B/16 at 1024 px
    python benchmarks/dense.py --precision bf16 --batch 8 --rounds 5   # on a GPU, if there is one
    python benchmarks/dense.py --model dseq_jepa_vit_s16 --size 512 --json dense.json

A step is forward and backward of the maps of blocks 3, 5, 7 and 11 (at the same shares of other depths) with random
weights. Both take turns in each round, and a figure is the least of its rounds. On a GPU memory is the peak of the
step, on a CPU what is kept for the backward pass.
"""

import argparse
import json
import time
from pathlib import Path

import measure  # noqa: F401  # before torch, whose threads and memory it sets
import torch
from common.dense.backbone import DenseBackbone, at_depth
from common.dense.pyramid import TAPS
from common.system import launch
from rivals import saved_bytes

from timm_dseq.hub.load import load_backbone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dseq_jepa_vit_b16")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--window", type=int, default=14)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    accelerator = launch.accelerator(mixed_precision=args.precision)
    vit, _ = load_backbone(args.model, random=True)
    taps = [at_depth(share, len(vit.blocks)) for share in TAPS["dseq"]]
    ways = {f"windows of {args.window}": args.window, "global attention": None}
    backbone = DenseBackbone(vit, taps).to(accelerator.device).train()
    images = torch.randn(args.batch, 3, args.size, args.size, device=accelerator.device)

    def loss() -> torch.Tensor:
        with accelerator.autocast():
            return sum(one.float().square().mean() for one in backbone(images).values())

    figures = {name: {"seconds": float("inf"), "memory_gib": 0.0} for name in ways}
    for _ in range(args.rounds):
        for name, backbone.window in ways.items():
            figure = figures[name]
            if accelerator.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            elif not figure["memory_gib"]:
                figure["memory_gib"] = saved_bytes(loss, backbone) / 2**30
            launch.wait(accelerator.device)
            begun = time.perf_counter()
            loss().backward()
            launch.wait(accelerator.device)
            figure["seconds"] = min(figure["seconds"], time.perf_counter() - begun)
            if accelerator.device.type == "cuda":
                figure["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            backbone.zero_grad()
    print(f"{args.model}, {args.size} px, batch {args.batch}, {args.precision}, {launch.described(accelerator)}")
    for name, figure in figures.items():
        print(f"{name:<18} {figure['seconds']:8.2f} s a step {figure['memory_gib']:8.2f} GiB")
    windows, whole = figures.values()
    ratios = {key: whole[key] / windows[key] for key in windows}
    print(f"{'':<18} {ratios['seconds']:8.2f} × faster  {ratios['memory_gib']:8.2f} × less memory")
    if args.json:
        args.json.write_text(json.dumps({**vars(args), "json": None, "figures": figures}, indent=1))


if __name__ == "__main__":
    main()
