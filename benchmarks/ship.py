"""Make a run's target encoder part of this package: weights in bfloat16, and what is kept of the run.

    python benchmarks/ship.py runs/speedrun dseq_jepa_vit_ti16.photos65k

Writes timm_dseq/weights/NAME.safetensors and docs/runs/NAME/: config.yaml, every 20th line of log.jsonl, and
features.safetensors, the features of four drawn images by the run's own float32 weights, which tests compare with those
of the weights that are shipped. The card, timm_dseq/weights/NAME.md, is written by hand from the export's and from
results.jsonl, which train/probe.py adds to.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "train"))

from common.data.scenes import Scenes  # noqa: E402
from common.run.log import records  # noqa: E402

from timm_dseq.dseq_jepa import WEIGHTS  # noqa: E402

EVERY = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("name", help="model.tag")
    options = parser.parse_args()
    kept = ROOT / "docs" / "runs" / options.name
    kept.mkdir(parents=True, exist_ok=True)
    weights = load_file(options.run / "export" / "model.safetensors")
    file = WEIGHTS / f"{options.name}.safetensors"
    save_file({name: x.bfloat16() for name, x in weights.items()}, file, metadata={"format": "pt"})
    file.chmod(0o644)

    model = timm.create_model(f"local-dir:{options.run / 'export'}", pretrained=True, num_classes=0).eval()
    side = model.patch_embed.img_size[0]
    scenes = Scenes("train")
    pictures = [np.asarray(scenes[i]["image"].convert("RGB").resize((side, side))) for i in range(4)]
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    with torch.no_grad():
        save_file({"images": images, "features": model(images / 255)}, kept / "features.safetensors")

    settings = (options.run / "config.yaml").read_text().splitlines()
    local = ("  path:", "  cache:", "output_dir:")  # paths of a machine
    (kept / "config.yaml").write_text("".join(f"{line}\n" for line in settings if not line.startswith(local)))
    lines = records(options.run / "log.jsonl")
    lines = [line for line in lines if line["step"] % EVERY == 0 or line in (lines[0], lines[-1])]
    (kept / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(f"{file}: {file.stat().st_size / 2**20:.1f} MiB; {kept}: {len(lines)} lines of the log")


if __name__ == "__main__":
    main()
