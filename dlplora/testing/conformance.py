"""The checklist that every method must pass, as functions; run by ``tests/conformance``, and by authors on their own methods.

```python
from dlplora.testing import conformance

conformance.check(MyMethod)
```
``check`` makes a tiny random model with adapters; ``run_all`` takes a ``Case`` with your own model. A check that fails raises
``ConformanceError`` with its number. The references share no code with this library: the unpatched transformers model, or PEFT with one
adapter. A method that violates a check by definition declares it (``Metadata.exempt``, or ``combine="factor"`` for T12); it must then fail.

Run it in float32 on a tiny random model with non-trivial adapters (B not zero). Shapes: B rows, T tokens, E experts, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dlplora.errors import MethodError, nearest
from dlplora.methods.base import FusionMethod
from dlplora.testing.cases import (
    PROMPTS,
    Case,
    ConformanceError,
    fail,
    folder_of,
    forced,
    forced_names,
    fused_linears,
    logits_of,
    own_routing,
    positions_of,
    require_close,
    require_equal,
    routed_logits,
    single_adapter_logits,
    weights_of,
)
from dlplora.types import PromptBatch

if TYPE_CHECKING:
    from dlplora.inference.fused_model import FusedCausalLM

CONTINUATIONS = (" the red box", " a dog two three")


def check_t1_zero_weights_are_base(case: Case) -> None:
    """T1: with zero weights the logits are those of the unpatched model, bit for bit."""
    prompts = case.prompts()
    expected = logits_of(case.make_model(), prompts)
    with forced(case, torch.zeros(len(forced_names(case)))) as fused:
        require_equal(logits_of(fused, prompts), expected, "T1: zero weights against the base model")


def check_t2_one_hot_is_single_adapter(case: Case) -> None:
    """T2: all weight on one expert gives what PEFT gives with that adapter alone."""
    prompts = case.prompts()
    base = logits_of(case.make_model(), prompts)
    names = forced_names(case)
    for index, name in enumerate(names):
        expected = single_adapter_logits(case, folder_of(case, name), prompts)
        if float((expected - base).abs().max()) < 1e-2:
            raise MethodError(f"conformance: adapter '{name}' changes nothing; give a pool with random B.")
        with forced(case, nn.functional.one_hot(torch.tensor(index), len(names)).float()) as fused:
            require_close(logits_of(fused, prompts), expected, f"T2: expert '{name}' alone against PEFT")


def check_t3_equal_adapters(case: Case) -> None:
    """T3: if all adapters are the same and the weights sum to one, the result is that adapter; zero sums give the base."""
    first = case.pool / case.names[0]
    twins = case.workdir / "twins"
    for name in case.names:
        shutil.copytree(first, twins / name, dirs_exist_ok=True)
    prompts = case.prompts()
    adapted = single_adapter_logits(case, first, prompts)
    own_sum = case.build().weight_sum
    adapters = {role: first for role in case.build().artifact_roles if role.startswith("multitask")}
    if own_sum in {"one", "zero"}:
        expected = adapted if own_sum == "one" else logits_of(case.make_model(), prompts)
        with case.fused(bank=case.bank(twins), artifacts=adapters) as fused:
            require_close(routed_logits(fused, prompts), expected, "T3: own routing over equal adapters")
    names = forced_names(case)
    if set(names) <= set(case.names):
        shares = torch.arange(1.0, len(names) + 1.0)
        with forced(case, shares / shares.sum(), bank=case.bank(twins)) as fused:
            require_close(logits_of(fused, prompts), adapted, "T3: uneven weights over equal adapters")


def check_t4_rows_are_independent(case: Case) -> None:
    """T4: a row in any batch, in any order and padding, gives what it gives alone."""
    with case.fused() as fused:
        alone = [routed_logits(fused, case.prompts([row]))[0] for row in range(len(PROMPTS))]
        for rows in ((0, 1, 2, 3), (3, 1, 0, 2)):
            for left in (0, 5):
                batch = case.prompts(rows, left=left)
                together = routed_logits(fused, batch)
                for place, row in enumerate(rows):
                    real = together[place][batch.attention_mask[place].bool()]
                    require_close(real, alone[row], f"T4: prompt {row} in batch {rows} with {left} columns of left padding")


def check_t5_order_of_adapters(case: Case) -> None:
    """T5: another order of the adapters permutes the weights and changes no logit."""
    prompts = case.prompts()
    order = list(reversed(case.names))
    with case.fused() as fused:
        expected, plain, plain_names = routed_logits(fused, prompts), weights_of(fused, prompts), fused.bank.names
    with case.fused(bank=case.bank().select(order)) as fused:
        require_close(routed_logits(fused, prompts), expected, "T5: logits after reordering the adapters")
        moved = weights_of(fused, prompts)
        if plain is not None and moved is not None and set(plain_names) == set(order):
            columns = [plain_names.index(name) for name in fused.bank.names]
            require_close(moved, plain.expand(len(prompts), -1)[:, columns], "T5: weights after reordering the adapters")


def check_t6_causal(case: Case) -> None:
    """T6: what follows a position, a continuation to be scored above all, changes no logit up to it and no weight."""
    with case.fused() as fused:
        context = case.prompts([0])
        length = context.input_ids.shape[1]
        seen = []
        for text in CONTINUATIONS:
            tail = torch.tensor(case.tokenizer(text, add_special_tokens=False)["input_ids"])[None]
            ids = torch.cat([context.input_ids, tail], dim=1)
            with own_routing(fused, context):
                seen.append(logits_of(fused, PromptBatch(ids, torch.ones_like(ids), context.texts)))
        require_close(seen[1][:, :length], seen[0][:, :length], "T6: logits of the context under another continuation")
        if float((seen[1][:, length] - seen[0][:, length]).abs().max()) < 1e-6:
            raise MethodError("conformance: the continuations must differ in their first token.")
        cut = length // 2
        changed = context.input_ids.clone()
        changed[:, cut:] = changed[:, cut:].flip(1)
        with own_routing(fused, context):
            other = logits_of(fused, PromptBatch(changed, context.attention_mask, context.texts))
        require_close(other[:, :cut], seen[0][:, :cut], f"T6: logits before token {cut} after changing what follows")


@torch.no_grad()
def check_t7_cache(case: Case) -> None:
    """T7: token by token with a key-value cache gives the logits of one teacher-forced pass."""
    with case.fused() as fused:
        prompts = case.prompts([0])
        with own_routing(fused, prompts):
            expected = logits_of(fused, prompts)
            cache, steps = None, []
            for position in range(prompts.input_ids.shape[1]):
                out = fused(input_ids=prompts.input_ids[:, position : position + 1], past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                steps.append(out.logits)
        require_close(torch.cat(steps, dim=1), expected, "T7: incremental against teacher-forced logits")


def _check_weights(weights: Tensor, documented: str, num_experts: int, what: str) -> None:
    if weights.shape[-1] != num_experts:
        fail(f"T8: {what}: {weights.shape[-1]} weights for {num_experts} experts")
    if weights.dtype != torch.float32:
        fail(f"T8: {what}: weights are {weights.dtype}, expected torch.float32")
    if not bool(torch.isfinite(weights.half()).all()):
        fail(f"T8: {what}: weights are not finite in float16")
    if documented == "any":
        return
    if bool((weights < 0).any()):
        fail(f"T8: {what}: a weight is negative")
    total = weights.double().sum(-1)
    low, high = {"one": (1.0, 1.0), "zero": (0.0, 0.0), "at_most_one": (0.0, 1.0)}[documented]
    if bool(((total < low - 1e-5) | (total > high + 1e-5)).any()):
        fail(f"T8: {what}: weights sum to {total.min():.6f}..{total.max():.6f}, documented is '{documented}'")


@torch.no_grad()
def check_t8_weights(case: Case) -> None:
    """T8: weights are finite (in float16 too), not negative, and sum to what the method documents; so are those with a confidence."""
    with case.fused() as fused:
        documented = fused.method.weight_sum
        weights = weights_of(fused, case.prompts())
        if weights is not None:
            _check_weights(weights, documented, fused.bank.num_experts, "route")
            again, confidence = fused.request_router.route_with_confidence(case.prompts())
            if again is None:
                fail("T8: route_with_confidence: no weights, route has some")
            if again.dtype != torch.float32:  # the engine converts, another caller of ``route`` does not
                fail(f"T8: route: weights are {again.dtype}, expected torch.float32")
            require_close(fused.request_router.per_expert(again), weights, "T8: route_with_confidence against route")
            sure = [1.0] * len(weights) if confidence is None else confidence.tolist()
            if len(sure) != len(weights) or not all(0.0 < one < 1.0 + 1e-6 for one in sure):
                fail(f"T8: route_with_confidence: confidence {sure} for {len(weights)} prompts, expected one in (0, 1] for each")
        routed_logits(fused, case.prompts())  # a gate may answer by what the forward pass left for it
        for layer in fused_linears(fused):
            if layer.gate is not None:
                for scale in (1e-3, 1.0, 1e3):
                    x = torch.randn(2, 3, layer.in_features, generator=torch.Generator().manual_seed(0)) * scale
                    _check_weights(layer.gate(x), documented, fused.bank.num_experts, f"gate on inputs of size {scale:g}")


def _training_batch(case: Case, fused: FusedCausalLM, left: int = 0, right: int = 0) -> dict[str, Any]:
    """A batch as ``FusionMethod.loss`` documents it, with padding of the check's choice."""
    prompts = case.prompts(left=left, right=right)
    full = PromptBatch.from_texts([f"{text}{CONTINUATIONS[row % 2]}" for row, text in enumerate(PROMPTS)], case.tokenizer)
    in_prompt = torch.arange(full.input_ids.shape[1])[None] < prompts.attention_mask.sum(1)[:, None]
    labels = full.input_ids.masked_fill((full.attention_mask == 0) | in_prompt, -100)
    pad = nn.functional.pad
    ids = pad(full.input_ids, (left, right), value=int(case.tokenizer.pad_token_id))
    mask, labels = pad(full.attention_mask, (left, right)), pad(labels, (left, right), value=-100)

    def answer_loss(weights: Tensor | None) -> Tensor:
        with contextlib.nullcontext() if weights is None else fused.routing(weights):
            logits = fused(input_ids=ids, attention_mask=mask, position_ids=positions_of(mask)).logits
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)

    assert prompts.task_names is not None
    expert_idx = torch.tensor([list(case.names).index(str(name)) for name in prompts.task_names])
    return {
        "prompts": prompts,
        "expert_idx": expert_idx,
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "answer_loss": answer_loss,
        "model": fused,
    }


