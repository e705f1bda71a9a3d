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

# The pruning check copies the model three times for each block and runs each copy: minutes for the larger models. It
# does not depend on the width: ViT-L and H run it two blocks deep, in test_dseq_jepa.py.
PRUNING = "test_prune_intermediate_layers_contract"
LARGE = [pytest.mark.slow, pytest.mark.large]


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
@pytest.mark.xdist_group("timm_suite")  # one process fetches the source
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("chosen", "skipped_for_size"),
    [
        pytest.param("ti16", False, marks=pytest.mark.slow),
        pytest.param(f"s16 or (b16 and not {PRUNING})", False, marks=LARGE),
        pytest.param(f"(b16 and {PRUNING}) or ((l16 or h14) and not {PRUNING})", False, marks=LARGE),
        pytest.param("h16_448", True, marks=LARGE),
    ],
    ids=["Ti", "S and B", "L and H", "H at 448 px"],
)
def test_timms_own_model_tests_pass_on_our_names(timm_source, tmp_path, chosen, skipped_for_size):
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "tests/test_models.py", "-p", "timm_names", "-q", f"--junitxml={report}"]
    command += ["-k", f"dseq_jepa and ({chosen})"]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)]),
        "TIMEOUT": "900",  # timm's own limits are for its runners
    }
    run = subprocess.run(command, cwd=timm_source, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:]
    cases = list(ElementTree.parse(report).iter("testcase"))
    skips = [case.find("skipped").get("message") for case in cases if case.find("skipped") is not None]
    print(f"timm {timm.__version__}, {chosen}: {len(cases) - len(skips)} checks passed, {len(skips)} skipped")
    assert all("size" in reason for reason in skips) and bool(skips) == skipped_for_size, skips
    ran = {case.get("name").split("[")[0] for case in cases}
    assert {"test_model_forward", "test_model_backward", "test_model_forward_intermediates"} <= ran
