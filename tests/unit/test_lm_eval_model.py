"""What the lm-eval model promises about routing: context only, one plan a question, nothing depends on the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate

from dlplora.errors import ConfigError, DLPLoRAError, GenerationError
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.lm_eval import evaluate as harness
from dlplora.lm_eval.model import DLPLoRALM
from dlplora.methods.base import FusionMethod, Metadata, MethodContext
from dlplora.modules.lora_bank import AdapterBank
from dlplora.types import PromptBatch

QUESTIONS = ["the cat sees", "Mia likes the plum . what is it ? :", "who sees Leo", "one two three four", "a red box is in the tree"]
CHOICES = [" a dog", " red", " blue . Tom is in", " no"]


class Recorder(FusionMethod):
    """Mixes all experts by the sum of the prompt's token ids, and remembers what it was shown."""

    name = "recorder"
    metadata = Metadata(title="Test rule", granularity="prompt")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[tuple[int, ...], str, str | None]] = []

    def route(self, prompts: PromptBatch) -> torch.Tensor:
        names = prompts.task_names or (None,) * len(prompts)
        rows = []
        for ids, mask, text, name in zip(prompts.input_ids, prompts.attention_mask, prompts.texts, names, strict=True):
            kept = ids[mask.bool()].tolist()
            self.seen.append((tuple(kept), text, name))
            rows.append(torch.softmax(torch.tensor([float(sum(kept) % 7), float(len(kept)), 3.0]) / 2, dim=0))
        return torch.stack(rows).to(prompts.input_ids.device)


class TaskRecorder(Recorder):
    name = "task_recorder"
    metadata = Metadata(title="Test rule", granularity="task", needs=("task_id",))