def check_t9_gradients(case: Case) -> None:
    """T9: training moves the method's own parameters and nothing else; an untrained method refuses to be trained."""
    with case.fused() as fused:
        if not fused.method.metadata.trainable:
            if any(parameter.requires_grad for parameter in fused.method.parameters()):
                fail("T9: the method declares itself not trainable but holds parameters that require gradients")
            try:
                fused.method.loss(_training_batch(case, fused))
            except MethodError:
                return
            fail("T9: the method declares itself not trainable but has a loss")
        fused.requires_grad_(False)  # as the training shell does
        fused.method.requires_grad_(True)
        own = dict(fused.method.named_parameters())
        owned = {id(parameter) for parameter in own.values()}
        strangers = {name: parameter for name, parameter in fused.named_parameters() if id(parameter) not in owned}
        start = {name: parameter.detach().clone() for name, parameter in [*own.items(), *strangers.items()]}
        checksum = fused.bank.checksum()
        optimizer = torch.optim.SGD(own.values(), lr=0.1)
        fused.method.loss(_training_batch(case, fused)).backward()
        optimizer.step()
        if not any(not torch.equal(start[name], parameter) for name, parameter in own.items()):
            fail("T9: a training step changed none of the method's parameters")
        for name, parameter in strangers.items():
            if parameter.grad is not None:
                fail(f"T9: a gradient reached '{name}', which is not the method's")
            require_equal(parameter, start[name], f"T9: '{name}', which is not the method's, after training")
        if fused.bank.checksum() != checksum:
            fail("T9: training changed the adapters")


