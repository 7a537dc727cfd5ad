"""``python -m dlplora.lm_eval``: lm-eval's command with the model ``dlplora`` and our tasks."""

import sys

from dlplora.lm_eval.command import main

if __name__ == "__main__":
    sys.exit(main())
