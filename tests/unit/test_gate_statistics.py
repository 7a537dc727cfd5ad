"""What gates decided on prompts: against a loop in float64 over the gates' own answers, recorded one prompt at a time."""

from __future__ import annotations

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from torch import Tensor

from dlplora.baselines._gates import TokenGated, top_k_softmax
from dlplora.baselines.xlora import XLoRA
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.lm_eval.model import DLPLoRALM
from dlplora.methods.base import FusionMethod, Metadata, MethodContext
from dlplora.modules.lora_bank import AdapterBank

NAMES = ("alpha", "beta", "gamma")
PROMPTS = {"the cat sees": "alpha", "Mia likes the plum . what is it ? :": "beta", "who": "gamma", "one two three four": "nobody"}
CHOICES = (" a dog", " red", " blue . Tom is in", " no")


class LastChannels(TokenGated):
    """Weighs the experts by three channels of the layer's input and keeps two."""

    name = "last_channels"
    metadata = Metadata(title="Test rule", granularity="token", depth="module")

    def gate(self, module: str, x: Tensor) -> Tensor:
        return top_k_softmax(x[..., :3], 2)


def build(model: Any, tokenizer: Any, pool: Path, method: FusionMethod, **options: Any) -> DLPLoRALM:
    model = copy.deepcopy(model)
    context = MethodContext(tokenizer=tokenizer, embedding=model.get_input_embeddings())
    return DLPLoRALM(fused=FusedCausalLM(model, tokenizer, AdapterBank.from_pool(pool, NAMES), method, context=context), **options)


def requests(kind: str) -> list[Instance]:
    pairs: Any = [(prompt, choice) for prompt in PROMPTS for choice in CHOICES]
    if kind == "generate_until":
        pairs = [(prompt, {"until": ["\n"], "max_gen_toks": 3}) for prompt in PROMPTS]
    return [
        Instance(request_type=kind, doc={"task": PROMPTS[pair[0]]}, arguments=pair, idx=0, metadata=("t", index, 1))  # type: ignore[arg-type]
        for index, pair in enumerate(pairs)
    ]


def ask(lm: DLPLoRALM, kind: str) -> None:
    getattr(lm, kind)(requests(kind), disable_tqdm=True)


def noted(answers: list[Tensor], gate: Any, x: Tensor) -> Tensor:
    answers.append(gate(x))
    return answers[-1]


@torch.no_grad()
def by_hand(lm: DLPLoRALM) -> dict[str, float]:
    """Every prompt alone, without padding; all gates' answers kept and added up number by number."""
    kept = entropy = several = own = right = judged = 0.0
    for prompt, task in PROMPTS.items():
        answers: list[Tensor] = []
        handles = []
        for layer in lm.fused.patched.layers.values():
            gate = layer.gate
            layer.gate = partial(noted, answers, gate)
            handles.append((layer, gate))
        lm.fused.model(input_ids=torch.tensor([lm.tok_encode(prompt)]), use_cache=False)
        for layer, gate in handles:
            layer.gate = gate
        vectors = [token for answer in answers if answer.any() for token in answer[0].double().tolist()]
        kept += sum(sum(weight != 0 for weight in one) for one in vectors) / len(vectors)
        several += sum(sum(weight != 0 for weight in one) > 1 for one in vectors) / len(vectors)
        for one in vectors:
            total = sum(abs(weight) for weight in one)
            entropy -= sum(abs(w) / total * math.log(abs(w) / total) for w in one if w) / len(vectors)
        if task in NAMES:
            sums = [sum(one[expert] for one in vectors) for expert in range(3)]
            sizes = [sum(abs(one[expert]) for one in vectors) for expert in range(3)]
            judged += 1
            right += NAMES[sums.index(max(sums))] == task
            own += sizes[NAMES.index(task)] / sum(sizes)
    num = len(PROMPTS)
    return {
        "mean_experts_kept": kept / num, "mean_entropy_nats": entropy / num, "fraction_multi": several / num,
        "own_expert_share": own / judged, "router_accuracy": right / judged, "num_gated_prompts": num, "num_plans": 0,
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["loglikelihood", "generate_until"])
@pytest.mark.parametrize("share", ["auto", "never"])
@pytest.mark.parametrize("method", [LastChannels, XLoRA])  # X-LoRA reads everything once without adapters, which does not count
def test_figures_are_those_of_a_float64_loop(
    kind: str, share: str, method: type[FusionMethod], tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path
) -> None:
    lm = build(tiny_llama, tiny_tokenizer, tiny_pool, method(), batch_size=3, share_prefix=share)
    ask(lm, kind)
    ask(lm, kind)  # a prompt counts once
    found = lm.routing_statistics()
    for key, value in by_hand(lm).items():
        assert found[key] == pytest.approx(value, rel=1e-5), key


def test_nothing_is_left_on_the_layers(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    lm = build(tiny_llama, tiny_tokenizer, tiny_pool, LastChannels(), batch_size=3)
    gates = {name: layer.gate for name, layer in lm.fused.patched.layers.items()}
    ask(lm, "loglikelihood")
    assert {name: layer.gate for name, layer in lm.fused.patched.layers.items()} == gates


def test_rolling_texts_have_no_prompt_and_count_nothing(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    lm = build(tiny_llama, tiny_tokenizer, tiny_pool, LastChannels(), batch_size=3)
    lm.loglikelihood_rolling(
        [Instance(request_type="loglikelihood_rolling", doc={}, arguments=("the cat sees",), idx=0, metadata=("t", 0, 1))],
        disable_tqdm=True,
    )
    assert lm.routing_statistics()["num_gated_prompts"] == 0
    assert lm.routing_statistics()["mean_experts_kept"] is None


def test_the_confusion_of_composites_names_the_experts_that_answer_them() -> None:
    """Their prompts belong to no expert of their own name; composites without a routed prompt have no row."""
    from dlplora.reporting import store
    from dlplora.reporting.figures import routing_confusion

    records, problems = store.load_all(store.RESULTS, "nano_composite")
    own = [record for record in records if record.protocol_name == "nano_composite"]
    assert own
    assert not problems
    figure = routing_confusion(own, store.OutcomeReader(store.RESULTS))
    experts = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    rows = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert "news summary" in experts
    assert not set(rows) & set(experts)
    shares = figure.axes[0].images[0].get_array()
    assert shares.shape == (len(rows), len(experts))
    assert shares.sum(axis=1).tolist() == pytest.approx([100.0] * len(rows))
