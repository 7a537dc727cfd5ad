"""Composite-n: what is asked, what counts as an answer, and who writes the form."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from dlplora.errors import ConfigError, GenerationError, TaskError
from dlplora.lm_eval.answer_form import AnswerForm, require_whole
from dlplora.methods.registry import load_method_spec, resolved_params
from dlplora.tasks.composite import Part, composite_row, composites, concat, parse_answers, serial, worked_examples
from dlplora.tasks.composite_metrics import composite_metrics
from dlplora.tasks.composite_rows import read_composites
from dlplora.tasks.export import export_local
from dlplora.tasks.registry import get_suite

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "composite.json"
METEORA = Path(__file__).resolve().parents[3] / "shared" / "data" / "real" / "composite_10" / "test.jsonl"
PARTS = (
    Part("a", 0, "Who?\nAnswer:", "Mia Lee", "gen"),
    Part("b", 3, "Is it red?\nAnswer:", "yes", "mcq"),
    Part("c", 1, "Say it in Tepak: cow.", "ta", "gen"),
)


@pytest.mark.parametrize("n", [3, 5, 10])
@pytest.mark.parametrize("reading", ["mixture", "concat", "serial"])
def test_golden_examples(reading: str, n: int) -> None:
    """Frozen; ``python tests/golden/composite.py`` writes them again after a change that is wanted."""
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))[f"{reading}_{n}"]
    row = composite_row(composites(get_suite("nano"), reading, n, 2, seed=0)[0])
    assert {key: row[key] for key in golden} == golden


def test_forms_of_the_readings() -> None:
    one = concat(PARTS)
    assert one.prompt == "Who?\nAnswer:\n\nIs it red?\nAnswer:\n\nSay it in Tepak: cow."
    assert one.form == ("", "\nAnswer:", "\n")
    assert one.target == "Mia Lee\nAnswer: yes\n ta"
    listed = serial(PARTS[:2], [PARTS[1:], PARTS[:1]])
    assert listed.prompt == (
        "Example 1:\n\n1. Is it red?\nAnswer:\n\n2. Say it in Tepak: cow.\n\nAnswers:\n1. yes\n2. ta\n\n"
        "Example 2:\n\n1. Who?\nAnswer:\n\nAnswers:\n1. Mia Lee\n\nQuestions:\n\n1. Who?\nAnswer:\n\n2. Is it red?\nAnswer:\n\nAnswers:"
    )
    assert listed.form == ("\n1.", "\n2.")


def test_draws_are_repeatable_paired_and_traceable() -> None:
    suite = get_suite("nano")
    first, again, other = (composites(suite, "concat", 5, 8, seed) for seed in (0, 0, 1))
    assert first == again != other
    for one, listed in zip(first, composites(suite, "serial", 5, 8), strict=True):
        assert one.parts == listed.parts
    stream = composites(suite, "mixture", 5, 8)
    assert Counter(one.parts[0] for one in stream) == Counter(part for one in first for part in one.parts)
    assert [one.parts[0] for one in stream] != [part for one in first for part in one.parts]
    items = {task.name: task.items("test", 100) for task in suite.tasks}
    for one in first:
        assert len({part.task for part in one.parts}) == 5
        for part in one.parts:
            item = items[part.task][part.index]
            assert (part.question, part.answer) == (item.prompt, item.answer)
    train = [part for example in worked_examples(suite, first[0].parts, 0) for part in example]
    assert {part.split for part in train} == {"train"}
    assert all(suite.task(part.task).items("train", 100)[part.index].prompt == part.question for part in train)


TEXTS = {
    "in order": ("concat", " Mia Lee\nyes\nta", False, ["Mia Lee", "yes", "ta"]),
    "echoed cue": ("concat", "Answer: Mia Lee\nAnswer: yes\nta", False, ["Mia Lee", "yes", "ta"]),
    "blank lines between": ("concat", "Mia Lee\n\nyes\n\nta\n", False, ["Mia Lee", "yes", "ta"]),
    "a slot left empty": ("concat", "\nAnswer: yes\nta", True, [None, "yes", "ta"]),
    "too few": ("concat", "Mia Lee", False, ["Mia Lee", None, None]),
    "too many": ("concat", "a\nb\nc\nd", False, ["a", "b", "c"]),
    "numbers": ("serial", "\n1. Mia Lee\n2. yes\n3. ta", True, ["Mia Lee", "yes", "ta"]),
    "a number left out": ("serial", "1. Mia Lee\n3. ta", True, ["Mia Lee", None, "ta"]),
    "an empty number": ("serial", "\n1.\n2. yes\n3.", True, [None, "yes", None]),
    "a stray list behind": ("serial", "1. a\n2. b\n3. c\n1. d", True, ["a", "b", "c"]),
    "a number inside an answer": ("serial", "1. take 2. and 3.\n2. yes\n3. ta", True, ["take 2. and 3.", "yes", "ta"]),
    "more lines than asked": ("serial", "1. a\nmore\n2. b\n9. x", True, ["a", "b", None]),
    "nothing": ("serial", "", True, [None, None, None]),
}


@pytest.mark.parametrize("name", TEXTS)
def test_parsing(name: str) -> None:
    reading, text, filled, expected = TEXTS[name]
    assert parse_answers(text, reading, PARTS, filled) == expected


def test_scores_by_question() -> None:
    doc = composite_row(concat(PARTS))
    scores = composite_metrics(doc, ["Mia Lee\nAnswer: no"])
    assert scores == pytest.approx(
        {
            "exact_match": 1 / 3, "gen_exact_match": 0.5, "mcq_exact_match": 0.0, "exact_match_a": 1.0, "exact_match_b": 0.0,
            "exact_match_c": 0.0, "rougeL": 1 / 3, "answered": 2 / 3, "all_correct": 0.0,
        }
    )  # fmt: skip
    assert composite_metrics(doc, [concat(PARTS).target])["all_correct"] == 1.0


def test_a_perfect_text_scores_one_in_every_reading() -> None:
    for reading in ("mixture", "concat", "serial"):
        for form in ("fill", "free"):
            for one in composites(get_suite("nano"), reading, 10, 3):
                scores = composite_metrics(composite_row(one, form), [one.target])
                assert set(scores.values()) == {1.0}


def test_the_form_is_written_for_every_row_on_its_own(tiny_tokenizer: Any) -> None:
    """A model that always wants to end its text: every answer but the last is followed by the next form, the last by the end."""
    end, newline = 2, tiny_tokenizer("\n", add_special_tokens=False)["input_ids"][0]
    word = tiny_tokenizer(" cat", add_special_tokens=False)["input_ids"][0]
    processor = AnswerForm([("", "\none:", "\ntwo:"), None, ("\n1.", "\n2.")], tiny_tokenizer, 1)
    rows = [[1], [1], [1]]
    for step in range(14):
        scores = torch.full((3, len(tiny_tokenizer)), -10.0)
        scores[:, word] = 5.0 if step % 2 == 0 else -5.0
        scores[:, end] = 4.0
        tokens = processor(torch.tensor(rows), scores).argmax(dim=-1).tolist()
        rows = [[*row, token] for row, token in zip(rows, tokens, strict=True)]
    said = [tiny_tokenizer.decode(row[1 : row.index(end) if end in row else None]).strip(" ") for row in rows]
    assert said[0].count("\none:") == said[0].count("\ntwo:") == 1
    assert said[0].index("\none:") < said[0].index("\ntwo:")
    assert said[1] == "cat"
    assert said[2].startswith("\n1.")
    assert said[2].count("\n2.") == 1
    assert newline in rows[0]


def test_forms_that_cannot_be_written_are_refused(tiny_tokenizer: Any) -> None:
    with pytest.raises(GenerationError, match="must begin with a line break, got 'two:'"):
        AnswerForm([("", "two:")], tiny_tokenizer, 1)


def test_prompts_that_do_not_fit_are_refused() -> None:
    doc = composite_row(concat(PARTS))
    require_whole(doc, 100, 100, 20)
    require_whole({"question": "x"}, 101, 100, 20)
    with pytest.raises(GenerationError, match="a concat prompt of 3 questions has 101 tokens and asks for 20 more, but the context is 120"):
        require_whole(doc, 101, 100, 20)


def test_bad_requests() -> None:
    suite = get_suite("nano")
    with pytest.raises(TaskError, match="unknown form 'list'"):
        composites(suite, "list", 3, 1)
    with pytest.raises(TaskError, match="a composite of 30 needs 30 tasks with test rows; suite 'nano' has 26"):
        composites(suite, "concat", 30, 1)
    with pytest.raises(TaskError, match="at least 1, got 3 and 0"):
        composites(suite, "concat", 3, 0)
    with pytest.raises(TaskError, match="unknown answer form 'given'"):
        composite_row(concat(PARTS), "given")  # type: ignore[arg-type]
    with pytest.raises(TaskError, match="has test rows only"):
        get_suite("nano_composite").task("concat_3").items("train", 1)
    with pytest.raises(ConfigError, match="'view' must be Literal"):
        load_method_params("view", "all")


def load_method_params(key: str, value: str) -> dict[str, Any]:
    return resolved_params(load_method_spec("dlp", {key: value}))


@pytest.mark.parametrize("key", ["view", "prompt_routing", "kv_policy", "reroute"])
def test_settings_of_dlp_are_checked(key: str) -> None:
    with pytest.raises(ConfigError, match=f"'{key}' must be"):
        load_method_params(key, "nonsense")


def test_new_settings_leave_old_records_what_they_were() -> None:
    assert not {"prompt_routing", "kv_policy"} & set(resolved_params(load_method_spec("dlp")))
    assert resolved_params(load_method_spec("dlp_composite"))["kv_policy"] == "recompute"
    assert resolved_params(load_method_spec("oracle")) == {}


def rows_of(tmp_path: Path) -> Path:
    for task in ("one", "two", "three"):
        (tmp_path / task).mkdir()
        for split in ("train", "test"):
            lines = [json.dumps({"question": f"{task}\n\n{i}?", "answer": f"{task}\n{i}"}) for i in range(4)]
            (tmp_path / task / f"{split}.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_local_tasks_have_composites(tmp_path: Path) -> None:
    root = rows_of(tmp_path)
    suite = get_suite("local_composite:one,two,three", str(root))
    assert suite.name == "local_composite"
    assert suite.names == ("mixture_3", "concat_3", "serial_3")
    (row,) = composites(suite.source, "concat", 3, 1)  # type: ignore[arg-type]
    assert "\n\n" not in row.parts[0].question
    assert "\n" not in row.parts[0].answer
    written = {path.stem for path in export_local(["one", "two", "three"], str(root), tmp_path / "out")}
    assert {"_composite_mixture_3", "_composite_concat_3", "_composite_serial_3", "_composite_group"} <= written


def test_ready_made_composites(tmp_path: Path) -> None:
    good = {"prompt": "[INST] q [/INST]\n\n\n", "response": "a", "subtasks": [{"task": "t", "question": "q", "answer": "a"}]}
    path = tmp_path / "made" / "test.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps(good) + "\n")
    (one,) = read_composites(path)
    assert (one.prompt, one.form, one.target) == ("[INST] q [/INST]", ("\n1.",), "1. a")
    assert [file.stem for file in export_local(["made"], str(tmp_path), tmp_path / "out")] == ["_group", "made"]
    for change, message in (
        ({"subtasks": 3}, "'subtasks' must be a list"),
        ({"prompt": ""}, "field 'prompt' is missing or empty"),
        ({"subtasks": [{"task": "t", "question": "q"}]}, "subtask 0 has no 'answer'"),
    ):
        path.write_text(json.dumps(good) + "\n" + json.dumps({**good, **change}) + "\n")
        with pytest.raises(TaskError, match=rf"test\.jsonl:2: .*{message}"):
            read_composites(path)


def test_meteoras_own_rows_are_read() -> None:
    from dlplora.inference.prompt_routing import asked_questions

    if not METEORA.is_file():
        pytest.skip("MeteoRA's composite rows are not beside the checkout (../shared/data/real/composite_10)")
    rows = read_composites(METEORA)
    assert len(rows) == 60
    for row in rows:
        asked = asked_questions(row.prompt)
        assert asked.answers == "numbered"
        assert [text.split() for text in asked.texts(row.prompt)] == [part.question.split() for part in row.parts]
        assert parse_answers(row.target, "serial", row.parts, True) == [part.answer for part in row.parts]
