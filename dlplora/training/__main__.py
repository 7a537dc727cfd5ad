"""``python -m dlplora.training fit --config FILE.yaml``: the same as ``dlplora fit``, for processes that start trainings."""

from __future__ import annotations

import sys

from dlplora.training.command import main

sys.exit(main(sys.argv[1:]))
