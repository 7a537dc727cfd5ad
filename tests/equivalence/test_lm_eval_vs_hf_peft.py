"""The adapter against lm-eval's own ``hf`` model with PEFT's adapter: same scores, same answers, same accuracy.

Truth shares no code with the fused layer: lm-eval loads the base model, PEFT the adapter folder. Where rows of one batch
need different experts, truth is one stock model per expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from dlplora.inference.fused_model import FusedCausalLM
from dlplora.lm_eval import evaluate as harness
from dlplora.lm_eval.model import DLPLoRALM
from dlplora.methods.base import FusionMethod, Metadata, MethodContext
from dlplora.modules.lora_bank import AdapterBank
from dlplora.types import PromptBatch

EXPERTS = ("alpha", "beta", "gamma")
TOLERANCE = 1e-4

QUESTIONS = [
    ("the cat sees a box ? :", [" red", " blue", " the tree"]),
    ("Mia likes the plum . what is it ? :", [" a pear", " a plum", " two"]),
    ("who sees Leo", [" Tom", " Ann sees", " no one . is in", " Leo"]),
    ("a\nb 7", [" x", " yz"]),
    ("one two three", [" one", " one two", " one two three"]),
]

DOCS = """
import datasets

QUESTIONS = {questions!r}

def build(task, **_):
    rows = [
        {{"task": task, "question": question, "choices": choices, "gold": index % len(choices), "answer": choices[0].strip()}}
        for index, (question, choices) in enumerate(QUESTIONS)
    ]
    return datasets.DatasetDict({{"test": datasets.Dataset.from_list(rows)}})
"""
COMMON = """
custom_dataset: !function docs.build
dataset_kwargs: {{task: {task}}}
test_split: test
doc_to_text: "{{{{question}}}}"
metadata: {{version: 1}}
"""
MCQ = """
task: dlplora_toy_{task}
output_type: multiple_choice
doc_to_target: "{{{{gold}}}}"
doc_to_choice: "{{{{choices}}}}"
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
GEN = """
task: dlplora_toygen_{task}
output_type: generate_until
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_gen_toks: 9, until: ["\\n", " the"]}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


class ByLength(FusionMethod):
    """A routing rule that needs no training: the number of prompt tokens picks the expert."""

    name = "by_length"
    metadata = Metadata(title="Test rule", granularity="prompt")

    def route(self, prompts: PromptBatch) -> torch.Tensor:
        lengths = prompts.attention_mask.sum(dim=1)
        return torch.nn.functional.one_hot(lengths % len(self.expert_names), len(self.expert_names)).float()


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    (tmp_path / "docs.py").write_text(DOCS.format(questions=QUESTIONS))
    for task in EXPERTS:
        (tmp_path / f"mcq_{task}.yaml").write_text((MCQ + COMMON).format(task=task))
        (tmp_path / f"gen_{task}.yaml").write_text((GEN + COMMON).format(task=task))
    return tmp_path


@pytest.fixture(scope="module")
def stock(tiny_llama_folder: Path, tiny_pool: Path) -> dict[str, HFLM]:
    """lm-eval's own model with each adapter, through PEFT."""
    return {
        task: HFLM(pretrained=str(tiny_llama_folder), peft=str(tiny_pool / task), dtype="float32", device="cpu", batch_size=3)
        for task in EXPERTS
    }


@pytest.fixture
def make_ours(tiny_llama_folder: Path, tiny_pool: Path) -> Iterator[Callable[..., DLPLoRALM]]:
    built: list[DLPLoRALM] = []

    def make(method: str = "oracle", **options: Any) -> DLPLoRALM:
        lm = DLPLoRALM(**({"pretrained": str(tiny_llama_folder), "pool": str(tiny_pool), "method": method, "device": "cpu"} | options))
        built.append(lm)
        return lm

    yield make
    for lm in built:
        lm.close()


@pytest.fixture
def by_length(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> Iterator[Callable[[int], DLPLoRALM]]:
    fused = FusedCausalLM(
        tiny_llama,
        tiny_tokenizer,
        AdapterBank.from_pool(tiny_pool),
        ByLength(),
        context=MethodContext(tokenizer=tiny_tokenizer, embedding=tiny_llama.get_input_embeddings()),
    )
    yield lambda batch_size: DLPLoRALM(fused=fused, batch_size=batch_size)
    fused.close()


def requests_of(kind: str, pairs: list[tuple[Any, ...]], task: str = "dlplora_toy_alpha") -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=pair, idx=index, metadata=(task, index, 1))  # type: ignore[arg-type]
        for index, pair in enumerate(pairs)
    ]


PAIRS = [(question, choice) for question, choices in QUESTIONS for choice in choices] + [("", "the cat sees"), ("Tom ", "is in")]


@pytest.mark.parametrize("kernel", ["reference", "dense", "folded"])
def test_oracle_accuracy_and_scores(kernel: str, task_folder: Path, make_ours: Callable[..., DLPLoRALM], stock: dict[str, HFLM]) -> None:
    names = [f"dlplora_toy_{task}" for task in EXPERTS]
    manager = harness.fast_task_manager(task_folder)
    lm = make_ours(backend=kernel, batch_size=4)
    ours = harness.evaluate(lm, names, task_manager=manager)
    for task, name in zip(EXPERTS, names, strict=True):
        theirs = harness.evaluate(stock[task], [name], task_manager=manager)
        assert ours.results[name] == theirs.results[name]
        for mine, other in zip(ours.samples[name], theirs.samples[name], strict=True):
            assert mine["doc"] == other["doc"]
            for (value, greedy), (expected, expected_greedy) in zip(mine["filtered_resps"], other["filtered_resps"], strict=True):
                assert value == pytest.approx(expected, abs=TOLERANCE)
                assert greedy == expected_greedy
    assert lm.routing_statistics()["router_accuracy"] == 1.0


