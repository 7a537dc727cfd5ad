"""Ceilings: accuracy of the right expert against the token from which it is applied.

    python -m benchmarks.ceilings run [--protocol nano] [--pool FOLDER] [--data-root FOLDER] [--out results] [--limit N]

One record per setting, suite ``PROTOCOL_ceilings``; finished ones are reused. ``dlplora report build --suite PROTOCOL_ceilings`` writes the
table.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

from dlplora.config import config_hash, config_label
from dlplora.errors import ConfigError
from dlplora.evaluation.cache import EvalCache, eval_cache
from dlplora.evaluation.outcomes import outcomes_of, standard_errors
from dlplora.evaluation.protocol import load_protocol
from dlplora.evaluation.runner import Artifacts, Run, evaluate_run, make_record, open_model, prepare
from dlplora.inference.expert_start import ExpertStart, expert_start
from dlplora.reporting.store import find_cell, save

SETTINGS = {
    "oracle_whole": ExpertStart(),
    "oracle_quarter": ExpertStart(start=0.25),
    "oracle_half": ExpertStart(start=0.5),
    "oracle_three_quarters": ExpertStart(start=0.75),
    "oracle_last_token": ExpertStart(start="last_token"),
    "oracle_answer": ExpertStart(start="answer"),
    "oracle_half_mean": ExpertStart(start=0.5, elsewhere="mean"),
    "oracle_half_mean_upper": ExpertStart(start=0.5, elsewhere="mean", without_first_layer=True),
}
"""Name of the record -> from where on the right expert holds. The last one is what a gate per module can reach."""


def cell_of(run: Run, setting: ExpertStart) -> str:
    """Hash of everything the numbers depend on."""
    return config_hash([run.protocol_name, run.cell(), dataclasses.asdict(setting)])


def evaluate_setting(run: Run, name: str, root: Path, cache: EvalCache) -> Path:
    """Evaluate one setting and write its record.

    Raises:
        ConfigError: If prompts are not read separately from the options.
    """
    setting = SETTINGS[name]
    start = time.perf_counter()
    with open_model(run, cache) as lm, expert_start(lm.fused, setting):
        if lm.prefix_note != "shared":
            raise ConfigError(f"where a prompt ends is not known while options are {lm.prefix_note}.")
        ready = time.perf_counter()
        result = evaluate_run(run, lm, cache)
        timings = {"load": ready - start, "evaluate": time.perf_counter() - ready}
        outcomes = outcomes_of(result, run.prefix, lm.statistics.routes)
        record = make_record(run, lm, result, timings, standard_errors(outcomes, run.protocol.bootstrap_iters))
    params = dataclasses.asdict(setting)
    record = dataclasses.replace(
        record,
        suite=run.protocol_name,
        method_name=name,
        method={"method": "oracle", "params": params},
        method_hash=config_hash(["oracle", params]),
        cell=cell_of(run, setting),
    )
    return save(record, root, outcomes)


def main() -> None:
    """Run all settings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["run"])
    parser.add_argument("--protocol", default="nano", metavar="NAME", help="of configs/protocol (default: nano)")
    parser.add_argument(
        "--pool", type=Path, metavar="FOLDER", help="needed where the base model is not the embedded one, or the pool is not"
    )
    parser.add_argument("--data-root", metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--limit", type=int)
    arguments = parser.parse_args()
    suite = f"{config_label(arguments.protocol)}_ceilings"
    protocol = load_protocol(arguments.protocol, {"data_root": arguments.data_root} if arguments.data_root else {})
    run = prepare(protocol, suite, "oracle", 0, artifacts=Artifacts(pool=arguments.pool), limit=arguments.limit)
    with eval_cache() as cache:
        for name, setting in SETTINGS.items():
            known = find_cell(cell_of(run, setting), 0, suite, name, arguments.out, scratch=True)
            path = known or evaluate_setting(run, name, arguments.out, cache)
            print(f"{name}: {'reused ' if known else ''}{path}", flush=True)


if __name__ == "__main__":
    main()
