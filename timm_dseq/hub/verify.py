"""Does a folder load everywhere, and to the same numbers? With this package, in stock timm, in transformers.

The stock loads run in a process of their own that never imports timm_dseq.
"""

import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file

from ..dseq_jepa import STOCK
from ..errors import UserError
from . import cards
from .stock import Backbone, check_fit
from .weights import Weights, check_safetensors

TOLERANCE = 1e-5

# Check → what loads there: the features of each that can be, the fault of each that cannot.
_STOCK = """
import json, sys, timm, torch
from pathlib import Path
from safetensors.torch import load_file, save_file

def in_timm(source):
    return timm.create_model(source, pretrained=True).float().eval()(image)

def in_transformers(source):
    from transformers import AutoModel
    return AutoModel.from_pretrained(source).float().eval()(image).pooler_output

folder, found, faults = Path(sys.argv[1]), {}, {}
image = load_file(folder / "image.safetensors")["image"]
for check, source in json.loads((folder / "sources.json").read_text()).items():
    try:
        with torch.inference_mode():
            found[check] = (in_transformers if check == "transformers" else in_timm)(source).contiguous()
    except Exception as error:
        faults[check] = f"{type(error).__name__}: {error}".strip().splitlines()[-1]
assert not any(name.startswith("timm_dseq") for name in sys.modules)
save_file(found, folder / "found.safetensors")
(folder / "faults.json").write_text(json.dumps(faults))
"""


def read_folder(folder: Path, name: str | None = None) -> tuple[dict, Backbone, str, Weights]:
    """config.json, the encoder it describes, the card and the weights that fit it, of a Hub-ready folder.

    name: what to call it in an error; the folder's own path if not given.
    """
    name = name or str(folder)
    if not folder.is_dir():
        raise UserError(f"{name} is no folder: name one that timm-dseq convert has written.")
    for part in ("config.json", "README.md", "model.safetensors"):
        if not (folder / part).is_file():
            raise UserError(f"{name} has no {part}: write the folder with timm-dseq convert.")
    config, backbone = _read_config(folder / "config.json")
    try:
        card = (folder / "README.md").read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{folder / 'README.md'} is not UTF-8: save it as such.") from error
    check_safetensors(folder / "model.safetensors")
    weights = load_file(folder / "model.safetensors")
    check_fit(weights, backbone, f"{name} holds weights that its config.json does not describe, convert them anew")
    return config, backbone, card, weights


def _read_config(path: Path) -> tuple[dict, Backbone]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        backbone = Backbone.from_config(config)
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is no config of timm ({reason}): convert the weights anew.") from error
    architecture = backbone.stock
    if architecture in STOCK:
        raise UserError(
            f"{path} names {architecture}, which timm does not know without this package: it should "
            f"name {STOCK[architecture]}."
        )
    if not timm.is_model(architecture):
        raise UserError(f"{path} names {architecture}, which is no architecture of timm.")
    forbidden = {"num_classes", "pretrained"} & set(config.get("model_args", {}))
    if forbidden:
        raise UserError(f"{path}: model_args holds {forbidden.pop()}, with which transformers fails.")
    try:
        _ = backbone.blueprint
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return config, backbone


def verify(folder: str | os.PathLike, repository: str | None = None) -> dict[str, dict]:
    """Check a folder, and the repository it came from, if any; one entry a check, with "ok" and what was seen."""
    folder = Path(folder)
    _, backbone, card, weights = read_folder(folder, repository)
    checks = {
        "config": {"ok": True, "seen": f"{backbone.stock}, {backbone.model_args}"},
        "weights": {"ok": True, "seen": f"{len(weights)} tensors, all in place, {_dtypes(weights)}"},
        "card": _check_card(card),
    }
    model = backbone.build().eval()
    model.load_state_dict(weights)  # 16-bit weights become the float32 model's, as in every check below
    image = torch.randn(2, backbone.in_chans, *backbone.img_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(image)
        pooled = model.forward_head(model.forward_features(image), pre_logits=True)

    sources = {"stock timm": f"local-dir:{folder.resolve()}"}
    if repository:
        sources["stock timm from the Hub"] = f"hf-hub:{repository}"
    if find_spec("transformers"):
        sources["transformers"] = str(folder.resolve())
    checks |= _without_package(
        sources, image, {name: pooled if name == "transformers" else expected for name in sources}
    )
    if "transformers" not in sources:
        checks["transformers"] = {"ok": True, "seen": "not installed, not checked: pip install transformers"}
    if backbone.dseq_name:
        checks["timm_dseq"] = _with_package(folder, backbone, image, expected)
    return checks


def _dtypes(weights: dict[str, torch.Tensor]) -> str:
    return ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()}))


def _check_card(card: str) -> dict:
    head, _, body = card.removeprefix("---\n").partition("\n---\n")
    lacking = [key for key in ("library_name:", "license:", "pipeline_tag:") if f"\n{key}" not in f"\n{head}"]
    lacking += [f"## {title}" for title in ("Usage", "Training", "Results", "Licence") if f"\n## {title}" not in body]
    if lacking:
        return {"ok": False, "seen": f"the card lacks {', '.join(lacking)}"}
    blanks = cards.blanks(card)
    return {"ok": True, "seen": f"complete but for {len(blanks)} blanks" if blanks else "complete", "blanks": blanks}


def _compared(features: torch.Tensor, expected: torch.Tensor) -> dict:
    if features.shape != expected.shape:
        return {"ok": False, "seen": f"features {tuple(features.shape)} instead of {tuple(expected.shape)}"}
    difference = (features - expected).abs().max().item()
    return {"ok": difference <= TOLERANCE, "seen": f"largest difference {difference:.1e}"}


def _without_package(
    sources: dict[str, str], image: torch.Tensor, expected: dict[str, torch.Tensor]
) -> dict[str, dict]:
    """The checks that stock timm and transformers pass or not, in a process of their own."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        save_file({"image": image}, scratch / "image.safetensors")
        (scratch / "sources.json").write_text(json.dumps(sources))
        run = subprocess.run([sys.executable, "-c", _STOCK, name], capture_output=True, text=True)
        if run.returncode:
            said = (run.stderr.strip().splitlines() or [f"the process ended with {run.returncode}"])[-1]
            return {check: {"ok": False, "seen": said} for check in sources}
        found, faults = load_file(scratch / "found.safetensors"), json.loads((scratch / "faults.json").read_text())
    return {
        check: {"ok": False, "seen": faults[check]} if check in faults else _compared(found[check], expected[check])
        for check in sources
    }


def _with_package(folder: Path, backbone: Backbone, image: torch.Tensor, expected: torch.Tensor) -> dict:
    model = timm.create_model(
        backbone.dseq_name,
        pretrained=True,
        pretrained_cfg_overlay={
            "file": str(folder / "model.safetensors"),
            "input_size": (backbone.in_chans, *backbone.img_size),
            "num_classes": backbone.num_classes,
        },
    )
    with torch.inference_mode():
        return _compared(model.eval()(image), expected)
