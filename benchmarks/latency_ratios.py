"""Run several latency benchmarks: ``python -m benchmarks.latency_ratios nano qwen2-0.5b``.

Each is a file of ``configs/bench`` (or a path), writes one record, by default under ``results/bench``, and prints its table.
``dlplora bench latency`` does the same for one file or for options given on the command line.

``--processes N`` measures the groups of all files in processes of their own. N of them prepare at the same time (compiling a decode step
keeps one core busy and leaves a GPU idle) and are then timed one after the other; then come the next N. Compiled groups come first, and the
first groups of all files before the second ones. The record of a file is written anew whenever one of its groups is finished, so a run that
is cut off keeps its finished groups. Nothing is timed while another process holds the lock file of ``--turn``.
"""

from __future__ import annotations

import argparse
import dataclasses
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dlplora.bench.session import run_bench
from dlplora.bench.settings import BenchConfig, load_bench_config
from dlplora.bench.turns import Turns
from dlplora.cli.bench import target_path
from dlplora.cli.terminal import quiet_loading
from dlplora.errors import DLPLoRAError
from dlplora.reporting.latency.records import LatencyRecord, merge_latency, read_latency, save_bench
from dlplora.reporting.latency.tables import markdown

POLL_S = 0.2


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _report(record: LatencyRecord, path: Path) -> None:
    for warning in record.warnings:
        print(f"warning: {record.shape}: {warning}; the times are not those of a quiet machine.", file=sys.stderr)
    print(f"wrote {path}", file=sys.stderr)
    print(markdown(record) + "\n")


def run(configs: Sequence[BenchConfig], out: str | None) -> None:
    """Run the benchmarks one after the other, write their records and print their tables.

    Args:
        configs: What to measure.
        out: Folder; None is the default of ``dlplora bench latency``.
    """
    for config in configs:
        record = run_bench(config, _tell, after_group=lambda record: save_bench(record, target_path(out, record)))
        _report(record, target_path(out, record))


def run_group(config: BenchConfig, group: str, target: Path, turns: Turns) -> None:
    """Measure one group and write its record; what a child process does."""
    only = dataclasses.replace(config, groups={group: config.groups[group]})
    save_bench(run_bench(only, lambda text: _tell(f"{config.shape} {text}"), turns=turns), target)


class GroupProcesses:
    """Child processes, one a group, so many at a time.

    Args:
        names: Configurations, as given on the command line.
        configs: The same, read.
        prepare_seconds: Given to every child.
        folder: For their records.
        turn: The lock; None makes one in the folder.
    """

    def __init__(
        self, names: Sequence[str], configs: Sequence[BenchConfig], prepare_seconds: float | None, folder: Path, turn: str | None
    ) -> None:
        self.configs = configs
        self.waiting: list[tuple[int, str, list[str]]] = []
        self.running: dict[tuple[int, str], subprocess.Popen[bytes]] = {}
        self.finished: dict[tuple[int, str], Path] = {}
        self._folder = folder
        limit = [] if prepare_seconds is None else ["--prepare-seconds", str(prepare_seconds)]
        for index, (name, config) in enumerate(zip(names, configs, strict=True)):
            for group in config.groups:
                command = [sys.executable, "-m", "benchmarks.latency_ratios", name, "--group", group, *limit]
                self.waiting.append(
                    (index, group, [*command, "--turn", turn or str(folder / "turn"), "--record", str(self._path(index, group))])
                )
        self.waiting.sort(key=lambda job: (not self._compiled(job), list(configs[job[0]].groups).index(job[1])))

    def _compiled(self, job: tuple[int, str, Any]) -> bool:
        return True in self.configs[job[0]].groups[job[1]].compile

    def _path(self, index: int, group: str) -> Path:
        return self._folder / f"{index}-{group}.json"

    def step(self, processes: int) -> list[int]:
        """Start what may start; the indices of configurations with a group that has just finished."""
        if not self.running and self.waiting:  # whoever starts later would keep those that are ready from their turn
            kind = self._compiled(self.waiting[0])
            while self.waiting and len(self.running) < processes and self._compiled(self.waiting[0]) == kind:
                index, group, command = self.waiting.pop(0)
                self.running[index, group] = subprocess.Popen(command)
        done = [key for key, child in self.running.items() if child.poll() is not None]
        for index, group in done:
            code = self.running.pop((index, group)).returncode
            if code or not self._path(index, group).is_file():
                print(f"warning: {self.configs[index].shape}: group {group} was not measured (exit {code})", file=sys.stderr)
            else:
                self.finished[index, group] = self._path(index, group)
        return sorted({index for index, _ in done})

    def record(self, index: int) -> LatencyRecord | None:
        """What is finished of a configuration, groups in its order."""
        parts = [self.finished[index, group] for group in self.configs[index].groups if (index, group) in self.finished]
        return merge_latency([read_latency(path) for path in parts]) if parts else None

    def stop(self) -> None:
        """End the children."""
        for child in self.running.values():
            child.terminate()
        for child in self.running.values():
            child.wait()


def run_in_processes(configs: Sequence[BenchConfig], arguments: argparse.Namespace) -> bool:
    """Measure every group in a process of its own, write the records and print the tables; whether all groups were measured."""
    out = arguments.out

    def on_signal(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, on_signal)
    targets: dict[int, Path] = {}
    with tempfile.TemporaryDirectory() as folder:
        children = GroupProcesses(arguments.configs, configs, arguments.prepare_seconds, Path(folder), arguments.turn)
        whole = sum(len(config.groups) for config in configs)
        try:
            while children.waiting or children.running:
                for index in children.step(arguments.processes):
                    record = children.record(index)
                    if record is not None:
                        # the groups finish in any order, and the earliest names the file
                        save_bench(record, targets.setdefault(index, target_path(out, record)))
                time.sleep(POLL_S)
        except KeyboardInterrupt:
            print("warning: cut off; finished groups are kept", file=sys.stderr)
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # `timeout` signals the whole process group, and then this process once more
            children.stop()
        for _, path in sorted(targets.items()):
            _report(read_latency(path), path)
        return len(children.finished) == whole


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="name in configs/bench, or a YAML file")
    parser.add_argument("--out", metavar="DIR", help="folder of the records")
    parser.add_argument("--processes", type=int, metavar="N", help="measure every group in a process of its own, N at a time")
    parser.add_argument("--prepare-seconds", type=float, metavar="S", help="prepare no further system after so many seconds")
    parser.add_argument("--turn", metavar="FILE", help="lock file; its processes wait for whoever else holds it")
    for name in ("--group", "--record"):  # of a child
        parser.add_argument(name, help=argparse.SUPPRESS)
    return parser


def main() -> int:
    """Measure and print."""
    arguments = _parser().parse_args()
    quiet_loading(None)
    try:
        if arguments.processes is not None and arguments.processes < 1:
            print(f"error: --processes must be at least 1, got {arguments.processes}.", file=sys.stderr)
            return 2
        configs = [load_bench_config(name) for name in arguments.configs]  # a misspelt name is found before anything runs
        if arguments.group is not None:
            turns = Turns(Path(arguments.turn), arguments.prepare_seconds)
            run_group(configs[0], arguments.group, Path(arguments.record), turns)
        elif arguments.processes is not None:
            return 0 if run_in_processes(configs, arguments) else 1
        else:
            run(configs, arguments.out)
    except DLPLoRAError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
