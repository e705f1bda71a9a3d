"""timm's own model tests, from the source distribution of the installed version, on our names."""

import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import timm

from .conftest import ROOT

# Copies the model three times for each of its blocks and runs each: over six minutes for ViT-H. Pruning does not depend
# on width or depth, and runs at Ti, S, B here and at every size, two blocks deep, in test_dseq_jepa.py.
LEFT_OUT = "not (test_prune_intermediate_layers_contract and (l16 or h14))"


@pytest.fixture(scope="module")
def timm_source(request) -> Path:
    """The unpacked source distribution, fetched once."""
    cache = request.config.cache.mkdir("timm-source")
    folder = cache / f"timm-{timm.__version__}"
    if not folder.is_dir():
        package = f"timm=={timm.__version__}"
        command = [sys.executable, "-m", "pip", "download", package, "--no-deps", "--no-binary", "timm", "-d", cache]
        fetched = subprocess.run([*command, "-q", "--no-build-isolation"], capture_output=True, text=True)
        if fetched.returncode:  # its metadata may have to be built first, which needs the build tools
            fetched = subprocess.run([*command, "-q"], capture_output=True, text=True)
        assert fetched.returncode == 0, f"the source distribution of {package} could not be fetched:\n{fetched.stderr}"
        with tarfile.open(cache / f"timm-{timm.__version__}.tar.gz") as archive:
            archive.extractall(cache, filter="data")
    return folder


@pytest.mark.timm_suite
@pytest.mark.timeout(1500)
def test_timms_own_model_tests_pass_on_our_names(timm_source, tmp_path):
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "tests/test_models.py", "-p", "timm_names", "-q", f"--junitxml={report}"]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)]),
        "TIMEOUT": "600",  # timm's own limit is for its runners
    }
    run = subprocess.run(
        [*command, "-k", f"dseq_jepa and {LEFT_OUT}"], cwd=timm_source, env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-5000:]
    cases = list(ElementTree.parse(report).iter("testcase"))
    skipped = {
        case.get("name"): case.find("skipped").get("message") for case in cases if case.find("skipped") is not None
    }
    print(f"timm {timm.__version__}: {len(cases) - len(skipped)} checks passed, {len(skipped)} skipped for size")
    assert all("h16_448" in name and "size" in message for name, message in skipped.items()), skipped
    for architecture in ("ti16", "s16", "b16", "l16", "h14"):
        kinds = {
            case.get("name").split("[")[0] for case in cases if f"dseq_jepa_vit_{architecture}" in case.get("name")
        }
        assert {"test_model_forward", "test_model_backward", "test_model_forward_features"} <= kinds
