import os
import subprocess
import sys
from pathlib import Path

import pytest

from . import layouts

ROOT = Path(__file__).parent.parent


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
    from timm_dseq.convert import convert

    folder = tmp_path_factory.mktemp("exported")
    source = layouts.save_training(folder / "weights.safetensors", **roles)
    convert(source, folder / "dseq_jepa_vit_ti16.in1k", with_pretraining_state=True)
    return folder / "dseq_jepa_vit_ti16.in1k"


@pytest.fixture
def run_python(tmp_path):
    """Run Python code in a process of its own, with an empty Hub cache: returns the finished process."""

    def run(code: str, *arguments: str, timeout: int = 240, **environment: str) -> subprocess.CompletedProcess:
        env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TIMM_DSEQ"))}
        env |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
        return subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            env=env,
            cwd=tmp_path,
            timeout=timeout,
        )

    return run