@pytest.fixture
def make(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> Iterator[Callable[..., tuple[DLPLoRALM, Any]]]:
    built: list[FusedCausalLM] = []

    def build(method: FusionMethod | None = None, **options: Any) -> tuple[DLPLoRALM, Any]:
        context = MethodContext(tokenizer=tiny_tokenizer, embedding=tiny_llama.get_input_embeddings())
        for earlier in built:
            earlier.close()
        fused = FusedCausalLM(tiny_llama, tiny_tokenizer, AdapterBank.from_pool(tiny_pool), method or Recorder(), context=context)
        built.append(fused)
        return DLPLoRALM(fused=fused, **({"batch_size": 4} | options)), fused.method

    yield build
    for fused in built:
        fused.close()


def instances(kind: str, arguments: list[tuple[Any, ...]], tasks: list[str] | None = None, docs: list[Any] | None = None) -> list[Instance]:
    return [
        Instance(
            request_type=kind,  # type: ignore[arg-type]
            doc=docs[index] if docs else {},
            arguments=pair,
            idx=0,
            metadata=(tasks[index] if tasks else "dlplora_nano_alpha", index, 1),
        )
        for index, pair in enumerate(arguments)
    ]


def score(lm: DLPLoRALM, pairs: list[tuple[str, str]], **options: Any) -> list[tuple[float, bool]]:
    return lm.loglikelihood(instances("loglikelihood", pairs, **options), disable_tqdm=True)


PAIRS = [(question, choice) for question in QUESTIONS for choice in CHOICES]


def test_the_router_reads_the_context_and_nothing_else(make: Callable[..., Any], tiny_tokenizer: Any) -> None:
    lm, method = make()
    score(lm, PAIRS)
    assert sorted(method.seen) == sorted((tuple(tiny_tokenizer(question)["input_ids"]), question, None) for question in QUESTIONS)


def test_changing_the_continuations_never_changes_a_plan(make: Callable[..., Any]) -> None:
    plans = []
    for choices in (CHOICES, [" plum", " what where who is the", " Tom .\n? no", " x"]):
        lm, method = make()
        score(lm, [(question, choice) for question in QUESTIONS for choice in choices])
        plans.append((sorted(method.seen), {key: value.tolist() for key, value in lm._weights_of.items()}))
    assert plans[0] == plans[1]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_order_and_batch_size_change_nothing(batch_size: int, make: Callable[..., Any]) -> None:
    expected = {pair: score(make(batch_size=1)[0], [pair])[0] for pair in PAIRS}
    lm, _ = make(batch_size=batch_size)
    backwards = list(reversed(PAIRS))
    for pair, (value, greedy) in zip(backwards, score(lm, backwards), strict=True):
        assert value == pytest.approx(expected[pair][0], abs=1e-5)
        assert greedy == expected[pair][1]


def test_routing_matters_here(make: Callable[..., Any]) -> None:
    """Otherwise the tests above could not fail."""
    lm, _ = make()
    routed = [value for value, _ in score(lm, PAIRS)]
    for key in lm._weights_of:
        lm._weights_of[key] = torch.tensor([1.0, 0.0, 0.0])
    assert max(abs(a - b) for (a, _), b in zip(score(lm, PAIRS), routed, strict=True)) > 0.1


def test_the_same_tokens_split_elsewhere_are_another_question(make: Callable[..., Any]) -> None:
    lm, method = make()
    pairs = [("the cat", " sees a box"), ("the cat sees", " a box")]
    together = score(lm, pairs)
    alone = [score(make()[0], [pair])[0] for pair in pairs]
    assert len(method.seen) == 2
    assert [value for value, _ in together] == pytest.approx([value for value, _ in alone], abs=1e-5)


def test_the_task_reaches_only_methods_that_ask(make: Callable[..., Any]) -> None:
    tasks = ["dlplora_nano_beta", "dlplora_paper_gamma", "alpha", "hellaswag", "dlplora_nano_beta"]
    docs: list[Any] = [{}, {}, {}, {"task": "nobody"}, {"task": "gamma"}]
    pairs = [(question, " red") for question in QUESTIONS]
    lm, method = make(TaskRecorder())
    score(lm, pairs, tasks=tasks, docs=docs)
    by_text = {text: name for _, text, name in method.seen}
    assert [by_text[question] for question in QUESTIONS] == ["beta", "gamma", "alpha", "nobody", "gamma"]
    lm, method = make(Recorder())
    score(lm, pairs, tasks=tasks, docs=docs)
    assert {name for _, _, name in method.seen} == {None}


def test_one_prompt_under_two_tasks_is_routed_twice(make: Callable[..., Any]) -> None:
    lm, method = make(TaskRecorder())
    score(lm, [("the cat", " sees"), ("the cat", " sees")], tasks=["dlplora_nano_alpha", "dlplora_nano_beta"])
    assert [name for _, _, name in method.seen] == ["alpha", "beta"]


def test_an_empty_context_is_the_beginning_of_text_token(make: Callable[..., Any], tiny_tokenizer: Any) -> None:
    lm, method = make()
    score(lm, [("", "the cat"), ("", "a dog")])
    assert method.seen == [((tiny_tokenizer.bos_token_id,), "", None)]


def test_rolling_text_is_routed_by_its_first_window(make: Callable[..., Any], tiny_tokenizer: Any) -> None:
    lm, method = make(max_length=8)
    text = "the cat sees a box in the tree . Mia likes the plum and who is in the box ?"
    tokens = tiny_tokenizer(text)["input_ids"]
    assert len(tokens) > 16, "the text must need several windows"
    values = lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,), ("who ?",)]), disable_tqdm=True)
    assert [seen[0] for seen in method.seen].count(tuple(tokens[:8])) == 1
    assert len(method.seen) == 2
    alone = lm.loglikelihood_rolling(instances("loglikelihood_rolling", [("who ?",)]), disable_tqdm=True)
    assert alone == pytest.approx(values[1:], abs=1e-5)


def test_long_prompts_are_cut_on_the_left_and_counted_once(make: Callable[..., Any], tiny_tokenizer: Any) -> None:
    lm, method = make(max_length=8)
    long = "the cat sees a box in the tree . Mia likes the plum"
    score(lm, [(long, choice) for choice in CHOICES] + [("who", " red")])
    tokens = tiny_tokenizer(long)["input_ids"]
    assert (tuple(tokens[-8:]), tiny_tokenizer.decode(tokens[-8:]), None) in method.seen
    assert lm.routing_statistics()["num_truncated_prompts"] == 1
    with pytest.raises(GenerationError, match="allowed are 1 to 8"):
        score(lm, [("who", " " + long)])


def test_statistics_count_distinct_prompts(make: Callable[..., Any]) -> None:
    lm, _ = make()
    score(lm, PAIRS)
    score(lm, PAIRS)
    figures = lm.routing_statistics()
    assert figures["num_plans"] == len(QUESTIONS)
    assert figures["mean_experts_kept"] == 3.0
    best = [max(range(3), key=weights.tolist().__getitem__) for weights in lm._weights_of.values()]
    assert figures["router_accuracy"] == pytest.approx(best.count(0) / len(best))  # every prompt belongs to task alpha


