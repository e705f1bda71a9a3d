"""What only Unix has is not needed: the recipes can be imported, and their files written, without it."""

import subprocess
import sys

import pytest

from .. import TRAIN

WITHOUT = """
import sys
import psutil  # which has other ways on Windows
sys.modules["resource"] = sys.modules["fcntl"] = None
sys.path.insert(0, sys.argv[1])
"""


@pytest.mark.parametrize(
    "code",
    [
        "import common.system.machine; assert common.system.machine.memory() == 0.0",
        "from common.run import results; results.append(sys.argv[2], [{'a': 1}]); print(open(sys.argv[2]).read())",
    ],
    ids=["the memory figure", "the lock of the results"],
)
def test_nothing_at_import_is_of_unix_only(code, tmp_path):
    command = [sys.executable, "-c", WITHOUT + code, str(TRAIN), str(tmp_path / "results.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TRAIN.parent, timeout=120)
    assert done.returncode == 0, done.stderr
