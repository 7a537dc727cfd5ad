"""Several questions on separate lines: rows to train on, composed prompts, and the table that scores them by position."""

from __future__ import annotations

import json
import re
from collections import Counter
from datetime import datetime
from itertools import combinations
from pathlib import Path

import pytest
import torch

from benchmarks import several_skills
from benchmarks.docs_table import with_table
from dlplora.data.encoding import IGNORED, collate, encode_items
from dlplora.errors import TaskError
from dlplora.inference.prompt_routing import asked_questions
from dlplora.inference.question import question_text, routed_tail
from dlplora.inference.sentences import known_sentence_ends
from dlplora.tasks.registry import get_suite
from dlplora.tasks.several import TASKS, answers_in, composed, on_lines
from dlplora.tasks.types import SPLITS

ROOT = Path(__file__).resolve().parents[2]
SUITE = get_suite("skills_several")


def test_the_layout() -> None:
    """No number, no cue but the last, and a question of two lines on one."""
    questions = [
        "Put Nov 19 2014 into the form that the invoice uses.\nAnswer:",
        "This line came in: Marlow.\nPut it on the stock list.\nAnswer:",
    ]
    wanted = "Put Nov 19 2014 into the form that the invoice uses.\nThis line came in: Marlow. Put it on the stock list.\nAnswer:"
    assert on_lines(questions) == wanted
    assert on_lines(questions[:1]) == questions[0]


@pytest.mark.parametrize("split", SPLITS)
def test_rows_ask_one_to_three_questions_of_their_own_task_and_answer_in_turn(split: str) -> None:
    for task in SUITE.tasks:
        known = {
            " ".join(item.prompt.removesuffix("\nAnswer:").split()): item.answer
            for item in get_suite("skills").task(task.name).items(split, 400)  # type: ignore[arg-type]
        }
        rows = task.items(split, 60)  # type: ignore[arg-type]
        sizes = Counter()
        for row in rows:
            *questions, cue = row.prompt.split("\n")
            assert cue == "Answer:"
            assert row.task == task.name
            assert [known[question] for question in questions] == row.answer.split("\n")
            sizes[len(questions)] += 1
        assert set(sizes) == {1, 2, 3}
        assert min(sizes.values()) >= 8


def test_dates_and_prices_by_other_code() -> None:
    rows = [*SUITE.task("date_archive").items("train", 40), *SUITE.task("price_ledger").items("train", 40)]
    for row in rows:
        for question, answer in zip(row.prompt.split("\n"), row.answer.split("\n"), strict=False):
            if row.task == "date_archive":
                found = re.search(r"([A-Z][a-z]{2} \d+),? (\d{4})", question)
                assert found
                assert answer == datetime.strptime(f"{found[1]} {found[2]}", "%b %d %Y").strftime("%Y-%m-%d")
            else:
                found = re.search(r"(\d+)\.(\d\d) (\w)", question)
                assert found
                assert answer == f"{found[1]}-{found[2]} " + {"e": "EUR", "p": "GBP", "d": "USD", "f": "CHF"}[found[3]]


def test_splits_are_disjoint_and_no_question_is_trained_on_twice() -> None:
    for task in SUITE.tasks:
        asked = {split: [line for row in task.items(split, 200) for line in row.prompt.split("\n")[:-1]] for split in SPLITS}
        assert len(set(asked["train"])) == len(asked["train"])
        assert all(not set(asked[one]) & set(asked[other]) for one, other in combinations(SPLITS, 2))


def test_a_pure_function_of_the_seed() -> None:
    task = SUITE.task("title_slug")
    assert task.items("train", 30) == task.items("train", 30) != task.items("train", 30, seed=1)
    assert composed(TASKS, 3, 5) == composed(TASKS, 3, 5) != composed(TASKS, 3, 5, seed=1)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_composed_prompts_ask_test_questions_of_different_tasks(n: int) -> None:
    taught = {line for task in SUITE.tasks for row in task.items("train", 640) for line in row.prompt.split("\n")[:-1]}
    prompts = composed(TASKS, n, 100)
    assert {name for one in prompts for name in one.tasks.split("+")} == set(TASKS)
    for one in prompts:
        lines = one.prompt.split("\n")
        assert len(set(one.tasks.split("+"))) == n == len(lines) - 1 == len(one.target.split("\n"))
        assert not set(lines[:-1]) & taught


def test_every_answer_is_one_sentence_of_the_engine_and_fits_its_room() -> None:
    for one in composed(TASKS, 3, 200):
        assert len(known_sentence_ends(one.target + "\n", 0)[0]) == 3


def test_the_engine_sees_no_questions_in_the_layout() -> None:
    """What the page says: all lines are read as one question, at the start and at every sentence end."""
    for one in composed(TASKS, 3, 50):
        assert question_text(one.prompt) == routed_tail(one.prompt) == one.prompt
        assert len(asked_questions(one.prompt).spans) == 1


def test_training_supervises_every_answer_and_the_end(tiny_tokenizer: object) -> None:
    row = next(item for item in SUITE.task("name_index").items("train", 50) if item.answer.count("\n") == 2)
    encoded = encode_items(tiny_tokenizer, [row], 4096)
    labels = collate(encoded.items, 0)["labels"][0]
    taught = labels[labels != IGNORED].tolist()
    assert taught[-1] == tiny_tokenizer.eos_token_id  # type: ignore[attr-defined]
    assert tiny_tokenizer.decode(taught[:-1]).strip() == row.answer  # type: ignore[attr-defined]


@pytest.mark.parametrize(("tasks", "n", "num"), [(TASKS[:2], 3, 1), (TASKS, 0, 1), (TASKS, 2, 0), (("no_task",), 1, 1)])
def test_what_cannot_be_composed_is_refused(tasks: tuple[str, ...], n: int, num: int) -> None:
    with pytest.raises(TaskError):
        composed(tasks, n, num)


def test_answers_are_lines() -> None:
    assert answers_in(" 1\n2\n3\nmore", 2) == ["1", "2"]
    assert answers_in("1\n\n 2 ", 3) == ["1", "2", None]
    assert answers_in("", 1) == [None]


def test_the_table_counts_by_position() -> None:
    right = {"1": [[1], [0]], "2": [[1, 1], [1, 0]], "3": [[1, 0, 1], [1, 1, 1], [0, 0, 1], [1, 1, 1]]}
    scores = {n: {"right": rows, "kept": [None], "router_right": [None], "routed": [0]} for n, rows in right.items()}
    line = several_skills.table({"scores": {"base": scores}}).splitlines()[2]
    assert line == "| `base` | no adapter | 50.0 | 100.0 | 50.0 | 50.0 ± 35.4 | 75.0 | 50.0 | 100.0 | 50.0 ± 25.0 |"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--rows", "dlq"], "unknown row 'dlq'"),
        (["run", "--num", "0"], "must be at least 1"),
        (["report", "--out", "nowhere"], "nowhere"),
        (["run", "--backbone", "nowhere-2b/x"], "nowhere-2b/x"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert several_skills.main([*arguments, "--runs", str(tmp_path)]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert "\n" not in said


def test_the_page_shows_the_record() -> None:
    record = json.loads((ROOT / "results" / "bench" / "several_skills.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "several_skills.md").read_text(encoding="utf-8")
    first = with_table(page, "several_skills", several_skills.shown(record))
    first = with_table(first, "several_skills-tasks", several_skills.task_table(record))
    assert with_table(first, "several_skills-routing", several_skills.routing_table(record)) == page
    assert torch.tensor(record["scores"]["dlp"]["3"]["right"]).shape == (record["prompts"]["3"], 3)
