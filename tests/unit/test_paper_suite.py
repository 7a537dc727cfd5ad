"""The paper's tasks: the list, the YAML files, the splits, local rows and the hub's cache."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dlplora.cli.main import main
from dlplora.config import configs_root, load_yaml
from dlplora.errors import TaskError
from dlplora.evaluation.protocol import load_protocol
from dlplora.tasks import lm_eval_dir
from dlplora.tasks.paper import paper_suite, with_options
from dlplora.tasks.paper.hub import convert
from dlplora.tasks.paper.judging import judged
from dlplora.tasks.paper.sources import LEFT_OUT_OF_26, PAPER26, SOURCES, source_of
from dlplora.tasks.paper.splits import Splits, SplitSettings, draw_splits, stem
from dlplora.tasks.registry import get_suite
from dlplora.tasks.types import Item

REAL = os.environ.get("DLPLORA_DATA") or str(Path(__file__).resolve().parents[3] / "shared" / "data" / "real")
FOLDER = lm_eval_dir() / "paper"


def rows(root: Path, task: str, split: str, lines: list[Any]) -> Path:
    path = root / task / f"{split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def gsm8k(number: int) -> dict[str, str]:
    return {"question": f"What is {number} + 1?", "answer": f"It is {number + 1}\n#### {number + 1}"}


def winowhy(number: int) -> dict[str, Any]:
    return {"question": f"Reason {number}. The above reasoning is", "choices": ["correct", "incorrect"], "answer": number % 2}


def test_the_list_is_28_tasks_of_which_26_are_taken() -> None:
    names = [source.name for source in SOURCES]
    assert len(set(names)) == 28
    assert names == sorted(names)
    assert len(PAPER26) == 26
    assert set(names) - set(PAPER26) == set(LEFT_OUT_OF_26)
    assert sum(source.kind == "mcq" for source in SOURCES) == 16


def test_every_task_has_a_yaml_file_that_says_what_the_table_says() -> None:
    for source in SOURCES:
        config = yaml.safe_load((FOLDER / f"{source.name}.yaml").read_text())
        assert config["include"] == f"_{source.kind}.yaml"
        assert config["task"] == f"dlplora_{source.name}"
        assert config["dataset_kwargs"] == {"task": source.name}
        assert config["metadata"]["version"] == 1.0
        if source.kind == "gen":
            decoding = config["generation_kwargs"]
            assert decoding["max_gen_toks"] == source.max_new_tokens
            assert decoding["until"] == ([] if source.several_lines else ["\n"])
    for group, names in (("paper", [source.name for source in SOURCES]), ("paper26", list(PAPER26))):
        assert yaml.safe_load((FOLDER / f"_group_{group}.yaml").read_text())["task"] == [f"dlplora_{name}" for name in names]


def test_options_are_listed_where_the_task_shows_them() -> None:
    source = source_of("goal_step_wikihow")
    item = Item("goal_step_wikihow", "Q: Which comes first? \n  \n  \nA:", "b", ("a", "b"), 1)
    assert with_options(source, item).prompt == "Q: Which comes first?\nchoice: a\nchoice: b\nA:"
    listed = Item("goal_step_wikihow", "Q: Which?\n  choice: a\n  choice: b\nA:", "b", ("a", "b"), 1)
    assert with_options(source, listed).prompt == "Q: Which?\nchoice: a\nchoice: b\nA:"
    plain = Item("winowhy", "The above reasoning is", "correct", ("correct", "incorrect"), 0)
    shown = with_options(source_of("winowhy"), plain)
    assert (shown.prompt, shown.answer, set(shown.choices or ())) == (plain.prompt, "correct", {"correct", "incorrect"})
    assert (shown.choices or ())[shown.gold or 0] == "correct"


def questions(splits: Splits, split: str) -> set[str]:
    return {stem(item) for item in splits.rows[split]}


@pytest.mark.parametrize("given_test", [True, False])
def test_splits_never_share_a_question(given_test: bool) -> None:
    def item(paragraph: int, variant: int) -> Item:
        options = (f"first {variant}", f"second {variant}")
        return with_options(source_of("logical_deduction"), Item("logical_deduction", f"Paragraph {paragraph}.", options[0], options, 0))

    train = [item(paragraph, variant) for paragraph in range(60) for variant in (0, 1)] + [item(0, 0)]
    test = [item(paragraph, 2) for paragraph in range(50, 70)] if given_test else None
    settings = SplitSettings(num_train=70, num_validation=9, num_test=15, seed=3)
    splits = draw_splits("logical_deduction", train, test, settings)
    train_q, validation_q, test_q = (questions(splits, split) for split in ("train", "validation", "test"))
    assert not train_q & validation_q
    assert not train_q & test_q
    assert not validation_q & test_q
    assert (len(splits.rows["train"]), len(splits.rows["test"])) == (70, 15)
    assert splits.left_out == ({"repeated": 1, "question_in_test": 20} if given_test else {"repeated": 1})
    assert draw_splits("logical_deduction", train, test, settings).sha256() == splits.sha256()
    assert draw_splits("logical_deduction", train, test, SplitSettings(num_train=70, num_test=15, seed=4)).sha256() != splits.sha256()


def test_long_prompts_are_left_out_and_counted() -> None:
    train = [Item("gsm8k", "x" * length, "1") for length in range(1, 41)]
    splits = draw_splits("gsm8k", train, None, SplitSettings(num_test=5, max_prompt_chars=30))
    assert splits.left_out == {"too_long": 10}
    assert max(len(item.prompt) for items in splits.rows.values() for item in items) <= 30


@pytest.mark.parametrize(
    ("judge", "reference", "answer", "right"),
    [
        ("exact", "six", " six\n", True),
        ("exact", "six", "sixteen", False),
        ("number", "so it is 7\n#### 1,234", "the total is 1234.0", True),
        ("number", "#### 12", "12 and then 13", False),
        ("number", "#### 12", "no idea", False),
        ("yes_no", "No. They do not.", "no, because", True),
        ("yes_no", "Yes. They do.", "Nobody knows", False),
        ("yes_no", "Yes. They do.", "", False),
    ],
)
def test_an_answer_is_judged_by_the_rule_of_its_task(judge: str, reference: str, answer: str, right: bool) -> None:
    assert judged(judge, reference, answer) is right


def test_local_rows_become_the_suite_and_lm_eval_sees_the_same(tmp_path: Path) -> None:
    from dlplora.lm_eval.evaluate import fast_task_manager

    rows(tmp_path, "gsm8k", "train", [gsm8k(n) for n in range(30)])
    rows(tmp_path, "gsm8k", "test", [gsm8k(n) for n in range(25, 45)])
    suite = get_suite("paper_local", str(tmp_path))
    task = suite.task("gsm8k")
    assert (suite.names, suite.lm_eval_prefix, task.kind) == (("gsm8k",), "dlplora_", "gen")
    assert {key: value for key, value in task.facts.items() if key != "sha256"} == {
        "origin": "local files",
        "seed": 0,
        "num_train": 23,
        "num_validation": 2,
        "num_test": 20,
        "left_out": {"question_in_test": 5},
    }
    manager = fast_task_manager(metadata={"data_root": str(tmp_path), "suite": "paper_local"})
    loaded = manager.load(["dlplora_gsm8k"])["tasks"]["dlplora_gsm8k"]
    docs = list(loaded.test_docs())
    assert [doc["question"] for doc in docs] == [item.prompt for item in task.rows["test"]]
    number = docs[0]["answer"].rsplit(" ", 1)[-1]
    scores = loaded.process_results(docs[0], [f"so {number}"])
    assert (scores["exact_match"], scores["rouge1"] > 0) == (1.0, True)


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("winowhy", {"question": "x", "choices": ["a", "b"], "answer": 2}, "index from 0 to 1, a letter from A to B"),
        ("winowhy", {"choices": ["a", "b"], "answer": 0}, "'question' is missing"),
        ("winowhy", "{", "not JSON"),
        ("winowhy", {"question": "x", "answer": "correct"}, "needs 'choices'"),
        ("gsm8k", {"question": "x", "choices": ["a", "b"], "answer": 1}, "has no 'choices'"),
        ("gsm8k", {"question": "", "answer": "1"}, "'question' is empty"),
    ],
)
def test_a_bad_row_ends_the_command_before_anything_is_written(
    task: str, row: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, runs, out = tmp_path / "rows", tmp_path / "runs", tmp_path / "results"
    path = rows(root, task, "train", [gsm8k(1) if task == "gsm8k" else winowhy(1), row])
    arguments = ["reproduce", "paper", "--backbone", "local-small", "--data-root", str(root), "--runs", str(runs), "--out", str(out)]
    assert main(arguments) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in said
    assert str(path) in said
    assert not runs.exists()
    assert not out.exists()


def test_a_root_without_the_papers_tasks_is_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="no rows of the paper's tasks"):
        paper_suite("paper_local", str(tmp_path))
    rows(tmp_path, "gsm8k", "test", [gsm8k(1)])
    with pytest.raises(TaskError, match="no rows of task 'abstract_narrative_understanding'"):
        paper_suite("paper26", str(tmp_path))


@pytest.mark.skipif(not Path(REAL).is_dir(), reason="no folder of real rows (DLPLORA_DATA, or ../shared/data/real)")
def test_the_real_rows_fill_sixteen_tasks() -> None:
    suite = get_suite("paper_local", REAL)
    assert len(suite.names) == 16
    for task in suite.tasks:
        train, test = ({stem(item) for item in task.rows[split]} for split in ("train", "test"))
        assert not train & test, task.name
        assert 10 <= len(task.rows["test"]) <= 40
        assert task.facts["num_train"] == len(task.rows["train"]) <= 900
    assert suite.task("logical_deduction").facts["left_out"] == {"question_in_test": 123}


# ---------------------------------------------------------------- the hub


def test_every_pin_is_a_full_commit_and_the_one_that_the_document_shows() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "reproduce_paper.md").read_text(encoding="utf-8")
    section = text.split("## Pinned revisions")[1].split("\n## ")[0]
    shown = dict(re.findall(r"^\| `([^`]+/[^`]+)` \| (?:`([^`]*)`)? ?\|", section, re.MULTILINE))
    pinned = {source.hub_id: source.revision or "" for source in SOURCES}
    for name in ("qwen2-1.5b", "qwen2-7b", "llama2-7b", "llama3-8b"):
        protocol = load_protocol(name)
        profile = load_yaml(configs_root() / "reproduce" / f"{name}.yaml")
        assert (profile["backbone"], profile["revision"]) == (protocol.backbone, protocol.revision)
        pinned[str(protocol.backbone)] = str(protocol.revision)
    assert shown == pinned
    assert [name for name, revision in pinned.items() if not re.fullmatch("[0-9a-f]{40}", revision)] == ["tasksource/bigbench"]
    assert all((source.revision or "") == pinned[source.hub_id] for source in SOURCES)


def hub_cache(home: Path, hub_id: str, commit: str, files: dict[str, list[dict[str, Any]]], readme: str = "", branch: str = "main") -> None:
    """What ``huggingface_hub`` leaves after a download, without one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    base = home / "hub" / f"datasets--{hub_id.replace('/', '--')}"
    (base / "refs" / branch).parent.mkdir(parents=True, exist_ok=True)
    (base / "refs" / branch).write_text(commit)
    if readme:
        (base / "snapshots" / commit).mkdir(parents=True)
        (base / "snapshots" / commit / "README.md").write_text(readme)
    for name, table in files.items():
        path = base / "snapshots" / commit / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(table), path)


