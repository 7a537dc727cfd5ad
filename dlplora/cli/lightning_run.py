"""The ``lightning`` command: ``lightning run CONFIG`` trains like ``dlplora fit CONFIG``; everything else goes to Lightning's own command.

With one device ``run`` is ``dlplora fit`` in this process. With several, Fabric's launcher starts one such process per device, and
Lightning's trainer connects them. The options before the configuration are those of ``fabric run``.
"""

from __future__ import annotations

import argparse
import signal
import socket
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points, version
from typing import Any

import click

from dlplora.errors import ConfigError, DLPLoRAError, one_line

USAGE = """usage: lightning run [OPTIONS] CONFIG [--KEY VALUE ...]

Train what a configuration describes, on one or several devices; the same as `dlplora fit CONFIG`.

  lightning run experts
  lightning run --devices 2 --accelerator cpu router --trainer.max_epochs 2

OPTIONS are those of `fabric run`; CONFIG and what follows are as for `dlplora fit`. `lightning run --help` lists them.
"""
TRAINER_KEYS = ("accelerator", "devices", "strategy", "precision", "num_nodes")


def command_of_others() -> EntryPoint | None:
    """The ``lightning`` command of another installed distribution, else Lightning's ``fabric``, None without either."""
    scripts = entry_points(group="console_scripts")
    others = [script for script in scripts.select(name="lightning") if script.dist is not None and script.dist.name != "dlplora"]
    return next(iter([*others, *scripts.select(name="fabric")]), None)


def _forward(arguments: list[str]) -> int:
    """Run Lightning's own command with these arguments."""
    command = command_of_others()
    if command is None:
        raise ConfigError("only `lightning run CONFIG` works here: Lightning installs no command that the rest could be forwarded to.")
    sys.argv = [command.name, *arguments]
    return int(command.load()() or 0)


def _run_options() -> list[click.Parameter]:
    """The options of ``fabric run``."""
    from lightning.fabric.cli import _main as fabric

    return [parameter for parameter in fabric.commands["run"].params if isinstance(parameter, click.Option)]


def parse(arguments: Sequence[str]) -> dict[str, Any]:
    """Read what follows ``run``.

    Returns:
        ``config``, ``overrides``, ``launch`` (every option of Fabric's, defaults included) and ``given`` (the options on the command line).

    Raises:
        click.ClickException: For an option that Fabric does not have or a value that it does not take.
    """
    overrides = click.Argument(["overrides"], nargs=-1, type=click.UNPROCESSED, metavar="[--KEY VALUE]...")
    command = click.Command(
        "run", params=[*_run_options(), click.Argument(["config"], metavar="CONFIG"), overrides], help=USAGE.split("\n")[2]
    )
    command.allow_interspersed_args = False  # what follows the configuration overrides its keys
    with command.make_context("lightning run", list(arguments)) as context:
        launch = dict(context.params)
        given = {name for name in launch if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE}
        return {"config": launch.pop("config"), "overrides": list(launch.pop("overrides")), "launch": launch, "given": given}


def fit_arguments(options: dict[str, Any], default_strategy: str | None) -> list[str]:
    """The command line of ``dlplora fit`` for these options; overrides come last, so they win.

    Args:
        options: As ``parse`` gave them.
        default_strategy: Of a run of several processes for which none was asked; None for a single process.
    """
    values = {key: options["launch"][key] for key in TRAINER_KEYS if key in options["given"]}
    if default_strategy is not None:
        values.setdefault("strategy", default_strategy)
    flags = [text for key, value in values.items() for text in (f"--trainer.{key}", str(value))]
    return ["fit", "--config", options["config"], *flags, *options["overrides"]]


def count_devices(accelerator: str | None, devices: str) -> int:
    """Processes to start on this machine.

    Raises:
        ConfigError: If the devices are no number or list, or the machine does not have them.
    """
    from lightning.fabric.cli import _get_num_processes
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    try:
        count = int(_get_num_processes(accelerator or "auto", devices))
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise ConfigError(f"--devices {devices} with --accelerator {accelerator or 'auto'}: {' '.join(str(error).split())}") from error
    if count < 1:
        raise ConfigError(f"--devices {devices} with --accelerator {accelerator or 'auto'} names no device of this machine.")
    return count


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _launch(options: dict[str, Any], arguments: list[str]) -> int:
    """One process per device through Fabric's launcher; the exit code of the first one that failed."""
    from lightning.fabric.cli import main as launch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    import dlplora.cli.fit as script

    settings = {**options["launch"], "script": str(script.__file__)}
    if "main_port" not in options["given"] and settings["num_nodes"] == 1:
        settings["main_port"] = _free_port()
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


def _run(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    processes = count_devices(options["launch"]["accelerator"], options["launch"]["devices"])
    if processes == 1 and options["launch"]["num_nodes"] == 1:
        from dlplora.cli.fit import main as fit

        return fit(fit_arguments(options, None))
    from dlplora.cli.fit import with_config_files
    from dlplora.training.config_check import check_command_line

    classes = check_command_line(with_config_files(["fit", "--config", options["config"]]))
    fitted = with_config_files(fit_arguments(options, getattr(classes.get("model"), "multi_process_strategy", "ddp")))
    check_command_line(fitted)
    return _launch(options, fitted)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``lightning run``, or forward to Lightning's own command.

    Args:
        argv: The arguments; None reads ``sys.argv``.

    Returns:
        Exit code: 0 when done, 2 for bad arguments or configuration (one line on standard error).
    """
    given = list(sys.argv[1:] if argv is None else argv)
    if not given or given[0] in {"-h", "--help"}:
        forwarded = command_of_others()
        rest = f"Everything else is forwarded to `{forwarded.name}` ({forwarded.value}).\n" if forwarded else ""
        print(USAGE + rest, file=sys.stdout if given else sys.stderr, end="")
        return 0 if given else 2
    if given[0] == "--version":
        print(f"lightning {version('lightning')}")
        return 0
    try:
        return _run(given[1:]) if given[0] == "run" else _forward(given)
    except click.exceptions.Exit as stop:  # after --help
        return stop.exit_code
    except click.ClickException as error:
        print(f"lightning: error: {' '.join(error.format_message().split())} See `lightning run --help`.", file=sys.stderr)
        return 2
    except DLPLoRAError as error:
        print(f"lightning: error: {one_line(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
