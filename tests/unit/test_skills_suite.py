"""The skills suite: seeded, disjoint, balanced; its answers recomputed by other code; its pairs conflict."""

from __future__ import annotations

import re
from collections import Counter
from datetime import datetime
from pathlib import Path
from random import Random

import pytest
import yaml

from dlplora.errors import TaskError
from dlplora.tasks import lm_eval_dir
from dlplora.tasks.registry import get_suite
from dlplora.tasks.skills import CONFUSABLE, conflicting, skills_candidates, skills_suite
from dlplora.tasks.skills import words as w
from dlplora.tasks.types import Item

TASKS = {task.name: task for task in skills_candidates()}
ROWS = 400
ANSWER_WORDS = 8
PAGE = Path(__file__).parents[2] / "docs" / "real26_suite.md"


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, list[Item]]]:
    return {
        name: {"train": task.items("train", ROWS), "validation": task.items("validation", 100), "test": task.items("test", 200)}
        for name, task in TASKS.items()
    }


def test_the_suite_has_both_kinds_and_the_registry_knows_it() -> None:
    kinds = Counter(task.kind for task in skills_candidates())
    assert kinds["mcq"] >= 14
    assert kinds["gen"] >= 8
    assert len(TASKS) == len(skills_candidates())
    assert get_suite("skills") is skills_suite()
    assert set(skills_suite().names) <= set(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_splits_are_reproducible_disjoint_and_without_repetition(name: str, rows) -> None:
    task = TASKS[name]
    assert task.items("train", 40) == rows[name]["train"][:40]
    assert task.items("train", 40, seed=1) != rows[name]["train"][:40]
    prompts = {split: [item.prompt for item in items] for split, items in rows[name].items()}
    together = [prompt for split in prompts.values() for prompt in split]
    assert len(set(together)) == len(together)


@pytest.mark.parametrize("name", TASKS)
def test_the_last_wording_is_held_out(name: str, rows) -> None:
    task = TASKS[name]
    last = len(task.phrasings) - 1
    assert 4 <= len(task.phrasings) <= 6
    assert {item.phrasing for split in ("train", "validation") for item in rows[name][split]} == set(range(last))
    assert {item.phrasing for item in rows[name]["test"]} == {last}


def test_held_out_people_and_cities_do_not_occur_in_training(rows) -> None:
    entities = {*w.FIRST_NAMES, *w.CITIES}
    seen = {
        split: [set(re.findall(r"\w+", item.prompt)) & entities for name in TASKS for item in rows[name][split]]
        for split in ("train", "test")
    }
    train, test = (set.union(*seen[split]) for split in ("train", "test"))
    assert len(train) > 30
    assert len(test) > 20
    assert not train & test


@pytest.mark.parametrize("name", TASKS)
def test_prompts_and_answers_are_short_and_keep_the_text_convention(name: str, rows) -> None:
    for item in (item for items in rows[name].values() for item in items):
        assert len(item.prompt.split()) <= 70
        assert item.prompt == item.prompt.strip()
        assert "{" not in item.prompt
        assert "<" not in item.prompt
        for text in (item.answer, *(item.choices or ())):
            assert text
            assert text == text.strip()
            assert "\n" not in text
            assert len(text.split()) <= ANSWER_WORDS


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.kind == "mcq"])
def test_no_option_or_position_is_a_good_guess(name: str, rows) -> None:
    for split in ("train", "test"):
        items = rows[name][split]
        options = len(items[0].choices)
        assert 2 <= options <= 4
        positions = Counter(item.gold for item in items)
        assert max(positions.values()) - min(positions.values()) <= 1
        assert max(Counter(item.answer for item in items).values()) <= 0.4 * len(items)
    for item in rows[name]["train"]:
        assert item.choices[item.gold] == item.answer
        assert len(set(item.choices)) == len(item.choices)
        assert max(map(len, item.choices)) - min(map(len, item.choices)) <= 8


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.kind == "gen"])
def test_no_generated_answer_is_frequent(name: str, rows) -> None:
    assert max(Counter(item.answer for item in rows[name]["test"]).values()) <= 0.05 * 200