def check_t10_round_trip(case: Case) -> None:
    """T10: a saved and loaded method gives the same logits, bit for bit."""
    prompts = case.prompts()
    folder = case.workdir / "saved"
    with case.fused() as fused:
        expected = routed_logits(fused, prompts)
        fused.method.save(folder)
        cls, context = type(fused.method), case.context(fused.model)
        loaded = cls.load(folder, case.bank(), context)
    with case.fused(method=loaded) as fused:
        require_equal(routed_logits(fused, prompts), expected, "T10: logits of the loaded method")


def check_t11_padding(case: Case) -> None:
    """T11: neither the side nor the amount of padding changes a weight or a training loss."""
    with case.fused() as fused:
        plain, loss = weights_of(fused, case.prompts()), None
        trainable = fused.method.metadata.trainable
        if trainable:
            loss = fused.method.loss(_training_batch(case, fused))
        for left, right in ((4, 0), (0, 7), (3, 2)):
            if plain is not None:
                padded = weights_of(fused, case.prompts(left=left, right=right))
                assert padded is not None
                require_equal(padded, plain, f"T11: weights with {left} padding columns on the left and {right} on the right")
            if loss is not None:
                again = fused.method.loss(_training_batch(case, fused, left, right))
                require_close(again, loss, f"T11: loss with {left} padding columns on the left and {right} on the right")