LOAD = """
import json, sys
from dlplora.errors import TaskError
from dlplora.tasks.paper import load_task
from dlplora.tasks.paper.splits import SplitSettings
try:
    task = load_task(sys.argv[1], None, SplitSettings(num_train=20, num_test=6))
    print(json.dumps([task.facts, task.rows["test"][0].prompt, task.rows["test"][0].answer]))
except TaskError as error:
    print(json.dumps(str(error)))
"""


def offline(home: Path, task: str) -> Any:
    environment = {key: value for key, value in os.environ.items() if key != "DLPLORA_DATA" and not key.startswith("HF_")}
    environment |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", LOAD, task], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_the_hubs_cache_is_found_offline_and_the_commit_is_recorded(tmp_path: Path) -> None:
    commit = source_of("alpaca").revision
    assert commit is not None
    table = [{"instruction": f"Say {n}.", "input": "" if n % 2 else "loudly", "output": f"{n}!"} for n in range(40)]
    hub_cache(tmp_path, "tatsu-lab/alpaca", commit, {"data/train-00000-of-00001.parquet": table})
    later = tmp_path / "hub" / "datasets--tatsu-lab--alpaca" / "refs" / "main"
    later.write_text("0123456789abcdef0123456789abcdef01234567")  # the branch moved on; the pin did not
    facts, prompt, answer = offline(tmp_path, "alpaca")
    assert facts["origin"] == f"tatsu-lab/alpaca@{commit}"
    assert (facts["num_train"], facts["num_test"]) == (20, 6)
    number = int(answer.rstrip("!"))
    assert prompt == (f"Say {number}." if number % 2 else f"Say {number}.\nloudly")