def test_listed_options_are_not_listed_answer_first(rows) -> None:
    """Where the text lists the options, the order in the text comes from the rule and the order of the choices from the generator."""
    for name in ("tray_next", "folder_next", "roster_day", "roster_night"):
        for place in range(3):
            hits = [item.choices[place] == _listed(item)[place] for item in rows[name]["train"]]
            assert 0.1 < sum(hits) / len(hits) < 0.6


def _listed(item: Item) -> list[str]:
    return sorted(item.choices, key=lambda choice: re.search(rf"\b{choice}\b", item.prompt).start())


@pytest.mark.parametrize(("first", "second"), conflicting())
def test_a_conflicting_pair_reads_the_same_text_and_never_agrees(first: str, second: str) -> None:
    for seed in range(200):
        one, other = (TASKS[name].draw(Random(seed), seed % 2 == 1) for name in (first, second))
        if (first, second) != ("tag_color", "tag_use"):  # there the examples in the text differ: they are the rule
            assert one.fields == other.fields
        else:
            assert one.fields["s"] == other.fields["s"]
        assert one.answer != other.answer
        assert one.choices is None or set(one.choices) == set(other.choices)


def test_confusable_pairs_conflict() -> None:
    assert len(CONFUSABLE) >= 3
    assert set(CONFUSABLE) <= set(conflicting())


def _every(rows, name: str) -> list[Item]:
    return [item for items in rows[name].values() for item in items]


def test_dates_by_the_standard_library(rows) -> None:
    for name, form in (("date_archive", "%Y-%m-%d"), ("date_invoice", "%d.%m.%Y"), ("date_letter", "%d %B %Y")):
        for item in _every(rows, name):
            found = re.search(r"[A-Z][a-z]{2} \d{1,2},? \d{4}", item.prompt).group()
            expected = datetime.strptime(found.replace(",", ""), "%b %d %Y").strftime(form)
            assert item.answer == (expected.removeprefix("0") if name == "date_letter" else expected)


def test_mail_cards_by_reading_the_header(rows) -> None:
    for name, key in (("mail_sender", "From"), ("mail_receiver", "To")):
        for item in _every(rows, name):
            first, last = re.search(rf"^{key}: (\w+) (\w+)$", item.prompt, re.M).groups()
            assert item.answer == f"{last}, {first}"


def test_prices_and_invoice_items_by_pattern(rows) -> None:
    codes = {"euros": "EUR", "pounds": "GBP", "dollars": "USD", "francs": "CHF"}
    for name in ("price_tag", "price_ledger"):
        for item in _every(rows, name):
            whole, cents, currency = re.search(r"(\d+)\.(\d\d) (\w+)", item.prompt).groups()
            code = codes[currency]
            assert item.answer == (f"{code} {whole},{cents}" if name == "price_tag" else f"{whole}-{cents} {code}")
    for item in _every(rows, "invoice_item"):
        number, color, thing = re.search(r"[A-Z]\w+, (\w+) (\w+) ([\w-]+), \d+\.\d\d each", item.prompt).groups()
        assert item.answer == f"{thing}, {color}: {number}"


def test_positions_of_papers_and_shifts(rows) -> None:
    for name, place in (("tray_next", 2), ("folder_next", 0)):
        for item in _every(rows, name):
            assert item.answer == re.findall(r"the (\w+)", re.search(r"the \w+, the \w+ and the \w+", item.prompt).group())[place]
    for name, place in (("roster_day", 0), ("roster_night", 1)):
        for item in _every(rows, name):
            crews = dict(re.findall(r"(\w+): (\w+, \w+)", item.prompt))
            asked = [city for city in crews if item.prompt.count(city) == 2]
            assert len(crews) == 2
            assert len(asked) == 1
            assert item.answer == crews[asked[0]].split(", ")[place]


def test_visits_by_weekday_and_hour(rows) -> None:
    days = {"Monday": "yard", "Tuesday": "hall", "Wednesday": "garden", "Thursday": "tower", "Friday": "hall", "Saturday": "yard"}
    for item in _every(rows, "visit_day"):
        assert item.answer == days[re.search(r"[A-Z]\w+day", item.prompt).group()]
    for item in _every(rows, "visit_hour"):
        clock = datetime.strptime(re.search(r"\d+:\d\d", item.prompt).group(), "%H:%M")
        bounds = ((10, "tower"), (13, "yard"), (16, "hall"), (19, "garden"))
        assert item.answer == next(door for bound, door in bounds if clock.hour < bound)


