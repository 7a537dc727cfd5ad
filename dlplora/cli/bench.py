"""``dlplora bench latency``: time systems interleaved in one process."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from dlplora.cli.terminal import split_names
from dlplora.config import require_writable
from dlplora.errors import ConfigError

LISTS = ("experts", "kept", "batch", "prompt", "reroute_every")
GROUP_OPTIONS = ("systems", "backends", *LISTS, "new_tokens", "repeats", "warmup", "compile")


def add_latency(inner: Any) -> argparse.ArgumentParser:
    """Declare ``latency`` under ``dlplora bench``; returns its parser."""
    parser: argparse.ArgumentParser = inner.add_parser("latency", help="time systems interleaved in one process and write a record")
    parser.add_argument("--config", metavar="NAME", help="name in configs/bench, or a YAML file; not together with the options of a group")
    parser.add_argument("--shape", help="smollm2-135m (pretrained), qwen2-0.5b, qwen2-1.5b, qwen2-7b, llama2-7b, llama3-8b "
                        "(random weights), nano or tiny (default: nano)")  # fmt: skip
    parser.add_argument("--runs", metavar="FOLDER", help="pool, router and gates as `dlplora reproduce` leaves them, for instance "
                        "runs/real26 (default: the embedded ones for nano, random ones otherwise)")  # fmt: skip
    parser.add_argument("--systems", metavar="A,B", help="presets, base, peft_single, peft_mixed, peft_xlora, peft_arrow, "
                        "released_loop, or all; NAME@E has a pool of its own size, NAME:BACKEND a kernel backend: ties:merged")  # fmt: skip
    parser.add_argument("--contenders", dest="systems", default=argparse.SUPPRESS, help=argparse.SUPPRESS)  # the former name
    parser.add_argument("--experts", metavar="N,N", help="pool sizes (default: 26)")
    parser.add_argument("--kept", metavar="N,N", help="force top-k experts per sequence (default: what each method keeps)")
    parser.add_argument("--batch", metavar="N,N", help="batch sizes; all rows differ (default: 1)")
    parser.add_argument("--prompt", metavar="N,N", help="prompt lengths in tokens (default: 128)")
    parser.add_argument("--new-tokens", type=int, metavar="N", help="tokens that each system generates (default: 32)")
    parser.add_argument("--reroute-every", metavar="N,N", help="also time with every row re-routed after this many tokens")
    parser.add_argument("--backends", metavar="A,B", help="kernel backends of our methods (default: auto)")
    parser.add_argument("--compile", action="store_true", default=None, help="compile the decoding step (GPU)")
    parser.add_argument("--dtype", help="float32, float16 or bfloat16 (default: float32)")
    parser.add_argument("--device", help="auto, cpu, cuda, cuda:N or mps (default: cpu)")
    parser.add_argument("--repeats", type=int, metavar="N", help="recorded rounds, an even number (default: 8)")
    parser.add_argument("--warmup", type=int, metavar="N", help="rounds before the recorded ones (default: 2)")
    parser.add_argument("--out", metavar="PATH", help="folder, or file ending in .json (default: results/bench; results/scratch/bench "
                        "while code is not committed)")  # fmt: skip
    return parser


def _numbers(option: str, text: str) -> tuple[int, ...]:
    values = split_names(text)
    if not values or not all(value.lstrip("-").isdigit() for value in values):
        raise ConfigError(f"--{option.replace('_', '-')} takes whole numbers separated by commas, got '{text}'.")
    return tuple(int(value) for value in values)


def config_of(arguments: argparse.Namespace) -> Any:
    """The configuration that the options describe.

    Raises:
        ConfigError: For a bad value, or options of a group beside ``--config``.
    """
    from dlplora.bench.settings import BenchConfig, Group, load_bench_config

    given = {name: getattr(arguments, name) for name in GROUP_OPTIONS if getattr(arguments, name) is not None}
    whole = {name: getattr(arguments, name) for name in ("shape", "dtype", "device", "runs") if getattr(arguments, name) is not None}
    if arguments.config is not None:
        if given:
            first = next(iter(given)).replace("_", "-")
            raise ConfigError(f"--config names a whole benchmark; --{first} belongs to a single group. Leave one of them out.")
        return dataclasses.replace(load_bench_config(arguments.config), **whole)
    for name in LISTS:
        if name in given:
            given[name] = _numbers(name, given[name])
    for name in ("systems", "backends"):
        if name in given:
            given[name] = tuple(split_names(given[name]))
    if "compile" in given:
        given["compile"] = (False, True)
    return BenchConfig(**whole, groups={"command": Group(**given)})


def target_path(out: str | None, record: Any) -> Path:
    """Where a record goes: the file or folder asked for, else ``results/bench``, or scratch if it names no commit.

    Args:
        out: As given on the command line.
        record: A latency record.
    """
    if out is not None and out.endswith(".json"):
        return Path(out)
    clean = record.provenance.get("git", {}).get("dirty") is not True
    folder = Path(out) if out is not None else Path("results/bench") if clean else Path("results/scratch/bench")
    time = record.created[:19].replace("-", "").replace(":", "")
    return folder / f"latency-{record.shape}-{record.dtype}-{record.device.split(':')[0]}-{time}.json"


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run_latency(arguments: argparse.Namespace) -> int:
    """Measure, write the record, print its table last."""
    from dlplora.bench.session import run_bench
    from dlplora.cli.terminal import quiet_loading
    from dlplora.reporting.latency.records import save_bench
    from dlplora.reporting.latency.tables import markdown

    quiet_loading(None)
    config = config_of(arguments)
    if arguments.out is not None:
        require_writable(Path(arguments.out).parent if arguments.out.endswith(".json") else arguments.out, "--out")
    record = run_bench(config, _tell, after_group=lambda record: save_bench(record, target_path(arguments.out, record)))
    for warning in record.warnings:
        print(f"dlplora: warning: {warning}; the times are not those of a quiet machine.", file=sys.stderr)
    print(f"wrote {target_path(arguments.out, record)}", file=sys.stderr)
    print(markdown(record))
    return 0
