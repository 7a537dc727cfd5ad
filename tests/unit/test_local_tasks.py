"""Local JSONL tasks: good rows become items, bad rows are named by file and line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dlplora.errors import TaskError
from dlplora.tasks.registry import get_suite

REAL = os.environ.get("DLPLORA_DATA") or str(Path(__file__).resolve().parents[3] / "shared" / "data" / "real")


def write(root: Path, task: str, split: str, rows: list[object]) -> Path:
    path = root / task / f"{split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_rows_become_items_and_splits_do_not_overlap(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}? ", "choices": ["a", " b "], "answer": i % 2, "task": "t"} for i in range(20)]
    write(tmp_path, "t", "train", rows)
    write(tmp_path, "t", "test", [{"question": "z", "choices": ["a", "b"], "answer": 1}])
    task = get_suite("local:t", str(tmp_path)).task("t")
    train, validation = task.items("train", 99), task.items("validation", 99)
    assert (task.kind, len(train), len(validation)) == ("mcq", 18, 2)
    assert not {item.prompt for item in train} & {item.prompt for item in validation}
    item = next(item for item in train if item.prompt == "q1?")
    assert (item.answer, item.gold, item.choices) == ("b", 1, ("a", "b"))


@pytest.mark.parametrize(
    ("options", "answer", "gold"),
    [
        (["yes", "no"], 1, 1),
        (["yes", "no"], " no ", 1),
        (["Yes", "No"], "no", 1),
        (["p", "P"], "P", 1),
        (["red", "blue"], "B", 1),
        (["red", "blue"], "(a)", 0),
        (["red", "blue"], "b.", 1),
        (["B", "A"], "A", 1),  # a text before a letter
        ([10, 1], "1", 1),
        ([10, 1], 1, 1),
    ],
)
def test_options_and_answers_as_users_write_them(tmp_path: Path, options: list[object], answer: object, gold: int) -> None:
    for column in ("choices", "options"):
        write(tmp_path, column, "test", [{"question": "q", column: options, "answer": answer, "id": 7}])
        task = get_suite(f"local:{column}", str(tmp_path)).task(column)
        assert task.kind == "mcq"
        (item,) = task.items("test", 1)
        assert (item.gold, item.answer, item.choices) == (gold, str(options[gold]), tuple(map(str, options)))


def test_rows_in_train_and_test_are_counted_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"question": f"q{i}", "options": ["a", "b"], "answer": i % 2} for i in range(20)]
    write(tmp_path, "leaky", "train", rows)  # the last two are the validation split
    write(tmp_path, "leaky", "test", [*rows[15:], {"question": "q0", "options": ["a", "b"], "answer": "B"}, {**rows[1], "answer": "B"}])
    write(tmp_path, "sound", "train", rows)
    write(tmp_path, "sound", "test", [{"question": "new", "options": ["a", "b"], "answer": 0}])
    for name in ("local:all", "local:leaky", "local:sound"):
        get_suite(name, str(tmp_path))
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'leaky'}: 6 of 7 rows of test.jsonl are also in train.jsonl; scores are too high."
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not JSON"),
        ([1], "expected an object"),
        ({"answer": "x"}, "'question' is missing"),
        ({"question": "x"}, "'answer' is missing"),
        ({"question": " ", "answer": "x"}, "'question' is empty"),
        ({"question": "x", "choices": ["a", "b"], "answer": 2}, "index from 0 to 1, a letter from A to B or the text of one option, got 2"),
        ({"question": "x", "choices": ["a", "b"], "answer": "c"}, 'text of one option, got "c"'),
        ({"question": "x", "choices": ["p", "q"], "answer": "1"}, 'text of one option, got "1"'),  # the first or the second?
        ({"question": "x", "choices": ["pQ", "Pq"], "answer": "PQ"}, "text of one option"),
        ({"question": "x", "choices": ["p", "p"], "answer": "p"}, "text of one option"),
        ({"question": "x", "choices": ["p", "q"], "answer": True}, "text of one option, got true"),
        ({"question": "x", "options": ["a"], "answer": 0}, "'options' must be a list of at least two options"),
        ({"question": "x", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answer": "A"}, "'choices' must be a list"),
        ({"question": "x", "choices": ["a", "b"], "options": ["a", "b"], "answer": 0}, "are the same column"),
        *(
            ({"question": "x", column: ["a", "b"], "answer": 0}, f"column '{column}' is not read. A row needs question and answer and, for")
            for column in ("Choices", "option", "candidates", "endings", "A", "option_a", "mc_options")
        ),
        ({"question": "x", "choices": ["a"], "answer": 0}, "at least two"),
        ({"question": "x", "answer": {"no": 1}}, "'answer' must be text"),
        ({"question": "x", "answer": float("nan")}, "field 'answer' is nan"),
        ({"question": "x\ud800", "answer": "x"}, "half of a surrogate pair"),
        ("[" * 100_000, "nested too deeply"),
        ('{"question": "x", "answer": ' + "9" * 5_000 + "}", "5000 digits"),
        ({"question": "x", "choices": ["", ""], "answer": 0}, "option 0 of 'choices' is empty"),
        ({"question": "x", "choices": ["a", " "], "answer": 0}, "option 1 of 'choices' is empty"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path: Path, row: object, message: str) -> None:
    path = write(tmp_path, "t", "test", [{"question": "fine", "choices": ["a", "b"], "answer": 0}, row])
    with pytest.raises(TaskError) as caught:
        get_suite("local:t", str(tmp_path))
    assert f"{path}:2" in str(caught.value)
    assert message in str(caught.value)


def test_rows_in_another_encoding_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, "t", "test", [{"question": "fine", "answer": "x"}])
    path.write_bytes(path.read_bytes().rstrip() + b'\n{"question": "caf\xe9", "answer": "x"}\n')
    with pytest.raises(TaskError, match=r"test.jsonl:2: not UTF-8 \(byte 18\)"):
        get_suite("local:t", str(tmp_path))


def test_missing_things_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DLPLORA_DATA", raising=False)
    with pytest.raises(TaskError, match="--data-root"):
        get_suite("local:t", None)
    with pytest.raises(TaskError, match="not found"):
        get_suite("local:t", str(tmp_path / "none"))
    write(tmp_path, "task_a", "test", [{"question": "q", "answer": "a"}])
    with pytest.raises(TaskError, match="Did you mean 'task_a'"):
        get_suite("local:task_b", str(tmp_path))
    for name in ("local:../task_a", "local:", "local:task_a,,b"):
        with pytest.raises(TaskError, match="is not a task name; write local:all, or names of folders"):
            get_suite(name, str(tmp_path))
    assert get_suite("local: task_a ", str(tmp_path)).names == ("task_a",)
    for name, hint in (("local", "local:all"), ("task_a", "local:task_a"), ("nanoo", "nano"), ("real_26", "real26")):
        with pytest.raises(TaskError, match=f"unknown suite '{name}'. Did you mean '{hint}'"):
            get_suite(name, str(tmp_path))


def test_rows_that_changed_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long-lived process must not score the rows of another folder, or of yesterday, under the checksum of today's."""
    for place, question in (("one", "q"), ("two", "other")):
        write(tmp_path / place, "winowhy", "train", [{"question": f"{question}{i}", "choices": ["a", "b"], "answer": 0} for i in range(9)])
        write(tmp_path / place, "winowhy", "test", [{"question": question, "choices": ["a", "b"], "answer": 0}])

    def asked() -> list[str]:
        return [get_suite(name).task("winowhy").items("test", 1)[0].prompt.split("\n")[0] for name in ("local:winowhy", "paper_local")]

    monkeypatch.setenv("DLPLORA_DATA", str(tmp_path / "one"))
    assert get_suite("local:winowhy") is get_suite("local:winowhy")
    assert asked() == ["q", "q"]
    monkeypatch.setenv("DLPLORA_DATA", str(tmp_path / "two"))
    assert asked() == ["other", "other"]
    write(tmp_path / "two", "winowhy", "test", [{"question": "changed", "choices": ["a", "b"], "answer": 0}])
    assert asked() == ["changed", "changed"]


@pytest.mark.skipif(not Path(REAL).is_dir(), reason="no folder of real rows beside the project (set DLPLORA_DATA)")
def test_every_real_task_loads() -> None:
    suite = get_suite("local:all", REAL)
    assert len(suite.tasks) >= 3
    for task in suite.tasks:
        assert task.items("test", 5)
