"""Cost of routing on nano in two versions of the code: ``python -m benchmarks.sentence_ends --before FOLDER --commit HASH``.

The versions alternate, each in its own process with one thread. Within a process the systems are interleaved as in ``dlplora bench
latency``, and every time is divided by that of one PEFT adapter in the same round. The record has ratios of elapsed time and of the
process's CPU time, which other processes disturb less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from dlplora.bench.model_shapes import load_shape
from dlplora.bench.rounds import round_orders, take_turns
from dlplora.bench.session import build_setup
from dlplora.bench.settings import BenchConfig, Group
from dlplora.bench.setup import BenchSystem, Entry, Workload
from dlplora.bench.systems import build_system, make_workload
from dlplora.cli.terminal import quiet_loading

CASES: dict[str, tuple[tuple[str, ...], int, int, int]] = {
    "batch 1": (("peft_single", "dlp_code", "dlp"), 1, 128, 33),
    "batch 8": (("peft_single", "dlp_code", "dlp"), 8, 128, 33),
    "batch 32": (("peft_single", "dlp_code", "dlp"), 32, 128, 33),
    "prompt 1024": (("peft_single", "dlp_code", "dlp"), 1, 1024, 5),
    "pools": (("peft_single", "dlp@2", "dlp@1000"), 1, 128, 33),
}
"""Systems, rows, prompt tokens and new tokens. ``dlp_code`` routes once per prompt; ``dlp`` adds the cost of sentence ends."""
TIMES = ("ttft", "tpot", "ttft_cpu", "tpot_cpu")


class Clock(StoppingCriteria):
    """Records elapsed and CPU time after each token; never stops."""

    def __init__(self) -> None:
        self.stamps: list[tuple[float, float]] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        self.stamps.append((time.perf_counter(), time.process_time()))
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def measure(case: str, rounds: int) -> dict[str, dict[str, list[float]]]:
    """System -> time -> seconds of each round, in this process."""
    names, batch, prompt, new_tokens = CASES[case]
    torch.set_num_threads(1)
    device = torch.device("cpu")
    model, tokenizer = load_shape("nano", "float32", device)
    pools = [int(name.partition("@")[2] or 26) for name in names]
    found: dict[str, dict[str, list[float]]] = {name: {key: [] for key in TIMES} for name in names}

    def once(system: BenchSystem, workload: Workload) -> tuple[float, float]:
        clock, begin = Clock(), (time.perf_counter(), time.process_time())
        system.generate(workload, stopping_criteria=StoppingCriteriaList([clock]))
        first, last, steps = clock.stamps[0], clock.stamps[-1], len(clock.stamps) - 1
        taken = [first[0] - begin[0], (last[0] - first[0]) / steps, first[1] - begin[1], (last[1] - first[1]) / steps]
        for key, value in zip(TIMES, taken, strict=True):
            found[labels[id(system)]][key].append(value)
        return taken[0], taken[1]

    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        setup = build_setup(BenchConfig(groups={"one": Group()}), model, tokenizer, max(pools), Path(folder))
        entries = [
            Entry(system=name.partition("@")[0], experts=1 if name == "peft_single" else size)
            for name, size in zip(names, pools, strict=True)
        ]
        systems = [build_system(setup, entry) for entry in entries]
        labels = {id(system): name for system, name in zip(systems, names, strict=True)}
        workload = make_workload(tokenizer, device, batch, prompt, new_tokens)
        for system in systems * 2:
            once(system, workload)
        for times in found.values():
            for values in times.values():
                values.clear()
        for order in round_orders(len(systems), rounds, f"{case} {os.getpid()}"):
            take_turns(systems, workload, [order], device, lambda number: None, once)
            for values in found[names[order[-1]]].values():
                values.pop(-2)  # the first generation of the last system of a round was not timed
    return found


def summary(rounds: Sequence[dict[str, dict[str, list[float]]]]) -> dict[str, dict[str, list[float]]]:
    """Pair of systems -> time -> lower quartile, median and upper quartile of their ratio, over the rounds of all processes."""
    pairs = [(name, "peft_single") for name in rounds[0] if name != "peft_single"]
    if "dlp@2" in rounds[0]:
        pairs.append(("dlp@1000", "dlp@2"))
    found: dict[str, dict[str, list[float]]] = {}
    for ours, theirs in pairs:
        found[f"{ours} / {theirs}"] = times = {}
        for key in TIMES:
            ratios = [one / other for process in rounds for one, other in zip(process[ours][key], process[theirs][key], strict=True)]
            times[key] = [round(value, 3) for value in statistics.quantiles(ratios, n=4)]
    return found


def compare(before: Path, commit: str, turns: int, rounds: int, out: Path) -> None:
    """Measure both versions in turns and write the record."""
    from dlplora.atomic import write_json
    from dlplora.bench.hardware import ContentionMonitor
    from dlplora.provenance import provenance

    watch = ContentionMonitor(torch.device("cpu"))
    here = Path(__file__).resolve()
    versions = {"before": before.resolve(), "after": here.parents[1]}
    samples: dict[str, dict[str, list[Any]]] = {version: {case: [] for case in CASES} for version in versions}
    for turn in range(turns):
        for case in CASES:
            for version in list(versions)[:: 1 if turn % 2 else -1]:
                print(f"turn {turn + 1}/{turns}: {case}, {version}", file=sys.stderr, flush=True)
                command = [sys.executable, str(here), "--measure", case, "--rounds", str(rounds)]
                environment = {**os.environ, "PYTHONPATH": str(versions[version]), "OMP_NUM_THREADS": "1"}
                done = subprocess.run(command, env=environment, cwd="/", stdout=subprocess.PIPE, text=True, check=True)
                samples[version][case].append(json.loads(done.stdout.splitlines()[-1]))
    record = {
        "backbone": "nano",
        "threads": 1,
        "rounds": turns * rounds,
        "cases": {case: {"batch": rows, "prompt": prompt, "new_tokens": new} for case, (_, rows, prompt, new) in CASES.items()},
        "ratios": {version: {case: summary(rows) for case, rows in cases.items()} for version, cases in samples.items()},
        "quantiles": [0.25, 0.5, 0.75],
        "before_commit": commit,
        "warnings": watch.warnings(),
        "provenance": provenance(),
    }
    write_json(out, record)
    print(json.dumps(record["ratios"], indent=1))


def main() -> int:
    """Measure one version, or compare two."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="checkout of the earlier version")
    parser.add_argument("--commit", default="", help="its commit, for the record")
    parser.add_argument("--turns", type=int, default=2, help="processes of each version and case")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of a process, an even number")
    parser.add_argument("--out", type=Path, default=Path("results/bench/sentence_ends.json"), metavar="FILE")
    parser.add_argument("--measure", choices=list(CASES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    quiet_loading(None)
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.rounds)))
    elif arguments.before is None or not (arguments.before / "dlplora").is_dir():
        print("error: --before needs a checkout of an earlier version, with the folder dlplora.", file=sys.stderr)
        return 2
    else:
        compare(arguments.before, arguments.commit, arguments.turns, arguments.rounds, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
