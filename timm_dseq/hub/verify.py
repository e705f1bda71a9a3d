"""Whether a folder ready for the Hub loads with this package, in stock timm and in transformers, to the same outputs.

Stock timm and transformers run in a process of their own that never imports timm_dseq.
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
from .config import read_stock
from .download import unreachable
from .stock import StockModel, check_fit
from .weights import Weights, check_safetensors

TOLERANCE = 1e-5

# The program of that process. In its folder: image.safetensors, and sources.json, {check: what to load}. It adds
# features.safetensors, {check: features}, and faults.json, {check: why nothing could be loaded}.
_STOCK = """
import json, sys, timm, torch
from pathlib import Path
from safetensors.torch import load_file, save_file

def in_timm(source):
    return timm.create_model(source, pretrained=True).float().eval()(image)

def in_transformers(source):
    from transformers import AutoModel
    return AutoModel.from_pretrained(source).float().eval()(image).pooler_output

folder, features, faults = Path(sys.argv[1]), {}, {}
image = load_file(folder / "image.safetensors")["image"]
for check, source in json.loads((folder / "sources.json").read_text(encoding="utf-8")).items():
    try:
        with torch.inference_mode():
            features[check] = (in_transformers if check == "transformers" else in_timm)(source).contiguous()
    except Exception as error:
        faults[check] = f"{type(error).__name__}: {error}".strip().splitlines()[-1]
assert not any(name.startswith("timm_dseq") for name in sys.modules)
save_file(features, folder / "features.safetensors")
(folder / "faults.json").write_text(json.dumps(faults), encoding="utf-8")
"""


def read_folder(folder: Path, name: str | None = None) -> tuple[dict, StockModel, str, Weights]:
    """Of a folder ready for the Hub: config.json, the model it describes, the card, and weights that fit the model.

    name: of the folder in an error (default: its path).
    """
    name = name or str(folder)
    if not folder.is_dir():
        raise UserError(f"{name} is no folder: name one that timm-dseq convert has written.")
    for part in ("config.json", "README.md", "model.safetensors"):
        if not (folder / part).is_file():
            inside = f", or name {folder / 'export'}" if (folder / "export" / part).is_file() else ""
            raise UserError(f"{name} has no {part}: write the folder with timm-dseq convert{inside}.")
    config, stock = _read_config(folder / "config.json")
    try:
        card = (folder / "README.md").read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{folder / 'README.md'} is not UTF-8: save it as such.") from error
    check_safetensors(folder / "model.safetensors")
    weights = load_file(folder / "model.safetensors")
    check_fit(weights, stock, f"{name} holds weights that its config.json does not describe, convert them anew")
    return config, stock, card, weights


def _read_config(path: Path) -> tuple[dict, StockModel]:
    config, stock = read_stock(path)
    architecture = stock.architecture
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
        _ = stock.blueprint
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return config, stock


def verify(folder: str | os.PathLike, repository: str | None = None) -> dict[str, dict]:
    """Check a folder, and the repository it came from, if any: {check: {"ok": bool, "seen": what came out}}."""
    folder = Path(folder)
    _, stock, card, weights = read_folder(folder, repository)
    checks = {
        "config": {"ok": True, "seen": f"{stock.architecture}, {stock.model_args}"},
        "weights": {"ok": True, "seen": f"{len(weights)} tensors, all in place, {_dtypes(weights)}"},
        "card": _check_card(card),
    }
    model = stock.build().eval()
    model.load_state_dict(weights)  # 16-bit weights become float32, as in every check below
    image = torch.randn(2, stock.in_chans, *stock.img_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(image)
        pooled = model.forward_head(model.forward_features(image), pre_logits=True)

    sources = {"stock timm": f"local-dir:{folder.resolve()}"}
    if repository:
        sources["stock timm from the Hub"] = f"hf-hub:{repository}"
    if find_spec("transformers"):
        sources["transformers"] = str(folder.resolve())
    references = {name: pooled if name == "transformers" else expected for name in sources}
    offline = bool(repository and unreachable())  # what is in the cache is checked without a network, too
    checks |= _without_package(sources, image, references, offline)
    if "transformers" not in sources:
        checks["transformers"] = {"ok": True, "seen": "not installed, not checked: pip install transformers"}
    if stock.dseq_name:
        checks["timm_dseq"] = _with_package(folder, stock, image, expected)
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
    sources: dict[str, str], image: torch.Tensor, expected: dict[str, torch.Tensor], offline: bool
) -> dict[str, dict]:
    """Load each source without this package, and compare its features of the images (2, C, H, W): {check: result}."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        save_file({"image": image}, scratch / "image.safetensors")
        (scratch / "sources.json").write_text(json.dumps(sources), encoding="utf-8")
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"} if offline else None
        command = [sys.executable, "-c", _STOCK, name]
        run = subprocess.run(command, capture_output=True, text=True, env=environment)
        if run.returncode:
            reason = (run.stderr.strip().splitlines() or [f"the process ended with {run.returncode}"])[-1]
            return {check: {"ok": False, "seen": reason} for check in sources}
        features = load_file(scratch / "features.safetensors")
        faults = json.loads((scratch / "faults.json").read_text(encoding="utf-8"))
    return {
        check: {"ok": False, "seen": faults[check]} if check in faults else _compared(features[check], expected[check])
        for check in sources
    }


def _with_package(folder: Path, stock: StockModel, image: torch.Tensor, expected: torch.Tensor) -> dict:
    model = timm.create_model(
        stock.dseq_name,
        pretrained=True,
        pretrained_cfg_overlay={
            "file": str(folder / "model.safetensors"),
            "input_size": (stock.in_chans, *stock.img_size),
            "num_classes": stock.num_classes,
        },
    )
    with torch.inference_mode():
        return _compared(model.eval()(image), expected)