@pytest.mark.parametrize("language", ["Velka", "Ormu"])
def test_translation_is_word_by_word_and_one_to_one(language: str, rows) -> None:
    """The dictionary is read off the training rows; it has twelve words, and it explains every test row."""
    dictionary: dict[str, str] = {}
    for item in rows[f"translate_{language.lower()}"]["train"]:
        for english, word in zip(_sentence(item), item.answer.split(), strict=True):
            assert dictionary.setdefault(english, word) == word
    assert len(dictionary) == len(set(dictionary.values())) == 12
    for item in rows[f"translate_{language.lower()}"]["test"]:
        assert item.answer == " ".join(dictionary[word] for word in _sentence(item))


def _sentence(item: Item) -> list[str]:
    words = "old small red wise dog king child bird sees finds helps calls".split()
    return [word for word in re.findall(r"[a-z]+", item.prompt) if word in words]


def test_titles_and_register_entries(rows) -> None:
    for item in _every(rows, "title_slug"):
        start, subject, kind = item.answer.split("-")[::-1]
        assert f"{start} {subject} {kind}".title() in item.prompt
    for item in _every(rows, "name_index"):
        first, last, city = re.search(r"(\w+) (\w+) from (\w+)", item.prompt).groups()
        assert item.answer == f"{last} {first[0]}. / {city}"


@pytest.mark.parametrize(
    ("first", "second", "cue"),
    [
        ("ticket_desk", "ticket_queue", r"My ([a-zA-Z -]+?) (?:is|was|does|has|no|keeps|stopped|must|came|got|makes|shows|overheats)"),
        ("review_grade", "review_aisle", r"\ban? ([\w-]+)(?: by|\.|:)"),
    ],
)
def test_a_label_depends_on_its_cue_alone(first: str, second: str, cue: str, rows) -> None:
    """Under the task that sorts by the thing named, a thing has one label; under the other it has several."""
    by_thing = second if first == "review_grade" else first
    for name in (first, second):
        labels: dict[str, set[str]] = {}
        for item in rows[name]["train"]:
            found = re.search(cue, item.prompt)
            if found:
                labels.setdefault(found.group(1), set()).add(item.answer)
        assert len(labels) > 15
        assert all(len(own) == 1 for own in labels.values()) == (name == by_thing)


def _example(item: Item) -> str:
    """One line of the table on the page."""
    options = "" if item.choices is None else ", ".join(sorted(item.choices))
    prompt = item.prompt.replace("\n", "<br>")
    return f"| {item.task} | {prompt} | {item.answer} | {options} |"


def test_the_page_shows_the_first_test_row_of_every_task(rows) -> None:
    shown = PAGE.read_text(encoding="utf-8").partition("<!-- dlplora:skills:begin -->\n")[2].partition("<!-- dlplora:skills:end -->")[0]
    lines = ["| task | prompt | answer | options |", "|---|---|---|---|"]
    assert shown.splitlines() == lines + [_example(rows[name]["test"][0]) for name in skills_suite().names]


def test_lm_eval_files_agree_with_the_suite() -> None:
    folder = lm_eval_dir() / "skills"
    for task in skills_suite().tasks:
        config = yaml.safe_load((folder / f"{task.name}.yaml").read_text())
        assert config == {
            "include": f"_{task.kind}.yaml",
            "task": f"dlplora_skills_{task.name}",
            "dataset_kwargs": {"task": task.name},
            "metadata": {"version": float(task.version)},
        }
    named = {kind: yaml.safe_load((folder / f"_group_{kind}.yaml").read_text())["task"] for kind in ("mcq", "gen")}
    assert named == {kind: [f"dlplora_skills_{task.name}" for task in skills_suite().tasks if task.kind == kind] for kind in ("mcq", "gen")}
    assert {path.stem for path in folder.glob("*.yaml") if not path.stem.startswith("_")} == set(skills_suite().names)


def test_the_confusable_pairs_are_a_suite() -> None:
    suite = get_suite("skills_confusable")
    assert suite.names == tuple(name for pair in CONFUSABLE for name in pair)
    assert all(suite.task(name) == get_suite("skills").task(name) for name in suite.names)
    with pytest.raises(TaskError, match="has no task 'date_archive'"):
        suite.task("date_archive")
