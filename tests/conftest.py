import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

# Before anything imports huggingface_hub, which reads them at import: the whole suite speaks to a Hub on loopback and
# keeps its cache to itself.
from .hub_server import HubServer

_HUB = HubServer()
_HOME = tempfile.TemporaryDirectory(prefix="timm-dseq-tests-")
for _name in [name for name in os.environ if name.startswith(("HF_", "HUGGING", "TIMM_DSEQ"))]:
    del os.environ[_name]
os.environ |= {
    "HF_ENDPOINT": _HUB.url,
    "HF_HOME": _HOME.name,
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_XET": "1",  # the loopback Hub stores plain files
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "OMP_NUM_THREADS": "1",  # most tensors here are tiny, and the suite itself runs in several processes
}

import pytest  # noqa: E402
import torch  # noqa: E402

from . import layouts  # noqa: E402

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session", autouse=True)
def _loopback_hub():
    with _HUB:
        yield
    _HOME.cleanup()


@pytest.fixture
def hub() -> HubServer:
    """The loopback Hub, empty and without faults."""
    _HUB.repos.clear()
    _HUB.requests.clear()
    _HUB.token, _HUB.fault, _HUB.etag, _HUB.read_only, _HUB.died = None, None, None, False, False
    return _HUB


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def roles() -> dict[str, layouts.Weights]:
    """Random target, student and predictor of a ViT-Ti/16 at 224, all different."""
    return {
        "target": layouts.random_weights(layouts.encoder_shapes(), 1),
        "student": layouts.random_weights(layouts.encoder_shapes(), 2),
        "predictor": layouts.random_weights(layouts.predictor_shapes(), 3),
    }


@pytest.fixture(scope="session")
def exported(roles, tmp_path_factory) -> Path:
    """A Hub-ready folder of dseq_jepa_vit_ti16.in1k, converted from a training checkpoint."""
    from timm_dseq.hub.convert import convert

    folder = tmp_path_factory.mktemp("exported")
    source = layouts.save_training(folder / "weights.safetensors", **roles)
    convert(source, folder / "dseq_jepa_vit_ti16.in1k", with_pretraining_state=True)
    return folder / "dseq_jepa_vit_ti16.in1k"


@pytest.fixture
def complete(exported, tmp_path) -> Path:
    """A folder whose card has no blanks left."""
    from timm_dseq.hub import cards

    folder = tmp_path / "complete"
    shutil.copytree(exported, folder)
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(cards.BLANK.sub("12.3 ± 0.4", card))
    return folder


@pytest.fixture
def training_run(roles, exported, tmp_path) -> Path:
    """The folder of a run of pretrain.py: checkpoints of steps 3 and 6, and the exported target encoder."""
    from . import train  # noqa: F401, I001  # with which `common` can be imported
    from common.run import checkpoints

    folder = tmp_path / "run"
    weights = {f"{role}.{name}": tensor for role, part in roles.items() for name, tensor in part.items()}
    state = {"config": {"model": {"name": "dseq_jepa_vit_ti16", "img_size": 224, "args": {}}}}
    for step in (3, 6):
        checkpoints.save(folder / "checkpoints", step, checkpoints.Saved(weights, {"a": torch.zeros(1)}, state))
    shutil.copytree(exported, folder / "export")
    return folder


@pytest.fixture
def run_python(tmp_path):
    """Run Python code in a process of its own, with an empty Hub cache: returns the finished process."""

    def run(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        env = {**os.environ, "HF_HOME": str(tmp_path / "hf"), **environment}
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=300)

    return run
