"""The ``dlplora`` command. Only arguments are parsed here; every subcommand imports what it needs when it runs.

Exit codes: 0 success; 1 regression, stale table, or results that differ from the committed ones; 2 bad input; 130 after Ctrl-C; 143 after
SIGTERM.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from dlplora import __version__
from dlplora.cli.export import add_export
from dlplora.cli.matrix import add_matrix
from dlplora.cli.model_options import FOR_EXAMPLES, add_method_options, add_model_options
from dlplora.cli.new_method import add_new_method
from dlplora.cli.pool import add_device_options
from dlplora.cli.pool import add_parser as pool_commands
from dlplora.cli.reproduce import add_reproduce
from dlplora.cli.scope import add_scope
from dlplora.cli.serve import add_serve
from dlplora.cli.tune import add_tune
from dlplora.errors import ConfigError, DLPLoRAError, one_line
from dlplora.interruption import exit_code, raising_on_sigterm

Command = Callable[[argparse.Namespace], int]

RESUMABLE = frozenset({"eval", "tune", "reproduce", "matrix"})
"""Commands that take up what an interrupted one has finished."""


class _Commands(argparse._SubParsersAction):  # type: ignore[type-arg]
    """Subcommands whose own help begins with the line that the list of commands has for them."""

    def add_parser(self, name: str, **options: Any) -> Any:  # type: ignore[override]
        text = options.get("help")
        return super().add_parser(name, **{"description": f"{text[0].upper()}{text[1:]}." if text else None, **options})


class _Parser(argparse.ArgumentParser):
    """Accepts ``--data_root`` for ``--data-root``."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register("action", "parsers", _Commands)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        given = list(sys.argv[1:] if args is None else args)
        spelled = [self._dashed(argument) for argument in given]
        return super().parse_known_args(spelled, namespace)

    @staticmethod
    def _dashed(argument: str) -> str:
        if not isinstance(argument, str) or not argument.startswith("--"):
            return argument
        name, equals, value = argument.partition("=")
        return name.replace("_", "-") + equals + value


def _lazy(module: str, function: str) -> Command:
    def run(arguments: argparse.Namespace) -> int:
        from importlib import import_module

        return int(getattr(import_module(f"dlplora.cli.{module}"), function)(arguments))

    return run


def _evaluation(commands: Any) -> None:
    parser = commands.add_parser("eval", help="evaluate methods under a protocol and write one record per method")
    parser.add_argument("--protocol", default="nano", help="name in configs/protocol, or a YAML file (default: nano)")
    parser.add_argument("--method", default="dlp", help="names in configs/method or YAML files, comma-separated, or 'all' (default: dlp)")
    add_method_options(parser, "nano, skills, real26, paper26, or local:TASK,TASK (default: the protocol's)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the run (default: 0)")
    parser.add_argument("--tasks", help="only these tasks of the suite, comma-separated (default: all)")
    parser.add_argument("--limit", type=int, help="questions per task; such records go to results/scratch")
    parser.add_argument("--out", default="results", metavar="DIR", help="results folder (default: results)")
    parser.add_argument("--force", action="store_true", help="evaluate again even if a finished record exists")
    parser.add_argument(
        "--teacher-forced",
        action="store_true",
        help="measure as the released DLP-LoRA code does, given the right answer; records go to results/released_code",
    )
    parser.add_argument("--released-code", dest="teacher_forced", action="store_true", help=argparse.SUPPRESS)  # the former name
    parser.add_argument("--dry-run", action="store_true", help="print the resolved run and stop")
    add_model_options(parser)
    add_device_options(parser, "cpu for the embedded model, else the best of this machine", "the protocol's")
    parser.set_defaults(run=_lazy("evaluate", "run_eval"))

    parser = add_tune(commands)
    add_model_options(parser)
    add_device_options(parser, "cpu for the embedded model, else the best of this machine", "the protocol's")
    parser.set_defaults(run=_lazy("tune", "run_tune"))

    parser = add_scope(commands)
    parser.set_defaults(run=_lazy("scope", "run_scope"))

    parser = add_reproduce(commands)
    parser.set_defaults(run=_lazy("reproduce", "run_reproduce"))


README_HELP = "README whose results block is rewritten (default: README.md, if --out is results)"