@torch.no_grad()
def check_t12_linear_in_weights(case: Case) -> None:
    """T12: at the first fused layer the delta is linear in the weights; factor fusion must break this."""
    count = len(forced_names(case))
    generator = torch.Generator().manual_seed(0)
    one, two = torch.rand(count, generator=generator), torch.rand(count, generator=generator)

    def delta(weights: Tensor) -> Tensor:
        with forced(case, weights) as fused:
            layer = fused_linears(fused)[0]
            x = torch.randn(2, 3, layer.in_features, generator=torch.Generator().manual_seed(1))
            return layer(x) - layer.base(x)

    require_close(delta(one + two), delta(one) + delta(two), "T12: delta of a sum of weights")
    require_close(delta(2.0 * one), 2.0 * delta(one), "T12: delta of doubled weights")


def check_t13_evaluation_mode(case: Case) -> None:
    """T13: a model in evaluation mode holds no module in training mode, dropout above all."""
    with case.fused() as fused:
        routed_logits(fused, case.prompts())  # a module may wake up when it is used
        for root in (fused, fused.method):
            for name, module in root.named_modules():
                if module.training:
                    fail(f"T13: module '{name}' ({type(module).__name__}) is in training mode")


CHECKS: dict[str, Callable[[Case], None]] = {
    "T1": check_t1_zero_weights_are_base,
    "T2": check_t2_one_hot_is_single_adapter,
    "T3": check_t3_equal_adapters,
    "T4": check_t4_rows_are_independent,
    "T5": check_t5_order_of_adapters,
    "T6": check_t6_causal,
    "T7": check_t7_cache,
    "T8": check_t8_weights,
    "T9": check_t9_gradients,
    "T10": check_t10_round_trip,
    "T11": check_t11_padding,
    "T12": check_t12_linear_in_weights,
    "T13": check_t13_evaluation_mode,
}


def exempt_lines(method: FusionMethod) -> frozenset[str]:
    """Checks that the method declares to violate."""
    declared = set(method.metadata.exempt)
    if method.metadata.combine == "factor":
        declared.add("T12")
    return frozenset(declared)


def run_check(line: str, case: Case) -> None:
    """Run one check; a check that the method is exempt from must fail.

    Raises:
        ConformanceError: If the check fails, or passes although the method declares that it cannot.
    """
    if line not in exempt_lines(case.build()):
        CHECKS[line](case)
        return
    try:
        CHECKS[line](case)
    except ConformanceError:
        return
    raise ConformanceError(f"{line} passes although the method declares that it violates it; remove it from Metadata.exempt.")


def run_all(case: Case) -> None:
    """Run the whole checklist."""
    for line in CHECKS:
        run_check(line, case)


def check(method: str | Callable[[], FusionMethod], lines: Sequence[str] | None = None) -> None:
    """Run the checklist on a method, with a tiny random model and adapters made here.

    Args:
        method: A method class or any function that makes the method, unbound; or the name of a preset or of an installed method.
        lines: Some checks only, ``("T1", "T4")`` for example.

    Raises:
        ConformanceError: For the first check that fails.
        MethodError: If the method or a check is unknown.
    """
    from dlplora.methods.registry import build_stand_in
    from dlplora.testing.tiny import tiny_setup, write_adapter

    build = partial(build_stand_in, method) if isinstance(method, str) else method
    for line in lines or ():
        if line not in CHECKS:
            raise MethodError(f"unknown check '{line}'.{nearest(line, CHECKS)} Known: {', '.join(CHECKS)}.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny = tiny_setup(folder)
        multitask = write_adapter(tiny.model, folder / "multitask", seed=9)
        case = Case(
            build=build,
            make_model=lambda: copy.deepcopy(tiny.model),
            tokenizer=tiny.tokenizer,
            pool=tiny.uniform_pool if build().metadata.combine == "factor" else tiny.pool,
            workdir=folder / "work",
            artifacts=dict.fromkeys(("multitask", "multitask_r64", "multitask_r208"), multitask),
        )
        case.workdir.mkdir()
        for line in lines or CHECKS:
            run_check(line, case)
