"""What lm-eval's contexts are routed on: documents and messages are known to the harness, and wrappers change no route."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from dlplora.inference.fused_model import FusedCausalLM
from dlplora.lm_eval.evaluate import fast_task_manager
from dlplora.lm_eval.model import DLPLoRALM
from dlplora.lm_eval.routed_texts import RoutedTexts
from dlplora.modules.router_confidence import WINDOW, ConfidenceMonitor
from dlplora.tasks.nano import nano_suite

SYSTEM = (
    "You are a helpful and precise assistant. Answer the user's question as well as you can. Be polite, and give short answers in English. "
    "Do not explain."
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TASKS = ["dlplora_nano_gate_colors", "dlplora_nano_abstract_narrative", "dlplora_nano_table_to_text"]


@pytest.fixture(scope="module")
def fused() -> Iterator[FusedCausalLM]:
    model = FusedCausalLM.from_pretrained(method="dlp")
    yield model
    model.close()


def run(fused: FusedCausalLM, **options: Any) -> tuple[list[str], float]:
    """The texts that the router read, and its accuracy."""
    from lm_eval import simple_evaluate

    read: list[str] = []
    route = fused.method.route_with_confidence

    def recording(prompts: Any) -> Any:
        read.extend(prompts.texts)
        return route(prompts)

    fused.method.route_with_confidence = recording  # type: ignore[method-assign]
    try:
        lm = DLPLoRALM(fused=fused, batch_size=8)
        simple_evaluate(lm, tasks=TASKS, limit=4, bootstrap_iters=0, task_manager=fast_task_manager(), **options)
    finally:
        del fused.method.route_with_confidence
    return read, lm.routing_statistics()["router_accuracy"] or 0.0


def questions() -> set[str]:
    suite = nano_suite()
    return {item.prompt for name in TASKS for item in suite.task(name.removeprefix("dlplora_nano_")).items("test", 4)}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"system_instruction": SYSTEM},
        {"system_instruction": SYSTEM + "\n\n"},
        {"system_instruction": SYSTEM, "num_fewshot": 2},
        {"system_instruction": SYSTEM, "apply_chat_template": True},
        {"num_fewshot": 2, "apply_chat_template": True, "fewshot_as_multiturn": True},
    ],
    ids=["plain", "system text", "system text and blank line", "few-shot", "chat template", "few-shot turns"],
)
def test_the_router_reads_the_question_of_the_document(options: dict[str, Any], fused: FusedCausalLM) -> None:
    fused.tokenizer = copy.deepcopy(fused.tokenizer)
    fused.tokenizer.chat_template = CHATML
    fused.__dict__.pop("chat_markers", None)
    read, accuracy = run(fused, **options)
    first_plans = {text for text in read if text.endswith("Answer:")}
    assert first_plans == questions()
    assert accuracy == 1.0


def test_messages_are_remembered() -> None:
    texts = RoutedTexts(None)
    texts.remember(
        "any rendering", [{"role": "user", "content": "old?"}, {"role": "assistant", "content": "x"}, {"role": "user", "content": "new?"}]
    )
    assert texts.of(Instance("loglikelihood", {}, ("any rendering", " yes"), 0)) == "new?"
    assert texts.of(Instance("loglikelihood", {}, ("another", " yes"), 0)) == "another"


def test_a_router_out_of_its_depth_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    sure, unsure = torch.tensor([[0.99, 0.01]]).repeat(WINDOW, 1), torch.tensor([[0.6, 0.4]]).repeat(WINDOW, 1)
    metrics = {"validation_accuracy": 0.98, "validation_calibration_error": 0.02}
    with caplog.at_level(logging.WARNING):
        monitor = ConfidenceMonitor(metrics)
        monitor.add(sure)
        monitor.add(unsure[: WINDOW - 1])
        assert not caplog.records
        monitor.add(unsure[:1])
        monitor.add(unsure)
    assert [record.getMessage()[:72] for record in caplog.records] == [
        "the router's mean confidence on the last 32 texts is 0.60, on validation"
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        ConfidenceMonitor({}).add(unsure)
    assert not caplog.records
