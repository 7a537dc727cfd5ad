"""``python -m dlplora.training fit --config FILE.yaml``: the same as ``dlplora fit``, for processes that start trainings."""

from __future__ import annotations

import sys

from dlplora.interruption import DISK_FAILED
from dlplora.training.command import main

sys.exit(main(sys.argv[1:], disk_failed=DISK_FAILED))
