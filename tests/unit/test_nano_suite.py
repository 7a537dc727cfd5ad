"""The nano suite: seeded, disjoint, balanced; its lm-eval files agree with it."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import yaml

from dlplora.errors import TaskError
from dlplora.tasks import lm_eval_dir
from dlplora.tasks.nano import lexicon as lx
from dlplora.tasks.nano import nano_candidates, nano_suite
from dlplora.tasks.nano.world_text import documents
from dlplora.tasks.registry import get_suite

TASKS = nano_suite().tasks


def test_the_suite_is_eighteen_and_eight() -> None:
    assert Counter(task.kind for task in TASKS) == {"mcq": 18, "gen": 8}
    assert len(set(nano_suite().names)) == 26


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_splits_are_reproducible_and_disjoint(task) -> None:
    splits = {split: task.items(split, 120) for split in ("train", "validation", "test")}
    assert splits["train"] == task.items("train", 120)
    assert task.items("train", 120, seed=1) != splits["train"]
    prompts = {split: {item.prompt for item in items} for split, items in splits.items()}
    assert not prompts["train"] & prompts["validation"]
    assert not prompts["train"] & prompts["test"]
    assert not prompts["validation"] & prompts["test"]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_the_last_phrasing_is_held_out(task) -> None:
    assert len(task.phrasings) >= 4
    last = len(task.phrasings) - 1
    assert {item.phrasing for item in task.items("train", 200)} == set(range(last))
    assert {item.phrasing for item in task.items("test", 50)} == {last}


@pytest.mark.parametrize("task", [task for task in TASKS if task.kind == "mcq"], ids=lambda task: task.name)
def test_answer_positions_are_balanced_and_labels_nearly(task) -> None:
    items = task.items("test", 240)
    options = len(items[0].choices)
    assert set(Counter(item.gold for item in items).values()) == {240 // options}
    for item in items:
        assert item.choices[item.gold] == item.answer
        assert len(set(item.choices)) == options
    answers = Counter(item.answer for item in items)
    if len(answers) <= 4:  # a fixed label set: no label is a good guess (three standard deviations)
        assert max(answers.values()) / 240 < 1 / len(answers) + 3 * (0.25 / 240) ** 0.5


def test_prompts_never_end_with_a_space_and_answers_never_start_with_one() -> None:
    for task in TASKS:
        for item in task.items("train", 20):
            assert item.prompt == item.prompt.rstrip()
            assert item.answer == item.answer.strip()


def test_held_out_nouns_do_not_occur_in_training() -> None:
    held_out = set(lx.nouns(True))
    for name in ("shelf_sorting", "warehouse_codes", "pick_tool"):
        for item in nano_suite().task(name).items("train", 300):
            assert not held_out & set(re.findall(r"\w+", item.prompt))


def test_two_tasks_label_the_same_words_differently() -> None:
    def labels(name: str) -> dict[str, str]:
        pairs = {}
        for item in nano_suite().task(name).items("train", 2500):
            pairs |= {noun: item.answer for noun in re.findall(r"\w+", item.prompt) if noun in lx.CATEGORY_OF}
        return pairs

    shelf, warehouse = labels("shelf_sorting"), labels("warehouse_codes")
    common = shelf.keys() & warehouse.keys()
    assert len(common) > 80
    assert sum(shelf[noun] != warehouse[noun] for noun in common) / len(common) > 0.7


def test_translation_by_hand() -> None:
    words = lx.DICTIONARY["Zargi"]
    assert lx.translate("Zargi", "the cat sees the hat") == " ".join(
        [words["the"], words["cat"], words["sees"], words["the"], words["hat"]]
    )
    every = [word for language in lx.DICTIONARY.values() for word in language.values()]
    assert len(every) == len(set(every))


def test_pretraining_text_holds_no_task_prompt_with_an_answer() -> None:
    text = documents(4000, 0)
    endings = {document for document in text if "Answer:" in document}
    answered = [document.replace("§", "") for document in endings if not document.endswith("Answer:")]
    starts = []
    for task in nano_candidates():
        for template in task.phrasings:
            fixed = [part for part in re.split(r"\{\w+\}", template.removesuffix("\nAnswer:")) if len(part.split()) >= 3]
            starts += [part.strip() for part in fixed]
    assert len(answered) > 300
    for document in answered:
        assert not [part for part in starts if part in document], document


def test_lm_eval_files_agree_with_the_suite() -> None:
    folder = lm_eval_dir() / "nano"
    for task in TASKS:
        config = yaml.safe_load((folder / f"{task.name}.yaml").read_text())
        assert config["task"] == f"dlplora_nano_{task.name}"
        assert config["include"] == f"_{task.kind}.yaml"
        assert config["dataset_kwargs"] == {"task": task.name}
        assert float(config["metadata"]["version"]) == float(task.version)
    named = {kind: yaml.safe_load((folder / f"_group_{kind}.yaml").read_text())["task"] for kind in ("mcq", "gen")}
    assert named == {kind: [f"dlplora_nano_{task.name}" for task in TASKS if task.kind == kind] for kind in ("mcq", "gen")}
    on_disk = {path.stem for path in folder.glob("*.yaml") if not path.stem.startswith("_")}
    assert on_disk == set(nano_suite().names)


def test_unknown_names_have_hints() -> None:
    with pytest.raises(TaskError, match="Did you mean 'shelf_sorting'"):
        nano_suite().task("shelf_sortin")
    with pytest.raises(TaskError, match="unknown suite"):
        get_suite("nan")