README = """---
configs:
- config_name: winowhy
  data_files:
  - {split: train, path: winowhy/train-*}
  - {split: validation, path: winowhy/validation-*}
- config_name: gsm8k_hard
  data_files:
  - {split: train, path: gsm8k_hard/train-*}
---
"""


def table_of_choices(start: int, num: int) -> list[dict[str, Any]]:
    return [
        {
            "inputs": f"Reason {n}. The above reasoning is",
            "targets": ["correct"],
            "multiple_choice_targets": ["correct", "incorrect"],
            "multiple_choice_scores": [1, 0],
        }
        for n in range(start, start + num)
    ]


def test_one_configuration_of_many_is_found_though_the_others_were_not_downloaded(tmp_path: Path) -> None:
    table = table_of_choices
    files = {"winowhy/train-00000-of-00001.parquet": table(0, 40), "winowhy/validation-00000-of-00001.parquet": table(35, 20)}
    hub_cache(tmp_path, "tasksource/bigbench", "f" * 40, files, README)
    facts, prompt, answer = offline(tmp_path, "winowhy")
    assert (facts["origin"], facts["num_test"], answer) == (f"tasksource/bigbench@{'f' * 40}", 6, "correct")
    assert facts["left_out"] == {"question_in_test": 5}
    assert prompt.endswith("The above reasoning is")


