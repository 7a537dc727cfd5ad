"""``dlplora fit | validate | test``: train an expert, a pool, a router, a fusion method or the nano backbone from a YAML file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

USAGE = """usage: dlplora {fit,validate,test} --config FILE.yaml [--KEY VALUE ...]

Train what a configuration describes, or validate / test what it trained.

  --config FILE.yaml     configuration; shipped ones: configs/train/{experts,expert,router,multitask,nano_backbone}.yaml
  --ckpt_path last|FILE  resume from the run's newest readable checkpoint, or from a file
  --print_config         print the resolved configuration and stop
  --KEY VALUE            override one key, for instance --trainer.max_steps 50, --data.init_args.tasks homes,teams,
                         --model.init_args.optimizer.lr 1e-3, --seed_everything 1

All keys: dlplora fit --help-all. Progress goes to standard error; the last line on standard output is JSON.
Exit codes: 0 done, 2 bad configuration, 130 interrupted, 143 terminated.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``fit``, ``validate`` or ``test``.

    Args:
        argv: The command and its arguments; None reads ``sys.argv``.

    Returns:
        Exit code: 0 done, 2 bad configuration, 130 after Ctrl-C, 143 after SIGTERM.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in {"fit", "validate", "test"} or arguments[1:2] in (["--help"], ["-h"]):
        wanted_help = any(argument in {"--help", "-h"} for argument in arguments)
        print(USAGE, file=sys.stdout if wanted_help else sys.stderr, end="")
        return 0 if wanted_help else 2
    from dlplora.training.command import main as train

    return train(["--help" if argument == "--help-all" else argument for argument in arguments])


if __name__ == "__main__":
    # A launcher runs this file as a script, which puts its folder first on the path, where modules bear names of other packages.
    sys.path[:] = [entry for entry in sys.path if entry != str(Path(__file__).resolve().parent)]
    sys.exit(main())