@pytest.mark.parametrize("batch_size", [1, 5])
def test_generation_is_routed_by_the_prompt_alone(batch_size: int, make: Callable[..., Any]) -> None:
    options = {"until": ["\n", "tree"], "max_gen_toks": 10}
    alone = []
    for question in QUESTIONS:
        lm, _ = make(batch_size=1)
        alone += lm.generate_until(instances("generate_until", [(question, options)]), disable_tqdm=True)
    lm, method = make(batch_size=batch_size)
    assert lm.generate_until(instances("generate_until", [(question, options) for question in QUESTIONS]), disable_tqdm=True) == alone
    assert {text for _, text, _ in method.seen} == set(QUESTIONS)
    assert all("tree" not in answer for answer in alone)


def test_generation_room_and_options(make: Callable[..., Any]) -> None:
    lm, _ = make(max_length=16)
    long = "the cat sees a box in the tree . Mia likes the plum"
    lm.generate_until(instances("generate_until", [(long, {"max_gen_toks": 6}), ("who", {"max_gen_toks": 2})]), disable_tqdm=True)
    assert lm.routing_statistics()["num_truncated_prompts"] == 1
    with pytest.raises(GenerationError, match="leave no room"):
        lm.generate_until(instances("generate_until", [("who", {"max_gen_toks": 16})]), disable_tqdm=True)


def test_sampling_follows_the_options(make: Callable[..., Any]) -> None:
    lm, _ = make()
    options = {"do_sample": True, "temperature": 2.0, "max_gen_toks": 8}
    request = instances("generate_until", [("the cat", options)] * 6)
    torch.manual_seed(0)
    first = lm.generate_until(request, disable_tqdm=True)
    torch.manual_seed(0)
    assert lm.generate_until(request, disable_tqdm=True) == first
    assert len(set(first)) > 1


def test_automatic_batch_size(make: Callable[..., Any]) -> None:
    expected = score(make(batch_size=1)[0], PAIRS)
    lm, method = make(batch_size="auto", max_batch_size=4)
    for (value, _), (wanted, _) in zip(score(lm, PAIRS), expected, strict=True):
        assert value == pytest.approx(wanted, abs=1e-5)
    assert lm.batch_sizes == {0: 4}
    assert len(method.seen) == len(QUESTIONS), "the probe must not be routed as if it were a prompt"
    few = make(batch_size="auto:4", max_batch_size=2)[0]
    assert score(few, PAIRS[:1])[0][0] == pytest.approx(expected[0][0], abs=1e-5)


def test_the_response_cache_is_refused(make: Callable[..., Any], tmp_path: Path) -> None:
    lm, _ = make()
    with pytest.raises(DLPLoRAError, match="--use_cache is refused"):
        lm.set_cache_hook(SimpleNamespace(dbdict={}))
    lm.set_cache_hook(SimpleNamespace(dbdict=None))
    with pytest.raises(DLPLoRAError, match="--use_cache is refused"):
        simple_evaluate(model=lm, tasks=["dlplora_nano"], use_cache=str(tmp_path / "c"), task_manager=harness.fast_task_manager(), limit=1)


def test_chat_templates_are_the_tokenizer_s(make: Callable[..., Any]) -> None:
    lm, _ = make()
    lm.tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    try:
        assert lm.apply_chat_template([{"role": "user", "content": "the cat"}]) == "[user]the cat"
    finally:
        lm.tokenizer.chat_template = None


def test_samples_and_model_info(make: Callable[..., Any]) -> None:
    lm, _ = make()
    result = harness.evaluate(lm, ["dlplora_nano_object_counting"], limit=2)
    rows = result.samples["dlplora_nano_object_counting"]
    assert len(rows) == 2
    assert len(rows[0]["filtered_resps"]) == len(rows[0]["doc"]["choices"])
    info = lm.get_model_info()
    assert info["dlplora_method"] == "recorder"
    assert info["dlplora_experts"] == ["alpha", "beta", "gamma"]
    assert info["dlplora_routing"]["num_plans"] == 2


def test_options_of_the_command_line_and_of_model_args(tiny_llama_folder: Path, tiny_pool: Path) -> None:
    arguments = {"pretrained": str(tiny_llama_folder), "pool": str(tiny_pool), "method": "oracle", "names": "gamma+alpha"}
    lm = DLPLoRALM.create_from_arg_obj(arguments | {"batch_size": 7}, {"batch_size": 1, "device": "cpu", "max_batch_size": None})
    try:
        assert lm.batch_size == 7
        assert lm.fused.bank.names == ("gamma", "alpha")
        assert lm.get_model_info()["model_revision"] == "main"
    finally:
        lm.close()


def test_a_model_and_the_arguments_for_one_are_too_much(make: Callable[..., Any]) -> None:
    lm, _ = make()
    with pytest.raises(ConfigError, match="not both"):
        DLPLoRALM(fused=lm.fused, method="oracle")