def test_a_repository_with_a_script_alone_is_read_from_the_hubs_conversion(tmp_path: Path) -> None:
    """``datasets`` runs no scripts any more; the hub keeps Parquet files of such data sets on a branch of their own."""
    script = "---\ndataset_info:\n- config_name: winowhy\n---\n"
    hub_cache(tmp_path, "tasksource/bigbench", "a" * 40, {}, script)
    message = offline(tmp_path, "winowhy")
    assert f"tasksource/bigbench@{'a' * 12} cannot be read" in message
    assert "Nor is there a conversion" in message
    assert "--data-root" in message
    assert "\n" not in message
    files = {"winowhy/train/0000.parquet": table_of_choices(0, 40), "winowhy/validation/0000.parquet": table_of_choices(40, 20)}
    hub_cache(tmp_path, "tasksource/bigbench", "b" * 40, files, branch="refs/convert/parquet")
    facts, prompt, answer = offline(tmp_path, "winowhy")
    assert (facts["origin"], facts["num_test"], answer) == (f"tasksource/bigbench@{'b' * 40}", 6, "correct")
    assert prompt.endswith("The above reasoning is")
    message = offline(tmp_path, "abstract_narrative_understanding")
    assert "Nor does its conversion at bbbbbbbbbbbb hold Parquet files in abstract_narrative_understanding/" in message


def test_offline_and_missing_is_one_line_with_both_ways_out(tmp_path: Path) -> None:
    rows_of_another = [{"question": "What is 1 + 1?", "answer": "#### 2"}]
    hub_cache(tmp_path, "openai/gsm8k", "0" * 40, {"main/train-00000-of-00001.parquet": rows_of_another})
    message = offline(tmp_path, "gsm8k")
    for part in (
        "openai/gsm8k",
        f"revision {source_of('gsm8k').revision}",
        str(tmp_path / "hub"),
        "HF_HUB_OFFLINE",
        "gsm8k/train.jsonl",
        "--data-root",
        "DLPLORA_DATA",
    ):
        assert part in message
    assert "\n" not in message


def test_rows_of_big_bench_and_of_translations_are_converted() -> None:
    raw = {
        "inputs": "Which?",
        "targets": ["b"],
        "multiple_choice_targets": ["a", "b"],
        "multiple_choice_scores": [0, 1],
    }
    assert convert(source_of("winowhy"), raw, "here") == {"question": "Which?", "choices": ["a", "b"], "answer": 1, "task": "winowhy"}
    assert convert(source_of("winowhy"), raw | {"multiple_choice_scores": [1, 1]}, "here") is None
    assert convert(source_of("object_counting"), raw | {"targets": ["six", "6"]}, "here") == {
        "question": "Which?",
        "answer": "six",
        "task": "object_counting",
    }
    news = {"translation": {"de": "Guten Tag.", "en": "Good day."}}
    assert convert(source_of("news_commentary_de"), news, "here") == {
        "question": "Den folgenden Text ins Englische übersetzen.\nGuten Tag.",
        "answer": "Good day.",
        "task": "news_commentary_de",
    }
    with pytest.raises(TaskError, match=r"column 'translation\.es' is missing"):
        convert(source_of("news_commentary_es"), news, "here")


def test_a_pin_goes_with_its_backbone() -> None:
    """Another base model must not be looked up, or recorded, under the commit of the protocol's own."""
    own = load_protocol("qwen2-1.5b")
    assert own.revision is not None
    assert load_protocol("qwen2-1.5b", {"backbone": own.backbone}).revision == own.revision
    assert load_protocol("qwen2-1.5b", {"backbone": "some/other"}).revision is None
    assert load_protocol("qwen2-1.5b", {"backbone": "some/other", "revision": "main"}).revision == "main"
