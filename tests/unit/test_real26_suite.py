"""The suite real26: its lists follow from the admission table, its options come in drawn order, its files are those the tool writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dlplora.errors import TaskError
from dlplora.tasks.lm_eval.real26.docs import real_dataset
from dlplora.tasks.paper import with_options
from dlplora.tasks.paper.sources import source_of as paper_source
from dlplora.tasks.paper.splits import SplitSettings, draw_splits
from dlplora.tasks.real import PREFIX, PUBLIC, SKILLS, real_names, real_suite, real_task, source_of
from dlplora.tasks.real.descriptions import DESCRIPTIONS
from dlplora.tasks.registry import get_suite
from dlplora.tasks.skills import skills_candidates
from dlplora.tasks.types import Item
from tests.tools import real_admission, real_yaml

ROWS = json.loads(Path("results/real26_admission.json").read_text(encoding="utf-8"))["tasks"]


def test_the_suite_has_the_papers_shape() -> None:
    names = real_names("real26")
    kinds = [real_yaml.kind_of(name) for name in names]
    assert len(set(names)) == 26
    assert (kinds.count("mcq"), kinds.count("gen")) == (18, 8)


def test_every_member_was_admitted_by_its_row() -> None:
    verdicts = {row["task"]: real_admission.verdict(row) for row in ROWS}
    assert {name for name in real_names("real26") if not verdicts[name].admitted} == set()


def test_no_public_task_that_was_admitted_is_missing() -> None:
    assert {row["task"] for row in ROWS if row["block"] == "public" and real_admission.verdict(row).admitted} == set(PUBLIC)


@pytest.mark.parametrize(
    ("base", "expert", "majority", "admitted"),
    [
        ("1" * 30 + "0" * 30, "1" * 45 + "0" * 15, 0.5, True),  # 15 of 60 gained, none lost
        ("1" * 30 + "0" * 30, "1" * 32 + "0" * 28, 0.5, False),  # 3.3 points are too few
        ("1" * 30 + "0" * 30, "0" * 26 + "1" * 34, 0.5, False),  # 26 lost and 30 gained may be luck
        ("1" * 30 + "0" * 30, "1" * 45 + "0" * 15, 0.75, False),  # a constant answer is as good
    ],
)
def test_the_bar_of_a_multiple_choice_task(base: str, expert: str, majority: float, admitted: bool) -> None:
    hits = {"base": {"hits": [float(c) for c in base]}, "expert": {"hits": [float(c) for c in expert]}}
    row = {"task": "t", "kind": "mcq", "block": "public", "num_test": 60, "majority": majority, "chance": 0.5, **hits}
    assert real_admission.verdict(row).admitted is admitted


def test_options_come_in_an_order_that_does_not_depend_on_the_rows() -> None:
    source = paper_source("question_selection")
    stored = Item(source.name, "Which question?", "gold", ("gold", "one", "two", "three"), 0)
    other = Item(source.name, "Which question?", "gold", ("three", "two", "gold", "one"), 2)
    shown = with_options(source, stored)
    assert shown == with_options(source, other)
    assert shown.choices is not None
    assert shown.gold is not None
    assert shown.choices[shown.gold] == "gold"
    assert [line.removeprefix("choice: ") for line in shown.prompt.splitlines()[1:]] == list(shown.choices)


def test_options_that_a_text_lists_already_are_listed_in_the_same_order_once() -> None:
    source = paper_source("winowhy")
    text = "Which?\nchoice: gold\nchoice: one\nchoice: two\nA:"
    shown = with_options(source, Item(source.name, text, "gold", ("gold", "one", "two"), 0))
    assert shown.choices is not None
    assert shown.prompt == "Which?\n" + "\n".join(f"choice: {choice}" for choice in shown.choices) + "\nA:"


def test_the_right_option_has_no_preferred_place() -> None:
    source = paper_source("question_selection")
    places = [with_options(source, Item(source.name, f"Question {n}?", "gold", ("gold", "b", "c", "d"), 0)).gold for n in range(400)]
    assert all(70 <= places.count(place) <= 130 for place in range(4))  # 100 expected, standard deviation 8.7


def test_rows_that_differ_in_their_options_only_are_split_by_them() -> None:
    def item(number: int) -> Item:
        return Item("hyperbaton", "Which is right:", f"right {number}", (f"right {number}", f"wrong {number}"), 0)

    train, test = [item(n) for n in range(50)], [item(n) for n in range(40, 60)]
    splits = draw_splits("hyperbaton", train, test, SplitSettings(num_train=30, num_validation=5, num_test=10, asks_by_options=True))
    assert {split: len(rows) for split, rows in splits.rows.items()} == {"train": 30, "validation": 4, "test": 10}
    assert splits.left_out == {"question_in_test": 10}
    answers = {split: {row.answer for row in rows} for split, rows in splits.rows.items()}
    assert not answers["train"] & answers["validation"]
    assert not answers["train"] & {row.answer for row in test}


def test_the_lm_eval_files_are_those_the_tool_writes() -> None:
    wanted = real_yaml.files()
    on_disk = {path.name for path in real_yaml.FOLDER.glob("*.yaml")} - {"_mcq.yaml", "_gen.yaml"}
    assert on_disk == set(wanted)
    assert {name for name, text in wanted.items() if (real_yaml.FOLDER / name).read_text(encoding="utf-8") != text} == set()


def test_the_skills_block_needs_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DLPLORA_DATA", raising=False)
    suite = get_suite("real26_skills")
    assert suite.names == SKILLS
    assert suite.lm_eval_prefix == PREFIX
    assert all(task.items("test", 3) for task in suite.tasks)


def test_every_candidate_says_what_it_asks_for() -> None:
    """Pools carry it, for methods that read what an adapter is for."""
    said = {**DESCRIPTIONS, **{task.name: task.description for task in skills_candidates()}}
    assert set(said) == set(real_names("real_candidates"))
    assert len({text for text in said.values() if text}) == len(said)
    assert all(task.description for task in real_suite("real26_skills").tasks)


def test_an_unknown_task_names_the_near_one() -> None:
    with pytest.raises(TaskError, match="date_archive"):
        real_task("date_archiv", None)
    assert source_of("date_archive") is None


def test_missing_rows_of_the_public_block_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="no rows of task"):
        real_suite("real26_public", str(tmp_path))


def test_questions_are_counted_as_the_harness_gets_them() -> None:
    suite = get_suite("real26_skills").select(("date_archive", "ticket_desk"))
    assert suite.lm_eval_prefix == PREFIX
    for task in suite.tasks:
        assert suite.num_test(task) == len(real_dataset(task.name)["test"])
