"""What users and others do wrong, by families: one line that names the culprit, exit code 1 or 2, nothing left behind.

A family is a table of its faults, the doors through which they come in, and a control case that has to succeed. What
is heavy is forked from one warm process (doors.py). Where few rows stand for a long family, the others are marked slow.

| module | faults |
|---|---|
| test_settings | every setting of the three programs, as an option and in a file |
| test_model_args | arguments of timm.create_model |
| test_weights | files of weights, and folders with a config.json |
| test_headers | headers of safetensors and files of settings that chance has written |
| test_images | files among images |
| test_checkpoints | each file of a checkpoint |
| test_own_files | logs, results, settings, caches and exports that are read again |
| test_disk | a disk that is full |
| test_mutants | each door's check left out of a copy of the code |

Others are beside what they are of: functions in tests/engine/test_given.py, the network in tests/hub/test_download.py,
images in tests/train/data/test_unreadable.py, words of a command line in tests/train/system/test_command_line.py.
"""

from ..train import TRAIN  # noqa: F401  # puts `common` on the path
