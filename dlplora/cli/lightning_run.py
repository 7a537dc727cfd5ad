"""``lightning run``: the training that ``dlplora fit`` does, in one or several processes.

Lightning 2.6 ships no ``lightning`` command, only ``fabric``. With one device this is ``dlplora fit --config CONFIG`` in this
process; with several, Fabric's launcher starts one such process a device, and Lightning's trainer joins them.
"""

from __future__ import annotations

import argparse
import signal
import socket
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from dlplora.errors import ConfigError, DLPLoRAError

DESCRIPTION = "Train what a YAML file describes, on one or several devices; the same as `dlplora fit --config CONFIG`."
EPILOG = """examples:
  lightning run configs/train/experts.yaml
  lightning run --devices 2 --accelerator cpu configs/train/router.yaml --trainer.max_epochs 2
Options of the trainer, the model and the data follow the file as --KEY VALUE; see `dlplora fit --help`."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"lightning: error: {message} See `lightning run --help`.\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="lightning", description="Lightning's trainer for dlplora configurations.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"lightning {version('lightning')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="run")
    run = commands.add_parser(
        "run",
        description=DESCRIPTION,
        epilog=EPILOG,
        help=DESCRIPTION,
        allow_abbrev=False,
        usage="lightning run [options] CONFIG.yaml [--KEY VALUE ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument("--accelerator", help="cpu, cuda, gpu, mps or auto (default: what the file says)")
    run.add_argument("--devices", default=None, help="how many devices, or which ('0,1'), or 'auto' (default: what the file says)")
    run.add_argument("--strategy", help="how several devices work together (default: what the model needs, ddp as a rule)")
    run.add_argument("--precision", help="as the trainer's, for instance 32-true or bf16-mixed")
    run.add_argument("--num-nodes", "--num_nodes", type=int, default=1, metavar="N", help="machines (default: 1)")
    run.add_argument("--node-rank", "--node_rank", type=int, default=0, metavar="I", help="index of this machine (default: 0)")
    run.add_argument("--main-address", "--main_address", default="127.0.0.1", metavar="HOST", help="address of machine 0")
    run.add_argument("--main-port", "--main_port", type=int, default=None, metavar="PORT", help="port on it (default: a free one)")
    run.add_argument("config", metavar="CONFIG.yaml")
    run.add_argument("overrides", nargs=argparse.REMAINDER, metavar="--KEY VALUE")
    return parser


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def fit_arguments(options: argparse.Namespace, default_strategy: str | None) -> list[str]:
    """The command line of ``dlplora fit`` for these options; overrides come last, so they win.

    Args:
        options: As parsed.
        default_strategy: Of a run of several processes for which none was asked; None for a single process.
    """
    arguments = ["fit", "--config", options.config]
    for key in ("accelerator", "devices", "strategy", "precision"):
        value = getattr(options, key)
        if value is not None:
            arguments += [f"--trainer.{key}", str(value)]
    if default_strategy is not None and options.strategy is None:
        arguments += ["--trainer.strategy", default_strategy]
    if options.num_nodes > 1:
        arguments += ["--trainer.num_nodes", str(options.num_nodes)]
    return arguments + list(options.overrides)


def count_devices(accelerator: str | None, devices: str | None) -> int:
    """Processes to start on this machine.

    Raises:
        ConfigError: If the devices are no number or list, or the machine does not have them.
    """
    if devices is None:
        return 1
    from lightning.fabric.cli import _get_num_processes
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    try:
        count = int(_get_num_processes(accelerator or "auto", devices))
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise ConfigError(f"--devices {devices} with --accelerator {accelerator or 'auto'}: {' '.join(str(error).split())}") from error
    if count < 1:
        raise ConfigError(f"--devices {devices} with --accelerator {accelerator or 'auto'} names no device of this machine.")
    return count


def _launch(options: argparse.Namespace, arguments: list[str]) -> int:
    """One process a device through Fabric's launcher; the exit code of the first one that failed."""
    from lightning.fabric.cli import main as launch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    import dlplora.cli.fit as script

    port = options.main_port or (29400 if options.num_nodes > 1 else _free_port())
    settings: dict[str, Any] = {
        "script": str(script.__file__), "accelerator": options.accelerator, "strategy": options.strategy, "devices": options.devices or "1",
        "num_nodes": options.num_nodes, "node_rank": options.node_rank, "main_address": options.main_address, "main_port": port,
        "precision": options.precision,
    }  # fmt: skip
    try:
        launch(argparse.Namespace(**settings), arguments)
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        code = int(first.exitcode)
        print(f"lightning: process {first.local_rank} ended with exit code {code}; its message is above.", file=sys.stderr)
        return code if 0 < code < 256 else 1
    except SignalException as error:
        return 128 + int(error.sigval)
    except KeyboardInterrupt:
        return 128 + int(signal.SIGINT)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``lightning run``.

    Args:
        argv: The arguments; None reads ``sys.argv``.

    Returns:
        Exit code: 0 when done, 2 for bad arguments or configuration (one line on standard error).
    """
    options = _parser().parse_args(sys.argv[1:] if argv is None else list(argv))
    try:
        if Path(options.config).suffix not in {".yaml", ".yml"}:
            raise ConfigError(f"'{options.config}' is no YAML file: the configuration comes first, then --KEY VALUE.")
        if count_devices(options.accelerator, options.devices) == 1 and options.num_nodes == 1:
            from dlplora.cli.fit import main as fit

            return fit(fit_arguments(options, None))
        from dlplora.training.config_check import check_command_line

        classes = check_command_line(["--config", options.config])
        arguments = fit_arguments(options, getattr(classes.get("model"), "multi_process_strategy", "ddp"))
        check_command_line(arguments)
        return _launch(options, arguments)
    except DLPLoRAError as error:
        print(f"lightning: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