def _reports(commands: Any) -> None:
    report = commands.add_parser("report", help="write tables, figures and the results page from records")
    inner = report.add_subparsers(
        dest="action", required=True, metavar="{all,build,list,validate,check,accept,html,figures,compare-protocols,schema}"
    )
    for name, text in (("build", "rewrite tables and README block"), ("list", "list records"), ("validate", "check every record file")):
        parser = inner.add_parser(name, help=text)
        parser.add_argument("--out", default="results", metavar="DIR", help="results folder (default: results)")
        parser.add_argument("--suite", default="nano", help="suite of the records (default: nano)")
        if name == "list":
            parser.add_argument(
                "--scratch", action="store_true", help="list limited runs and runs of uncommitted code, which no table shows"
            )
        if name == "build":
            parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a table is stale")
            parser.add_argument("--readme", metavar="FILE", help=README_HELP)
        parser.set_defaults(run=_lazy("report", f"run_{name}"))
    for name, text in (("figures", "draw the figures (SVG and PNG)"), ("html", "write one page with tables, figures and questions")):
        parser = inner.add_parser(name, help=text)
        parser.add_argument("--out", default="results", metavar="DIR", help="results folder (default: results)")
        if name == "html":
            parser.add_argument("--page", metavar="FILE", help="file to write (default: index.html in --out)")
        else:
            parser.add_argument("--suite", default="nano", help="suite of the records (default: nano)")
        parser.set_defaults(run=_lazy("report", f"run_{name}"))
    # `protocols`, the old name, still works but is not listed
    for name, listed in (("compare-protocols", {"help": "write the table of our protocol and the released code's"}), ("protocols", {})):
        parser = inner.add_parser(name, **listed)
        parser.add_argument("--out", default="results", metavar="DIR", help="results folder (default: results)")
        parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the table is stale")
        parser.set_defaults(run=_lazy("report", "run_compare_protocols"))
    parser = inner.add_parser("all", help="write tables, figures and page of every suite")
    parser.add_argument("--out", default="results", metavar="DIR", help="results folder (default: results)")
    parser.add_argument("--readme", metavar="FILE", help=README_HELP)
    parser.set_defaults(run=_lazy("report", "run_all"), suite="nano")
    inner.add_parser("schema", help="print the JSON Schema of a record").set_defaults(run=_lazy("report", "run_schema"))
    for name, text in (
        ("check", "run the guarded methods again and compare with results/golden"),
        ("accept", "write the guarded methods' results into the golden file"),
    ):
        parser = inner.add_parser(name, help=text)
        parser.add_argument("--out", default="results", metavar="DIR", help="results folder (default: results)")
        parser.add_argument("--methods", metavar="A,B", help="only these guarded methods (default: all)")
        if name == "accept":
            parser.add_argument("--reason", required=True, help="why the numbers move; written into the changelog")
            parser.add_argument(
                "--changelog", default="CHANGELOG.md", metavar="FILE", help="where the reason is written (default: CHANGELOG.md)"
            )
        parser.set_defaults(run=_lazy("report_check", f"run_{name}"))


def _benchmarks(commands: Any) -> None:
    from dlplora.cli.bench import add_latency

    bench = commands.add_parser("bench", help="benchmark latency or operator counts")
    inner = bench.add_subparsers(dest="action", required=True, metavar="{latency,counters}")
    add_latency(inner).set_defaults(run=_lazy("bench", "run_latency"))
    parser = inner.add_parser("counters", help="count launches, floating point operations and bytes of one step")
    parser.add_argument("--methods", metavar="A,B", help="presets (default: all)")
    parser.add_argument("--shape", default="nano", help="nano or tiny (default: nano)")
    parser.add_argument("--experts", type=int, metavar="N", help="number of experts (default: the shape's)")
    parser.add_argument("--out", default="results", metavar="DIR", help="results folder (default: results)")
    parser.add_argument("--check", action="store_true", help="compare with results/golden/counters.json; exit 1 if anything differs")
    parser.add_argument("--accept", action="store_true", help="write the present counts into results/golden/counters.json")
    parser.set_defaults(run=_lazy("bench_counters", "run_counters"))


