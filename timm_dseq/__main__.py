"""`python -m timm_dseq` is the timm-dseq command: for launchers that take modules, `accelerate launch -m timm_dseq`."""

import sys

from .cli import main

sys.exit(main())
