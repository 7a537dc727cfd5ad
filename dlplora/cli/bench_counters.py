"""``dlplora bench counters``: count launches, floating point operations and bytes of one step, and compare with the golden file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def run_counters(arguments: argparse.Namespace) -> int:
    """Count, print a table, and with ``--check`` exit 1 if anything differs from the golden file."""
    from dlplora.bench import op_cases as cases
    from dlplora.cli.terminal import quiet_loading, split_names
    from dlplora.errors import ConfigError
    from dlplora.methods.registry import available_presets
    from dlplora.reporting.goldens import golden_path

    if (arguments.check or arguments.accept) and arguments.experts is not None:
        raise ConfigError("the golden file holds the shape's own number of experts; leave --experts out.")
    quiet_loading(None)
    case = cases.find_case(arguments.shape, arguments.experts)
    names = split_names(arguments.methods) if arguments.methods else list(available_presets())
    cells: cases.Cells = {}
    for name in names:
        cells.update(cases.count_method(name, case))
    path, whole = golden_path(cases.GOLDEN, Path(arguments.out)), not arguments.methods
    if arguments.accept:
        cases.write_golden(path, arguments.shape, cells, whole=whole)
        print(f"wrote {path}")
        return 0
    if not arguments.check:
        print(_table(cells))
        return 0
    found = cases.differences(cases.read_golden(path), arguments.shape, cells, whole=whole)
    for line in found:
        print(line)
    if found:
        print("If the change is intended: dlplora bench counters --accept, for each shape", file=sys.stderr)
        return 1
    print(f"{len(cells)} counts of shape {arguments.shape} equal the golden file")
    return 0


def _table(cells: dict[str, dict[str, dict[str, int]]]) -> str:
    from dlplora.reporting.markdown import table

    header = ["method", "backend", "decode: launches", "MFLOP", "MB", "host reads", "prefill: launches", "MFLOP", "MB"]
    header += ["routing: launches", "MB", "host reads"]
    rows = []
    for cell, phases in cells.items():
        decode, prefill, routing = phases["decode"], phases["prefill"], phases["plan"]
        numbers = [
            *(str(decode["launches"]), _millions(decode["flops"]), _millions(decode["bytes"]), str(decode["host_reads"])),
            *(str(prefill["launches"]), _millions(prefill["flops"]), _millions(prefill["bytes"])),
            *(str(routing["launches"]), _millions(routing["bytes"]), str(routing["host_reads"])),
        ]
        rows.append([*cell.split("/"), *numbers])
    return table(header, rows, left=2)


def _millions(number: int) -> str:
    return f"{number / 1e6:.3f}"
