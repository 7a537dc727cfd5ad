"""The wrapper over lm-eval: plain names, standard errors, samples; against a model whose answers are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.model import LM

from dlplora.errors import TaskError
from dlplora.lm_eval import evaluate as harness

DOCS = """
import datasets

def build(**_):
    rows = [{"task": "t", "question": f"q{i}", "choices": ["yes", "no"], "gold": i % 2, "answer": "yes"} for i in range(8)]
    return datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})
"""
MCQ = """
task: toy_mcq
custom_dataset: !function docs.build
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{gold}}"
doc_to_choice: "{{choices}}"
target_delimiter: " "
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 3}
"""
GEN = """
task: toy_gen
custom_dataset: !function docs.build
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {max_gen_toks: 4, until: ["\\n"]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
filter_list:
  - name: strict
    filter: [{function: take_first}]
metadata: {version: 1}
"""
GROUP = """
group: toy
task: [toy_mcq]
aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: false}]
metadata: {version: 1}
"""


class AlwaysYes(LM):
    """Prefers "yes" wherever it may choose."""

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        return [(-1.0 if request.args[1] == " yes" else -2.0, False) for request in requests]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        raise NotImplementedError

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        return ["yes" for _ in requests]


@pytest.fixture
def manager(tmp_path: Path) -> Any:
    (tmp_path / "docs.py").write_text(DOCS)
    for name, text in (("mcq", MCQ), ("gen", GEN), ("group", GROUP)):
        (tmp_path / f"{name}.yaml").write_text(text)
    return harness.fast_task_manager(tmp_path)


def test_results_are_plain(manager: Any) -> None:
    result = harness.evaluate(AlwaysYes(), ["toy_mcq", "toy_gen"], task_manager=manager)
    assert result.results == {"toy_mcq": {"acc": 0.5}, "toy_gen": {"exact_match,strict": 1.0}}
    # standard error of a mean with the n - 1 estimator: sqrt(n p q / (n - 1)) / sqrt(n) = sqrt(0.25 / 7)
    assert result.stderr["toy_mcq"]["acc"] == pytest.approx((0.25 / 7) ** 0.5)
    assert result.stderr["toy_gen"]["exact_match,strict"] == 0.0
    assert result.versions == {"toy_mcq": 3, "toy_gen": 1}
    assert result.num_samples == {"toy_mcq": 8, "toy_gen": 8}
    assert result.higher_is_better["toy_mcq"] == {"acc": True}
    assert [row["doc"]["gold"] for row in result.samples["toy_mcq"]] == [0, 1] * 4
    assert [row["acc"] for row in result.samples["toy_mcq"]] == [1.0, 0.0] * 4


def test_groups_stand_apart(manager: Any) -> None:
    result = harness.evaluate(AlwaysYes(), ["toy"], task_manager=manager, limit=3, log_samples=False)
    assert result.results == {"toy_mcq": {"acc": pytest.approx(2 / 3)}}
    assert result.groups == {"toy": {"acc": pytest.approx(2 / 3)}}
    assert result.num_samples == {"toy_mcq": 3}
    assert result.samples == {}


def test_no_resamples_no_standard_errors(manager: Any) -> None:
    result = harness.evaluate(AlwaysYes(), ["toy_mcq"], task_manager=manager, bootstrap_iters=0)
    assert result.stderr == {"toy_mcq": {"acc": None}}


def test_patterns_and_unknown_names(manager: Any) -> None:
    result = harness.evaluate(AlwaysYes(), ["toy_*"], task_manager=manager, limit=1)
    assert set(result.results) == {"toy_mcq", "toy_gen"}
    with pytest.raises(TaskError, match=r"unknown task 'toy_mqc'\. Did you mean 'toy_mcq'"):
        harness.evaluate(AlwaysYes(), ["toy_mqc"], task_manager=manager)
    with pytest.raises(TaskError, match="no task"):
        harness.evaluate(AlwaysYes(), [], task_manager=manager)


def test_the_fast_manager_knows_our_tasks_and_no_others() -> None:
    names = harness.fast_task_manager().all_tasks
    assert {"dlplora_nano", "dlplora_nano_mcq", "dlplora_nano_gen"} <= set(names)
    assert all(name.startswith("dlplora_") for name in names)