def test_the_adapters_disagree_so_the_comparison_can_fail(stock: dict[str, HFLM]) -> None:
    values = [[value for value, _ in stock[task].loglikelihood(requests_of("loglikelihood", PAIRS), disable_tqdm=True)] for task in EXPERTS]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert max(abs(a - b) for a, b in zip(values[first], values[second], strict=True)) > 100 * TOLERANCE


def test_oracle_generation(task_folder: Path, make_ours: Callable[..., DLPLoRALM], stock: dict[str, HFLM]) -> None:
    names = [f"dlplora_toygen_{task}" for task in EXPERTS]
    manager = harness.fast_task_manager(task_folder)
    ours = harness.evaluate(make_ours(batch_size=4), names, task_manager=manager)
    answers = set()
    for task, name in zip(EXPERTS, names, strict=True):
        theirs = harness.evaluate(stock[task], [name], task_manager=manager)
        expected = [row["filtered_resps"] for row in theirs.samples[name]]
        assert [row["filtered_resps"] for row in ours.samples[name]] == expected
        answers.add(str(expected))
    assert len(answers) == len(EXPERTS), "the adapters must generate different texts for this to mean anything"


@pytest.mark.parametrize("with_pool", [True, False])
def test_base_equals_the_stock_model_without_an_adapter(
    with_pool: bool, make_ours: Callable[..., DLPLoRALM], tiny_llama_folder: Path
) -> None:
    plain = HFLM(pretrained=str(tiny_llama_folder), dtype="float32", device="cpu", batch_size=3)
    requests = requests_of("loglikelihood", PAIRS)
    ours = make_ours("base", batch_size=5, **({} if with_pool else {"pool": None})).loglikelihood(requests, disable_tqdm=True)
    for (value, greedy), (expected, expected_greedy) in zip(ours, plain.loglikelihood(requests, disable_tqdm=True), strict=True):
        assert value == pytest.approx(expected, abs=1e-5)
        assert greedy == expected_greedy


@pytest.mark.parametrize("max_length", [256, 12])
def test_rolling_equals_the_stock_model(max_length: int, make_ours: Callable[..., DLPLoRALM], tiny_llama_folder: Path) -> None:
    plain = HFLM(pretrained=str(tiny_llama_folder), dtype="float32", device="cpu", batch_size=2, max_length=max_length)
    texts = [("the cat sees a box in the tree . Mia likes it .",), ("who ?",), ("one two three yes no two three one what who",)]
    requests = requests_of("loglikelihood_rolling", texts)
    ours = make_ours("base", batch_size=2, max_length=max_length).loglikelihood_rolling(requests, disable_tqdm=True)
    assert ours == pytest.approx(plain.loglikelihood_rolling(requests, disable_tqdm=True), abs=TOLERANCE)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_rows_of_a_batch_are_routed_each_for_itself(
    batch_size: int, by_length: Callable[[int], DLPLoRALM], stock: dict[str, HFLM], tiny_tokenizer: Any
) -> None:
    """Mixed experts in one batch equal one stock model per expert, whatever the batch."""
    requests = requests_of("loglikelihood", PAIRS)
    expert_of = [EXPERTS[len(tiny_tokenizer(context.rstrip() or "")["input_ids"]) % 3] for context, _ in PAIRS]
    assert len(set(expert_of)) == 3, "the questions must need all experts"
    values = {task: lm.loglikelihood(requests, disable_tqdm=True) for task, lm in stock.items()}
    ours = by_length(batch_size).loglikelihood(requests, disable_tqdm=True)
    for index, (value, greedy) in enumerate(ours):
        expected, expected_greedy = values[expert_of[index]][index]
        assert value == pytest.approx(expected, abs=TOLERANCE)
        assert greedy == expected_greedy


@pytest.mark.parametrize("batch_size", [1, 4])
def test_generated_rows_of_a_batch_are_routed_each_for_itself(
    batch_size: int, by_length: Callable[[int], DLPLoRALM], stock: dict[str, HFLM], tiny_tokenizer: Any
) -> None:
    options = {"until": ["\n"], "max_gen_toks": 8}
    pairs = [(question, dict(options)) for question, _ in QUESTIONS]
    expert_of = [EXPERTS[len(tiny_tokenizer(question)["input_ids"]) % 3] for question, _ in QUESTIONS]
    expected = {task: lm.generate_until(requests_of("generate_until", pairs), disable_tqdm=True) for task, lm in stock.items()}
    ours = by_length(batch_size).generate_until(requests_of("generate_until", pairs), disable_tqdm=True)
    assert ours == [expected[expert][index] for index, expert in enumerate(expert_of)]


def test_cut_prompts_score_like_the_stock_model(make_ours: Callable[..., DLPLoRALM], tiny_llama_folder: Path, tiny_pool: Path) -> None:
    peft = str(tiny_pool / "alpha")
    plain = HFLM(pretrained=str(tiny_llama_folder), peft=peft, dtype="float32", device="cpu", batch_size=2, max_length=10)
    requests = requests_of("loglikelihood", PAIRS)
    lm = make_ours("oracle", batch_size=2, max_length=10)
    ours = lm.loglikelihood(requests, disable_tqdm=True)
    for (value, _), (expected, _) in zip(ours, plain.loglikelihood(requests, disable_tqdm=True), strict=True):
        assert value == pytest.approx(expected, abs=TOLERANCE)
    assert (lm.routing_statistics()["num_truncated_prompts"] or 0) > 0
