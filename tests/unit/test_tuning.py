"""``dlplora tune``: which trial is chosen, what a trial asks, and what becomes of one that diverges."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dlplora.cli.main import main
from dlplora.config import config_hash, list_configs
from dlplora.errors import ConfigError, NotFiniteError, RecordError, TaskError
from dlplora.evaluation.cache import _require_split, eval_cache
from dlplora.evaluation.method_code import described_method
from dlplora.evaluation.protocol import load_protocol
from dlplora.methods.registry import available_methods, hashed_params, load_method_spec
from dlplora.reporting.columns import TRIALS, rows_of
from dlplora.reporting.groups import OutcomeReader, group
from dlplora.reporting.methods import data_seen, without_clones
from dlplora.reporting.store import is_publishable, load_all
from dlplora.reporting.tables import caption, main_table
from dlplora.reporting.tuning import (
    MAX_TRIALS,
    Trial,
    best_trial,
    load_trials,
    of_table,
    read_trial,
    trial_path,
    validated_settings,
    write_trial,
)
from dlplora.tasks.registry import get_suite
from dlplora.tuning.grid import Grid, choices, grid_of
from dlplora.tuning.trial_jobs import Budget, budget_of, trial_jobs
from tests.toy_tasks import write_tasks
from tests.unit.test_records import make_record

ROOT = Path(__file__).resolve().parents[2]
TASKS = ["object_counting", "pick_tool"]


def make_trial(score: float | None, /, *, default: bool = False, **changes: Any) -> Trial:
    values: dict[str, Any] = {
        "method": "dlp", "settings": {"threshold": 0.2}, "default": default, "seed": 0, "suite": "toy", "protocol": "toy",
        "backbone": "tiny", "pool_hash": "h", "limit": 20, "status": "ok" if score is not None else "diverged", "score": score,
        "scores": {} if score is None else {"a": score, "b": score, "g": score}, "seconds": 1.0, "cell": "c", "created": "2026-01-01",
    }  # fmt: skip
    return Trial(**{**values, **changes})


def test_the_best_trial_by_hand() -> None:
    low, high, lost = make_trial(0.25, default=True), make_trial(0.5), make_trial(None)
    assert best_trial([low, lost, high]) is high
    tied = make_trial(0.1 + 0.2, cell="d")  # 0.30000000000000004
    default = make_trial(0.3, default=True)
    assert best_trial([tied, default]) is default  # ties go to the default, wherever it stands
    assert best_trial([high, make_trial(0.5, cell="later")]) is high  # then to the first
    assert best_trial([lost, make_trial(None, status="failed")]) is None


def test_choices_hold_the_default_once_and_first() -> None:
    spec = load_method_spec("lorauter")
    found = choices(Grid(params={"top_k": [1, 3], "temperature": [0.1, 0.5]}), spec, {})
    assert [one.settings for one in found] == [
        {"top_k": 3, "temperature": 0.1}, {"top_k": 1, "temperature": 0.1}, {"top_k": 1, "temperature": 0.5},
        {"top_k": 3, "temperature": 0.5},
    ]  # fmt: skip
    assert [one.default for one in found] == [True, False, False, False]
    assert len(choices(Grid(params={"top_k": [1, 2]}), spec, {})) == 3  # the default is a trial although the grid leaves it out
    with pytest.raises(ConfigError, match="would have 9 trials"):
        choices(Grid(params={"top_k": [1, 2, 4, 5, 6, 7, 8, 9]}), spec, {})


@pytest.mark.parametrize("name", list_configs("tune"))
def test_every_grid_file_fits_its_preset(name: str) -> None:
    spec = load_method_spec(name)
    grid = grid_of(spec)
    found = choices(grid, spec, Budget().defaults(list(grid.training)))
    assert 2 <= len(found) <= MAX_TRIALS
    for one in found:
        load_method_spec(name, one.params)


def test_committed_hashes_do_not_know_of_splits_and_grids() -> None:
    nano = load_protocol("nano")
    assert "split" not in nano.resolved()
    assert dataclasses.replace(nano, split="validation").hash() != nano.hash()
    records = {record.method_name: record for record in load_all(ROOT / "results", "nano")[0]}
    for name in set(list_configs("tune")) & set(records):
        spec = load_method_spec(name)
        assert records[name].method_hash == config_hash([spec.method, hashed_params(spec)]), name
        assert records[name].protocol_hash == nano.hash()
    assert is_publishable(make_record())
    assert not is_publishable(make_record(protocol={"suite": "toy", "split": "validation"}))


def test_lm_eval_is_given_the_validation_questions(tmp_path: Path) -> None:
    rows = str(write_tasks(tmp_path))
    for suite, root in ((get_suite("nano"), None), (get_suite("local:pets,echo", rows), rows)):
        name = "pick_tool" if root is None else "pets"
        with eval_cache() as cache:
            (task,) = cache.tasks(suite, [name], data_root=root, num_fewshot=0, split="validation")
        asked = [task.doc_to_text(doc) for doc in task.test_docs()]
        assert sorted(asked) == sorted(item.prompt for item in suite.task(name).items("validation", len(asked)))
        _require_split(suite, [name], [task], "validation")


def test_a_data_set_that_ignores_the_split_is_refused() -> None:
    suite = get_suite("nano").select(["pick_tool"])
    tests = [item.prompt for item in suite.tasks[0].items("test", 20)]
    ignoring: Any = SimpleNamespace(test_docs=lambda: tests, doc_to_text=lambda doc: doc)
    with pytest.raises(TaskError, match="'pick_tool' asks no validation questions"):
        _require_split(suite, suite.names, [ignoring], "validation")


@pytest.fixture
def quick(tmp_path: Path) -> list[str]:
    (tmp_path / "quick.yaml").write_text(f"suite: nano\ntasks: [{', '.join(TASKS)}]\n")
    return ["--protocol", str(tmp_path / "quick.yaml"), "--limit", "2", "--out", str(tmp_path / "results")]


def test_a_diverging_trial_is_a_record_and_finished_trials_are_taken_up(
    quick: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["tune", "lorauter", *quick, "--setting", "temperature=0.1,1.0e-300"]  # similarities divided by it are infinite
    assert main(command) == 0
    table = capsys.readouterr().out
    assert "temperature=0.1 (default)" in table
    assert "| diverged: " in table
    assert table.splitlines()[-1] == "lorauter: temperature=0.1 (the default)"
    files = sorted((tmp_path / "results" / "tuning" / "quick" / "lorauter").glob("*.json"))
    trials = {trial.settings["temperature"]: trial for trial in map(read_trial, files)}
    assert {value: trial.status for value, trial in trials.items()} == {0.1: "ok", 1.0e-300: "diverged"}
    assert "NaN or infinite" in str(trials[1.0e-300].reason)
    assert trials[1.0e-300].score is None
    assert set(trials[0.1].scores) == set(TASKS)
    assert trials[0.1].score == sum(trials[0.1].scores.values()) / 2
    assert trials[0.1].tokens_seen == 0
    assert not list((tmp_path / "results").glob("*uns/**/*.json"))  # nothing that a table would read
    before = {path: path.read_bytes() for path in files}
    failed = dataclasses.replace(trials[0.1], status="failed", score=None, scores={}, reason="no space left")
    write_trial(trial_path("quick", failed, tmp_path / "results"), failed)
    assert main(command) == 0
    said = capsys.readouterr()
    assert said.err.count("reused") == 1  # the diverged one; what failed for another reason is tried again
    assert said.out.splitlines()[-1] == "lorauter: temperature=0.1 (the default)"
    repeated = next(path for path in files if path.name.startswith(trials[0.1].cell))
    assert {path for path in files if path.read_bytes() != before[path]} <= {repeated}
    assert read_trial(repeated).scores == trials[0.1].scores


def test_a_pool_that_does_not_fit_is_said_once(
    quick: list[str], make_adapter: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in TASKS:  # of a base model with other sizes
        make_adapter(tmp_path / "pool" / name)
    command = ["tune", "lorauter", *quick, "--setting", "temperature=0.1,0.2", "--pool", str(tmp_path / "pool")]
    assert main(command) == 2
    assert capsys.readouterr().err.count("dlplora: error:") == 1
    assert not list((tmp_path / "results").rglob("*.json"))


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["dlpp"], "unknown method 'dlpp'. Did you mean 'dlp'"),
        (["base"], "no grid for 'base'"),
        (["dlp", "--setting", "treshold=0.1"], "Did you mean 'threshold'"),
        (["dlp", "--setting", "lr=0.1"], "'lr' is not a setting of 'dlp'"),
        (["dlp", "--setting", "threshold"], "--setting must be NAME=VALUE,VALUE"),
        (["dlp", "--setting", "threshold=0.1,0.1"], "has a value twice"),
        (["dlp_code", "--setting", "threshold=0.1,0.5"], "reads no difference between"),
        (["ties", "--setting", "density=2"], "'density' must be in (0, 1]"),
        (["dlp,ties", "--setting", "threshold=0.1"], "--setting belongs to one method"),
        (["dlp", "--protocol", "nano_composite"], "no validation split"),
        (["mole", "--tokens", "0"], "--tokens must be at least 1"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", *arguments, "--out", str(tmp_path / "results")]) == 2
    said = capsys.readouterr().err.strip()
    assert part in said
    assert "\n" not in said
    assert not (tmp_path / "results").exists()


def test_damaged_trials_are_named(tmp_path: Path) -> None:
    path = trial_path("toy", make_trial(0.5), tmp_path)
    for change, part in (
        ({"score": 1.5}, "'score' must be from 0 to 1"),
        ({"score": None}, "'score' is missing"),
        ({"format": 9}, "format 9"),
    ):
        write_trial(path, make_trial(0.5, **change))
        with pytest.raises(RecordError, match=part):
            load_trials(tmp_path)
    with pytest.raises(RecordError, match="not results"):
        write_trial(path, make_trial(float("nan")))


def test_tables_show_the_trials_that_belong_to_them(tmp_path: Path) -> None:
    own = [make_trial(0.5, default=True), make_trial(None, settings={"threshold": 0.1}, cell="d", created="2026-01-02")]
    other_pool, some_tasks = make_trial(0.5, pool_hash="x", cell="e"), make_trial(0.5, scores={"a": 0.5}, cell="f")
    for trial in (*own, other_pool, some_tasks):
        write_trial(trial_path("toy", trial, tmp_path), trial)
    record = make_record()
    assert of_table(load_trials(tmp_path), [record]) == {"dlp": own}
    (one,) = group([record, make_record(method_name="base", method={"method": "base", "params": {}}, cell="b")], OutcomeReader(tmp_path))
    cells = rows_of(one.records, None, None, one.trials).summaries
    assert {name: row[TRIALS][0] for name, row in cells.items()} == {"base": None, "dlp": 2}
    table = main_table(one.records, trials=one.trials)
    assert "| method | data it saw |" in table
    assert "| `base` | none |" in table
    assert "| `dlp` | inputs |" in table


def test_validated_settings_are_those_of_the_newest_whole_set_of_trials() -> None:
    old = [make_trial(0.9, settings={"threshold": 0.9}, pool_hash="old"), make_trial(0.1, default=True, pool_hash="old")]
    new = [
        make_trial(0.5, settings={"threshold": 0.1}, created="2026-02-01"),
        make_trial(0.4, default=True, created="2026-02-02"),
        make_trial(0.95, settings={"threshold": 0.7}, created="2026-02-03", scores={"a": 0.95}),  # some tasks only
        make_trial(0.99, settings={"threshold": 0.8}, created="2026-02-04", backbone="another"),
    ]
    where = ("dlp", "toy", "toy", "tiny", ["a", "b", "g"])
    assert validated_settings([*new, *old], *where) == {"threshold": 0.1}
    assert validated_settings(old, *where) == {"threshold": 0.9}
    assert validated_settings([make_trial(0.5, default=True), make_trial(0.5)], *where) == {}  # a tie keeps the default
    assert validated_settings([make_trial(0.5, trained_here=True), make_trial(0.4, default=True)], *where) == {}  # its gates are elsewhere
    assert validated_settings([], *where) == {}


def test_a_tuned_row_is_beside_the_default_and_takes_its_rank() -> None:
    records = [make_record(), make_record(method_name="dlp_tuned", seed=1, cell="t")]
    trials = {"dlp": [make_trial(0.5, default=True), make_trial(0.6)]}
    cells = rows_of(records, None, None, trials).summaries
    assert {name: row[TRIALS][0] for name, row in cells.items()} == {"dlp": 2, "dlp_tuned": 2}
    assert without_clones(["dlp", "dlp_tuned", "base"]) == ["dlp_tuned", "base"]
    assert "seeds 0, 1 (seed 0 only: dlp; seed 1 only: dlp_tuned)" in caption(records)


def test_reproduce_evaluates_what_the_trials_choose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["reproduce", "nano", "--methods", "lorauter", "--limit", "1", "--tuned", "--runs", str(tmp_path), "--out", str(tmp_path)]
    shipped = load_trials(ROOT / "results", "nano")
    (tmp_path / "tuning/nano/lorauter").mkdir(parents=True)
    (tmp_path / "tuning/nano/lorauter/broken.json").write_text("{")
    assert main(command) == 2
    assert "broken.json" in capsys.readouterr().err
    (tmp_path / "tuning/nano/lorauter/broken.json").unlink()
    assert main(command) == 0
    records = {record.method_name: record for record in load_all(tmp_path, room="scratch")[0]}
    tried = sorted((one for one in shipped if one.method == "lorauter"), key=lambda one: one.created)
    chosen = max(tried, key=lambda one: (one.score or 0.0, one.default)).settings
    assert set(records) == {"lorauter", "lorauter_tuned"}
    assert chosen.items() <= records["lorauter_tuned"].method["params"].items()
    assert records["lorauter"].method["params"]["top_k"] == load_method_spec("lorauter").config.top_k != chosen["top_k"]


def test_the_default_trial_has_the_settings_of_the_table() -> None:
    """real26 trains ``meteora_gate`` and ``mole`` with options of their own; nano has no profile."""
    defaults = {method: budget_of("real26", method, 5).defaults(["lr", "num_steps"]) for method in ("meteora_gate", "mole", "xlora")}
    assert {method: row["num_steps"] for method, row in defaults.items()} == {"meteora_gate": 4800, "mole": 1200, "xlora": 1200}
    assert {method: row["lr"] for method, row in defaults.items()} == {"meteora_gate": 1e-3, "mole": 1e-4, "xlora": 1e-3}
    assert budget_of("real26_skills", "mole", 5).config == "real_fusion"
    assert budget_of("nano", "mole", 5) == Budget(max_tokens=5)
    assert budget_of("real26", "mole", 5, "fusion") == Budget(max_tokens=5, config="fusion")


def test_the_data_a_method_saw_is_what_its_class_declares() -> None:
    """Of methods that ``methods.yaml`` has, and by the same rule of those of other packages."""
    declared = {"inputs": "inputs", "labels": "inputs", "few_shot": "labels", "all_tasks_adapter": "labels", "trained": "labels"}
    for name, cls in available_methods().items():
        needs = cls.metadata.needs
        seen = {declared[need] for need in needs if need != "task_id"}
        seen -= {"inputs"} if "labels" in seen else set()
        parts = [*sorted(seen), *(["task name"] if "task_id" in needs else [])]
        described = described_method(load_method_spec(name))
        assert described["needs"] == list(needs)
        for method in (described, {**described, "method": "of_another_package"}):
            assert data_seen(make_record(method=method)) == (", ".join(parts) or "none"), name
    assert data_seen(make_record(method={"method": "of_another_package"})) == "not stated"  # an older record


def test_a_trained_trial_has_its_own_gates_under_the_common_cap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from dlplora.training import early_stopping
    from dlplora.tuning import retraining

    spec = load_method_spec("xlora_frozen")
    protocol = load_protocol("nano", {"tasks": TASKS})
    budget = Budget(max_tokens=5000)
    default, changed = trial_jobs(spec, Grid(training={"lr": [0.01]}), protocol, "nano", 0, budget=budget)
    assert default.trains
    assert default.cell() != changed.cell() != trial_jobs(spec, Grid(training={"lr": [0.01]}), protocol, "nano", 0)[1].cell()
    assert dict(default.choice.training) == {"lr": 0.001}  # of the training configuration
    free = trial_jobs(load_method_spec("xlora"), Grid(params={"temperature": [0.5]}), protocol, "nano", 0)
    assert not any(one.trains for one in free)  # a parameter of evaluation: the gates stay
    asked: list[Any] = []

    def diverges(role: str, runs: Path, **options: Any) -> Path:
        asked.append((role, options["setting"].extra("trained")))
        note = runs / f"{role}_training" / early_stopping.FAILURE
        note.parent.mkdir(parents=True)
        note.write_text(json.dumps({"reason": "val_loss is nan at step 1", "diverged": True}))
        raise ConfigError("training ended with exit code 2")

    monkeypatch.setattr(retraining, "train", diverges)
    assert retraining.FAILURE == early_stopping.FAILURE
    with pytest.raises(NotFiniteError, match="val_loss is nan"):
        retraining.retrained(changed, tmp_path)
    ((role, options),) = asked
    assert role == "trained/xlora_frozen"
    assert {"--model.init_args.optimizer.lr=0.01", "--data.init_args.max_tokens=5000"} <= set(options)
