"""The table of what one more expert costs."""

from __future__ import annotations

from benchmarks.added_task import table


def test_scores_are_means_over_the_added_tasks_and_no_training_where_there_is_none() -> None:
    row = {"old_before": 0.5, "old_after": 0.25, "new_after": 1.0, "build_s": 2.0}
    other = {"old_before": 0.75, "old_after": 0.75, "new_after": 0.5, "build_s": 4.0}
    costs = {
        "a": {"dlp": {**row, "trained": True}, "lorauter": {**row, "trained": False}, "logreg": {**row, "trained": False}},
        "b": {"dlp": {**other, "trained": True}, "lorauter": {**row, "trained": False}},
    }
    lines = table({"costs": costs, "train_s": 61.26}).splitlines()
    assert lines[2].replace(" ", "") == "|`dlp`|62.5|50.0|75.0|61.3|3.0|"
    assert lines[3].replace(" ", "") == "|`lorauter`|50.0|25.0|100.0||2.0|"
    assert len(lines) == 4  # a method that was not measured for every task has no row
