"""Thresholds against hand-computed ones, AUROC and the rest against scikit-learn and small sums, and refused input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import out_of_scope
from benchmarks.docs_table import with_table
from dlplora.cli.main import main
from dlplora.errors import ConfigError, MethodError
from dlplora.evaluation.scope_metrics import detection, risk_coverage
from dlplora.inference.loading import nano_asset
from dlplora.modules.router import MiniMLPRouter, RouterConfig
from dlplora.modules.scope import SCOPE_FILE, ScopeThreshold, choose_threshold, scores_of, write_scope

ROOT = Path(__file__).resolve().parents[2]


def test_scores_by_hand() -> None:
    logits = torch.log(torch.tensor([[6.0, 2.0], [3.0, 3.0]]))
    found = scores_of(logits.softmax(-1), logits)
    torch.testing.assert_close(found["max_probability"], torch.tensor([0.75, 0.5]))
    torch.testing.assert_close(found["energy"].exp(), torch.tensor([8.0, 6.0]))


@pytest.mark.parametrize(("keep", "expected"), [(1.0, 1.0), (0.95, 2.0), (0.94, 2.0), (0.5, 11.0), (0.05, 20.0), (0.01, 20.0)])
def test_keep_takes_the_largest_threshold_that_keeps_the_share(keep: float, expected: float) -> None:
    scores = torch.arange(1.0, 21.0)[torch.randperm(20, generator=torch.Generator().manual_seed(0))]
    found = choose_threshold("energy", scores, keep=keep)
    assert (found.threshold, found.keep, found.num_in_scope) == (expected, keep, 20)
    assert found.in_scope_kept == (21 - expected) / 20 >= keep


def test_balanced_accuracy_takes_the_best_threshold_and_of_equal_ones_the_smallest() -> None:
    inside, outside = torch.tensor([0.9, 0.8, 0.7, 0.3]), torch.tensor([0.1, 0.2, 0.4, 0.75])
    found = choose_threshold("max_probability", inside, outside, criterion="balanced_accuracy")
    # at 0.7: 3/4 kept, 3/4 rejected; at 0.3: 4/4 and 2/4; at 0.8: 2/4 and 4/4: all others are worse, and these are equal
    assert found.threshold == pytest.approx(0.3)
    assert (found.in_scope_kept, found.out_of_scope_kept, found.keep) == (1.0, 0.5, None)
    better = choose_threshold("max_probability", inside, torch.tensor([0.1, 0.2, 0.4, 0.5]), criterion="balanced_accuracy")
    assert better.threshold == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("inside", "outside", "options", "message"),
    [
        ([], None, {}, "no in-scope validation prompts"),
        ([1.0], [], {"criterion": "balanced_accuracy"}, "no out-of-scope validation prompts"),
        ([1.0], None, {"criterion": "balanced_accuracy"}, "needs out-of-scope validation prompts"),
        ([1.0, float("nan")], None, {}, "not finite"),
        ([1.0], [float("inf")], {}, "not finite"),
        ([1.0], None, {"keep": 0.0}, "'keep' must be in"),
        ([1.0], None, {"keep": float("nan")}, "'keep' must be in"),
    ],
)
def test_prompts_that_give_no_threshold(inside: list[float], outside: list[float] | None, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_threshold("energy", torch.tensor(inside), None if outside is None else torch.tensor(outside), **options)  # type: ignore[arg-type]


def test_detection_is_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="the package scikit-learn is not installed")
    rng = np.random.default_rng(0)
    for shift, scale in ((1.0, 1.0), (0.2, 0.05), (3.0, 40.0)):  # 40: a sigmoid would make most of them equal
        inside, outside = (np.round((rng.normal(size=size) + move) * scale, 1) for size, move in ((300, shift), (170, 0.0)))  # with ties
        found = detection(torch.from_numpy(inside), torch.from_numpy(outside))
        truth, scores = np.repeat([1, 0], [300, 170]), np.concatenate([inside, outside])
        false, true, _ = metrics.roc_curve(truth, scores, drop_intermediate=False)
        assert found["auroc"] == pytest.approx(metrics.roc_auc_score(truth, scores), abs=1e-6)
        assert found["fpr"] == pytest.approx(false[true >= 0.95].min(), abs=1e-6)


def test_risk_against_coverage_by_hand() -> None:
    scores, right = torch.tensor([0.9, 0.1, 0.7, 0.5]), torch.tensor([True, False, False, True])
    found = risk_coverage(scores, right, (0.25, 0.5, 1.0))
    # surest first: right, wrong, right, wrong -> risks 0, 1/2, 1/3, 2/4
    assert found["aurc"] == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    assert found["accuracy"] == pytest.approx({"0.25": 1.0, "0.5": 0.5, "1": 0.5})
    tied = risk_coverage(torch.zeros(4), right, (0.25, 1.0))  # no order: half of every share is wrong
    assert tied == {"aurc": pytest.approx(0.5), "accuracy": pytest.approx({"0.25": 0.5, "1": 0.5})}


def test_one_class_and_no_numbers_are_refused() -> None:
    some, none, broken = torch.rand(3), torch.zeros(0), torch.tensor([0.5, float("nan")])
    for inside, outside, message in ((some, none, "no out-of-scope"), (none, some, "no in-scope"), (some, broken, "not a number")):
        with pytest.raises(ConfigError, match=message):
            detection(inside, outside)
    with pytest.raises(ConfigError, match="there are none"):
        risk_coverage(none, none)
    with pytest.raises(ConfigError, match="not a number"):
        risk_coverage(broken, torch.tensor([True, False]))


def test_the_threshold_belongs_to_the_router_beside_it(tmp_path: Path) -> None:
    embedding = nn.Embedding(50, 12)
    router = MiniMLPRouter(("a", "b"), RouterConfig(hidden=(4, 4, 4)), embedding=embedding)
    router.save(tmp_path)
    assert MiniMLPRouter.load(tmp_path, embedding).scope is None
    scope = choose_threshold("energy", torch.arange(10.0), keep=0.9, data={"suite": "nano"})
    write_scope(tmp_path, scope)
    again = MiniMLPRouter.load(tmp_path, embedding)
    assert again.scope == scope
    again.save(tmp_path / "copy")
    assert MiniMLPRouter.load(tmp_path / "copy", embedding).scope == scope
    description = json.loads((tmp_path / SCOPE_FILE).read_text())
    for change, message in (({"format": 9}, "format 9"), ({"threshold": "x"}, "threshold"), ({"router_sha256": "0"}, "another router")):
        (tmp_path / SCOPE_FILE).write_text(json.dumps({**description, **change}))
        with pytest.raises(MethodError, match=message):
            MiniMLPRouter.load(tmp_path, embedding)
    router.save(tmp_path)  # a new router takes the old threshold away
    assert not (tmp_path / SCOPE_FILE).exists()
    with pytest.raises(MethodError, match="no router in"):
        write_scope(tmp_path / "empty", scope)
    with pytest.raises(ConfigError, match="finite"):
        ScopeThreshold(score="energy", threshold=float("nan"), criterion="keep")


def test_the_command_writes_beside_the_router(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "router"
    shutil.copytree(nano_asset("router"), folder)
    (folder / SCOPE_FILE).unlink()
    command = ["scope", "--router", str(folder), "--out-of-scope", "skills", "--criterion", "balanced_accuracy", "--limit", "3"]
    assert main([*command, "--dry-run"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["num_in_scope"], printed["num_out_of_scope"]) == (26 * 3, 28 * 3)
    assert not (folder / SCOPE_FILE).exists()
    assert main(command) == 0
    written = json.loads((folder / SCOPE_FILE).read_text())
    shipped = json.loads((nano_asset("router") / SCOPE_FILE).read_text())
    assert {name: written[name] for name in printed} == printed
    assert written["router_sha256"] == shipped["router_sha256"]
    assert abs(written["threshold"] - shipped["threshold"]) < 0.02  # of all prompts instead of three a task


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--router", "missing"], "no router in missing"),
        (["--keep", "2"], "'keep' must be in (0, 1]"),
        (["--limit", "0"], "must be at least 1"),
        (["--suite", "skills"], "has no task 'shelf_sorting'"),
        (["--criterion", "balanced_accuracy"], "needs out-of-scope validation prompts"),
        (["--out-of-scope", "nano"], "no out-of-scope validation prompts"),
    ],
)
def test_bad_options_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scope", "--router", str(nano_asset("router")), "--dry-run", "--limit", "2", *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("dlplora: error:")
    assert message in line


def test_the_page_and_the_file_show_the_record() -> None:
    record = json.loads((ROOT / "results" / "bench" / "out_of_scope-nano.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "out_of_scope.md").read_text(encoding="utf-8")
    assert with_table(page, "out_of_scope-nano", out_of_scope.table(record)) == page
    file = (ROOT / "results" / "tables" / "out_of_scope-nano.md").read_text(encoding="utf-8")
    assert file == f"{out_of_scope.heading(record)}\n\n{out_of_scope.table(record)}\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": 2}, "'threshold' of a probability must be between 0 and 1, got 2"),
        ({"threshold": -1}, "'threshold' of a probability must be between 0 and 1, got -1"),
        ({"threshold": 1.0000001}, "must be between 0 and 1"),
        ({"threshold": 0}, None),
        ({"threshold": 1.0}, None),
        ({"score": "energy", "threshold": 25.5}, None),
        ({"score": "energy", "threshold": -25.5}, None),
        ({"keep": 1.5}, "'keep' is a share"),
        ({"in_scope_kept": -0.5}, "'in_scope_kept' is a share"),
        ({"out_of_scope_kept": 7}, "'out_of_scope_kept' is a share"),
        ({"num_in_scope": -3}, "numbers of prompts are at least 0"),
    ],
)
def test_numbers_of_a_threshold_are_in_their_range(change: dict[str, Any], message: str | None, tmp_path: Path) -> None:
    embedding = nn.Embedding(50, 12)
    MiniMLPRouter(("a", "b"), RouterConfig(hidden=(4, 4, 4)), embedding=embedding).save(tmp_path)
    write_scope(tmp_path, ScopeThreshold(score="max_probability", threshold=0.5, criterion="keep"))
    file = tmp_path / SCOPE_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    if message is None:
        scope = MiniMLPRouter.load(tmp_path, embedding).scope
        assert scope is not None
        assert scope.threshold == change["threshold"]
        return
    with pytest.raises(MethodError, match=rf"scope\.json: scope: .*{message}") as caught:
        MiniMLPRouter.load(tmp_path, embedding)
    assert "\n" not in str(caught.value)
