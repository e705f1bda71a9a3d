"""What users and others do wrong, by families: one line that names the culprit, exit code 1 or 2, nothing left behind.

Settings are in tests/train/system/test_command_line.py, images in tests/train/data/test_unreadable.py, checkpoints in
tests/train/run/test_resume.py, the network in tests/hub/test_download.py, functions in tests/engine/test_given.py.
"""

from ..train import TRAIN  # noqa: F401  # puts `common` on the path