def _information(commands: Any) -> None:
    parser = commands.add_parser("methods", help="list fusion methods and their presets")
    parser.add_argument("--format", choices=["md", "json"], default="md", help="Markdown or JSON (default: md)")
    parser.set_defaults(run=_lazy("information", "run_methods"))
    parser = commands.add_parser("tasks", help="list the tasks of a suite with an example each")
    parser.add_argument("--suite", default="nano", help="nano, skills, real26, paper26, or local:TASK,TASK (default: nano)")
    parser.add_argument("--data-root", metavar="DIR", help="rows of local tasks (or DLPLORA_DATA)")
    parser.add_argument("--format", choices=["md", "json"], default="md", help="Markdown or JSON (default: md)")
    parser.add_argument("--export", metavar="DIR", help="write local tasks as lm-eval YAML files, for `lm_eval --include_path DIR`")
    parser.set_defaults(run=_lazy("information", "run_tasks"))
    parser = commands.add_parser("doctor", help="report versions, machine, data, pools and optional packages, for a bug report")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.set_defaults(run=_lazy("doctor", "run_doctor"))
    add_new_method(commands).set_defaults(run=_lazy("new_method", "run_new_method"))
    pool_commands(commands, _lazy)


def _generation(commands: Any) -> None:
    parser = commands.add_parser("generate", help="generate text; --trace prints the routing weights")
    parser.add_argument("prompt", help="prompt text; a typed \\n is a line break unless --raw is given")
    parser.add_argument("--method", default="dlp", help="name in configs/method, or a YAML file (default: dlp)")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="tokens to generate, at most (default: 48)")
    parser.add_argument("--chat", action="store_true", help="send the prompt as a user's message, through the tokenizer's chat template")
    parser.add_argument("--trace", action="store_true", help="print the routing weights of each sentence")
    parser.add_argument(
        "--raw",
        action="store_true",
        help="take the prompt exactly as typed; otherwise 'Answer:' is appended to prompts of the nano model",
    )
    parser.add_argument("--task", help="task name, for methods that need it (oracle)")
    add_method_options(parser, FOR_EXAMPLES)
    add_model_options(parser)
    add_device_options(parser)
    parser.set_defaults(run=_lazy("generate", "run_generate"))
    parser = add_export(commands)
    add_model_options(parser)
    add_device_options(parser)
    parser.set_defaults(run=_lazy("export", "run_export"))
    parser = add_serve(commands)
    add_model_options(parser)
    parser.set_defaults(run=_lazy("serve", "run_serve"))


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; nothing heavy is imported."""
    parser = _Parser(prog="dlplora", description="Train, route, fuse and benchmark LoRA adapters on one base model.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"dlplora {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for name, text in (("fit", "train from a configuration"), ("validate", "validate a checkpoint"), ("test", "test a checkpoint")):
        commands.add_parser(name, help=text, add_help=False)
    _evaluation(commands)
    add_matrix(commands)
    commands.choices["matrix"].set_defaults(run=_lazy("matrix", "run_matrix"))
    _reports(commands)
    _benchmarks(commands)
    _information(commands)
    _generation(commands)
    return parser


def _check_values(arguments: argparse.Namespace) -> None:
    """An empty value, usually an unset shell variable, must not mean the default or the working folder; and records are UTF-8."""
    for name, value in vars(arguments).items():
        if not isinstance(value, str) or name == "prompt":
            continue
        if not value.replace(",", " ").strip():
            raise ConfigError(f"the value of '{name.replace('_', '-')}' is empty (got {value!r}); give one, or leave the option out.")
        if name != "data_root" and any("\ud800" <= one <= "\udfff" for one in value):
            raise ConfigError(f"the value of '{name.replace('_', '-')}' is not UTF-8 (got {value!r}); rename the file or folder.")


def _run(given: list[str]) -> int:
    if given[:1] and given[0] in {"fit", "validate", "test"}:
        from dlplora.cli.fit import main as fit_main

        return fit_main(given)
    arguments = build_parser().parse_args(given)
    _check_values(arguments)
    return int(arguments.run(arguments))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that lacks a character shows its escape
        sys.stdout.reconfigure(errors="backslashreplace")
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        with raising_on_sigterm():
            return _run(given)
    except DLPLoRAError as error:
        print(f"dlplora: error: {one_line(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        text = f"{error.strerror or error}: {error.filename2 or error.filename or ''}"
        print(f"dlplora: error: {one_line(text.rstrip(': '))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        more = "; the same command continues where this one stopped" if given[:1] and given[0] in RESUMABLE else ""
        print(f"dlplora: interrupted{more}.", file=sys.stderr)
        return exit_code(error)


if __name__ == "__main__":
    sys.exit(main())
