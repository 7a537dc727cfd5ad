"""``dlplora fit | validate | test``: train an expert, a pool, a router, a fusion method or the nano base model from a YAML file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

USAGE = """usage: dlplora {fit,validate,test} CONFIG [--KEY VALUE ...]

Train what a configuration describes, or validate / test what it trained.

  CONFIG, --config CONFIG  name of a shipped configuration (experts, expert, router, fusion, multitask, nano_backbone, ...) or a YAML file
  --ckpt_path last|FILE    resume from the run's newest readable checkpoint, or from a file
  --print_config           print the resolved configuration and stop
  --KEY VALUE              override one key, for instance --trainer.max_steps 50, --data.init_args.tasks homes,teams,
                           --model.init_args.optimizer.lr 1e-3, --seed_everything 1

All keys: dlplora fit --help-all. Progress goes to standard error; the last line on standard output is JSON.
Exit codes: 0 done, 2 bad configuration, 130 interrupted, 143 terminated.
"""


def with_config_files(arguments: Sequence[str]) -> list[str]:
    """The command line with every configuration's name replaced by its file, and what another base model than nano needs.

    A first argument without dashes is a configuration.

    Args:
        arguments: The command and its arguments.

    Raises:
        ConfigError: If there is no such configuration or base model.
    """
    from dlplora.config import find_config
    from dlplora.training.other_base import fitted_to_base

    found = list(arguments)
    if found[1:] and not found[1].startswith("-"):
        found.insert(1, "--config")
    for place, argument in enumerate(found):
        flag, equals, value = argument.partition("=")
        if flag not in {"--config", "-c"}:
            continue
        if equals:
            found[place] = f"{flag}={find_config('train', value)}"
        elif place + 1 < len(found):
            found[place + 1] = str(find_config("train", found[place + 1]))
    fitted, note = fitted_to_base(found)
    if note is not None:
        print(f"{arguments[0]}: {note}", file=sys.stderr, flush=True)
    return fitted


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
    from dlplora.errors import DLPLoRAError, one_line
    from dlplora.training.command import main as train

    if len(arguments) == 1:
        print(
            f"error: dlplora {arguments[0]} needs a configuration: a name (router, experts, fusion, ...) or a YAML file.", file=sys.stderr
        )
        return 2
    try:
        found = with_config_files(arguments)
    except DLPLoRAError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return train(["--help" if argument == "--help-all" else argument for argument in found])


if __name__ == "__main__":
    # A launcher runs this file as a script, which puts its folder first on the path, where modules bear names of other packages.
    sys.path[:] = [entry for entry in sys.path if entry != str(Path(__file__).resolve().parent)]
    sys.exit(main())
