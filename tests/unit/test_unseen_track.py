"""The track of unseen tasks: who is left out, what is refused, and that no answer has its own expert."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from dlplora.adapters.pool import load_pool
from dlplora.cli.main import main
from dlplora.config import list_configs
from dlplora.errors import MethodError, TaskError
from dlplora.evaluation.cache import eval_cache
from dlplora.evaluation.protocol import load_protocol
from dlplora.evaluation.runner import Run
from dlplora.evaluation.unseen import folds_of, joined, leaves_itself_out, measure_folds
from dlplora.inference.loading import nano_asset
from dlplora.reporting.schema import Record, TaskResult
from dlplora.reproduce import profile
from dlplora.reproduce.recipe import NANO, Setting
from dlplora.reproduce.unseen import UnseenTrack, pool_without, require_possible, runs_of, setting_without

TASKS = ("object_counting", "pick_food", "translate_tepak", "translate_zargi")


def test_the_profiles_that_are_taken_by_default_exist() -> None:
    assert set(profile.PROFILES.values()) <= set(list_configs("reproduce"))


def test_every_task_is_left_out_once() -> None:
    names = [f"task{number}" for number in range(26)]
    folds = folds_of(names)
    assert sorted(name for fold in folds for name in fold) == sorted(names)
    assert [len(fold) for fold in folds] == [6, 5, 5, 5, 5]
    assert folds_of("abc", 3) == [("a",), ("b",), ("c",)]


@pytest.mark.parametrize(("names", "num"), [("abc", 1), ("abc", 4), ("ab", 2), ("abcd", 0)])
def test_folds_that_leave_no_choice_are_refused(names: str, num: int) -> None:
    with pytest.raises(TaskError, match="cannot be left out"):
        folds_of(names, num)


def test_a_pool_without_some_experts_is_the_rest_of_it(tmp_path: Path) -> None:
    whole = load_pool(nano_asset("pool"))
    rest = load_pool(pool_without(nano_asset("pool"), TASKS, tmp_path))
    assert rest.names == tuple(name for name in whole.names if name not in TASKS)
    assert all(rest.sha256[name] == whole.sha256[name] for name in rest.names)
    assert rest.base_model == whole.base_model
    manifest = tmp_path / "pool" / "pool.json"
    written = manifest.stat().st_mtime_ns
    pool_without(nano_asset("pool"), TASKS, tmp_path)
    assert manifest.stat().st_mtime_ns == written  # used again
    assert load_pool(pool_without(nano_asset("pool"), TASKS[:1], tmp_path)).names != rest.names


def test_routers_are_trained_without_the_tasks() -> None:
    options = setting_without(NANO, TASKS).arguments("router")
    named = options[-1].removeprefix("--data.init_args.tasks=").split(",")
    assert len(named) == 22
    assert not set(named) & set(TASKS)
    other = setting_without(Setting(suite="skills", backbone="model"), ("date_format",))
    assert other.tasks is not None
    assert "date_format" not in other.tasks


@pytest.mark.parametrize("preset", ["multitask", "meteora_gate", "oracle", "lorahub_in_pool_x"])
def test_methods_that_knew_the_task_are_refused(preset: str) -> None:
    with pytest.raises(Exception, match=preset) as refused:
        require_possible(["base", preset])
    assert isinstance(refused.value, MethodError) or preset.endswith("_x")
    require_possible(["base", "dlp", "lorauter", "adapter_soup"])
    assert leaves_itself_out("adapter_soup") == {"leave_one_out": True}
    assert leaves_itself_out("dlp") == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nano", "--folds", "3"], "--folds belongs to --track unseen"),
        (["nano", "--track", "unseen", "--folds", "30"], "cannot be left out in 30 folds"),
        (["nano", "--track", "unseen", "--seeds", "1"], "has one seed, 0"),
        (["nano", "--track", "unseen", "--methods", "oracle"], "needs the expert of the prompt's own task"),
        (["paper", "--track", "unseen"], "runs on nano and real"),
        (["nano", "--track", "unseen", "--fresh"], "exclude each other"),
    ],
)
def test_bad_input_is_one_line(options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", *options, "--runs", str(tmp_path / "runs")]) == 2
    text = capsys.readouterr().err
    assert message in text
    assert "Traceback" not in text


def test_no_answer_has_its_own_expert(tmp_path: Path) -> None:
    setting = dataclasses.replace(NANO, tasks=TASKS)
    protocol = dataclasses.replace(load_protocol("nano"), tasks=list(TASKS))
    track = UnseenTrack(
        protocol=protocol, protocol_name="nano_unseen", setting=setting, pool=nano_asset("pool"), runs=tmp_path, num_folds=2
    )
    runs = runs_of(track, "random_route", 3, print)
    with eval_cache() as cache:
        record, outcomes = measure_folds(runs, "checksum", cache)
    assert list(record.tasks) == [name for name in runs[0].suite.names if name in TASKS]
    assert record.suite == "nano_unseen"
    assert record.aggregates["mcq_acc"] is None
    assert len(outcomes) == 12
    for outcome in outcomes:
        (mate,) = [fold for fold in track.folds if outcome.task in fold]
        assert outcome.routing is not None
        kept = {name for _, weights in outcome.routing for name in weights}
        assert kept
        assert not kept & set(mate)


def test_folds_are_joined_task_by_task(tmp_path: Path) -> None:
    setting = dataclasses.replace(NANO, tasks=TASKS)
    track = UnseenTrack(
        protocol=load_protocol("nano"), protocol_name="nano_unseen", setting=setting, pool=nano_asset("pool"), runs=tmp_path, num_folds=2
    )
    runs = runs_of(track, "avg_delta", 1, print)
    record = joined(runs, [_fold_record(run, kept) for run, kept in zip(runs, (1.0, 4.0), strict=True)], "checksum")
    assert record.routing["mean_experts_kept"] == pytest.approx((2 * 10 * 1.0 + 2 * 10 * 4.0) / 40)
    assert record.routing["num_plans"] == 14
    assert record.routing["num_merged"] == 24
    assert "router_accuracy" not in record.routing
    assert record.timings_s == {"load": 3.0}
    assert record.training_tokens == 60
    assert record.provenance["unseen"] == {"folds": [list(fold) for fold in track.folds]}


def _fold_record(run: Run, kept: float) -> Record:
    from dlplora.evaluation.runner import blank_record

    tasks = {name: TaskResult(kind="mcq", version="1", num=10, metrics={"acc": 0.5}, stderr={"acc": 0.1}) for name in run.task_names}
    routing = {
        "mean_experts_kept": kept,
        "mean_entropy_nats": 0.0,
        "fraction_multi": 0.0,
        "num_plans": 7,
        "num_merged": 24,
        "router_accuracy": 0.0,
    }
    return dataclasses.replace(blank_record(run), tasks=tasks, routing=routing, timings_s={"load": 1.5}, training_tokens=60)
