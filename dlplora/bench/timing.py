"""A small honest clock: our decoding against PEFT with one adapter, in one process, on one machine.

Both models are driven through ``generate`` with greedy decoding and a forced number of tokens, turn by turn, so that
whatever else the machine does hits both. A timestamp is taken after every token, once the device has finished: the
first one gives the time to the first token (TTFT, with routing and prefill), the rest the time per output token (TPOT).
Only ratios mean something outside the machine they were measured on. Shapes: B rows, T tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from dlplora.errors import ConfigError, GenerationError
from dlplora.inference.loading import read_backbone, resolve_backbone
from dlplora.reporting.latency.records import iqr
from dlplora.types import PromptBatch

if TYPE_CHECKING:
    from dlplora.inference.fused_model import FusedCausalLM


@dataclass(frozen=True, slots=True)
class Samples:
    """Raw times of one quantity, in seconds, in the order they were taken."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median, s."""
        return statistics.median(self.seconds)

    @property
    def iqr(self) -> float:
        """Distance between the quartiles, s; 0 for a single sample."""
        return iqr(self.seconds)


@dataclass(frozen=True, kw_only=True, slots=True)
class LatencyResult:
    """Raw samples of both models and the ratios of their medians (ours / reference; below 1 is faster)."""

    ttft: Samples
    """Ours, routing included: one sample a repeat."""
    tpot: Samples
    """Ours, mean over the tokens after the first: one sample a repeat."""
    reference_ttft: Samples
    reference_tpot: Samples
    router: Samples
    """Planning alone, which ``ttft`` contains."""
    prompt_tokens: int
    new_tokens: int
    batch_size: int
    warmup: int
    device: str
    dtype: str
    backend: str
    """Kernel backend of ours, as configured."""

    @property
    def ttft_ratio(self) -> float:
        """Median TTFT over the reference's."""
        return self.ttft.median / self.reference_ttft.median

    @property
    def tpot_ratio(self) -> float:
        """Median TPOT over the reference's."""
        return self.tpot.median / self.reference_tpot.median

    def as_record(self) -> dict[str, Any]:
        """A JSON-ready mapping: settings, raw samples, medians and quartile distances in seconds, and both ratios."""
        record = asdict(self)
        for name in ("ttft", "tpot", "reference_ttft", "reference_tpot", "router"):
            samples: Samples = getattr(self, name)
            record[name] = {"samples_s": list(samples.seconds), "median_s": samples.median, "iqr_s": samples.iqr}
        return record | {"ttft_ratio": self.ttft_ratio, "tpot_ratio": self.tpot_ratio}


def load_peft_reference(
    pretrained: str | Path, adapter: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu", **loading: Any
) -> Any:
    """The backbone with one PEFT adapter, base and adapter in the same dtype.

    PEFT casts bfloat16 adapters up to float32 unless told otherwise, which would make the reference slower than it is.

    Args:
        pretrained: Folder or hub id of the backbone.
        adapter: PEFT folder.
        loading: Revision, quantisation and what else ``read_backbone`` takes; the same as for the model it is compared with.
    """
    from peft import PeftModel

    base, _ = read_backbone(resolve_backbone(pretrained), dtype, device, **loading)
    adapted = PeftModel.from_pretrained(base, str(adapter), autocast_adapter_dtype=False)
    for key, parameter in adapted.named_parameters():
        if "lora_" in key:
            parameter.data = parameter.data.to(device=device, dtype=dtype)
    return adapted.eval()


def measure_decode_ratio(
    model: FusedCausalLM,
    reference: Any,
    *,
    input_ids: Tensor,
    new_tokens: int = 64,
    warmup: int = 2,
    repeats: int = 7,
    task_names: Sequence[str] | None = None,
) -> LatencyResult:
    """Time our generation against a reference that generates the same number of tokens from the same prompts.

    Args:
        model: Ours.
        reference: A model with ``generate``, usually ``load_peft_reference(...)``, on the same device, in the same dtype.
        input_ids: Prompts of equal length, without padding, int64 (B, T).
        new_tokens: Tokens to generate, at least 2; both models generate exactly that many.
        warmup: Unrecorded rounds.
        repeats: Recorded rounds; within a round both models take their turn, in alternating order.
        task_names: One a row, for methods that need the task.

    Raises:
        ConfigError: If the models differ in dtype or device, or a number is too small.
        GenerationError: If the prompt and the new tokens do not fit, or a model generated another number of tokens.
    """
    _check(model, reference, input_ids, new_tokens, warmup, repeats)
    ids = input_ids.to(model.device)
    mask = torch.ones_like(ids)
    texts = tuple(str(text) for text in model.tokenizer.batch_decode(ids, skip_special_tokens=True))
    prompts = PromptBatch(ids, mask, texts, None if task_names is None else tuple(task_names))
    forced = {
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "do_sample": False,
        "pad_token_id": model.tokenizer.pad_token_id,
    }
    turns: dict[str, Callable[..., Tensor]] = {
        "ours": lambda **options: model.generate(input_ids=ids, attention_mask=mask, prompts=prompts, **forced, **options),
        "reference": lambda **options: reference.generate(input_ids=ids, attention_mask=mask, **forced, **options),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in turns}
    router_s: list[float] = []
    with torch.inference_mode():
        for index in range(warmup + repeats):
            order = list(turns) if index % 2 == 0 else list(reversed(turns))
            measured = {name: time_generation(turns[name], ids.shape[1] + new_tokens, model.device) for name in order}
            planning_s = time_call(lambda: model.plan(prompts), model.device)
            if index >= warmup:
                router_s.append(planning_s)
                for name, pair in measured.items():
                    times[name].append(pair)
    return LatencyResult(
        ttft=Samples(tuple(first for first, _ in times["ours"])),
        tpot=Samples(tuple(rest for _, rest in times["ours"])),
        reference_ttft=Samples(tuple(first for first, _ in times["reference"])),
        reference_tpot=Samples(tuple(rest for _, rest in times["reference"])),
        router=Samples(tuple(router_s)),
        prompt_tokens=ids.shape[1],
        new_tokens=new_tokens,
        batch_size=ids.shape[0],
        warmup=warmup,
        device=str(model.device),
        dtype=str(dtype_of(model.model)).removeprefix("torch."),
        backend=str(model.backend),
    )


class TokenClock(StoppingCriteria):
    """Notes when each token was there; never stops."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stamps: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        synchronize(self.device)
        self.stamps.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def time_generation(generate: Callable[..., Tensor], expected_width: int, device: torch.device) -> tuple[float, float]:
    """(TTFT, TPOT) of one call, s.

    Args:
        generate: Takes ``stopping_criteria`` and returns the prompt with exactly the tokens asked for.
        expected_width: Tokens of both together.
        device: Where it runs.

    Raises:
        GenerationError: If another number of tokens came, so that times would not compare.
    """
    clock = TokenClock(device)
    synchronize(device)
    start = time.perf_counter()
    output = generate(stopping_criteria=StoppingCriteriaList([clock]))
    if output.shape[1] != expected_width:
        raise GenerationError(f"expected {expected_width} tokens with the prompt, got {output.shape[1]}; nothing was measured.")
    return clock.stamps[0] - start, (clock.stamps[-1] - clock.stamps[0]) / (len(clock.stamps) - 1)


def time_call(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, until the device has finished."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait until everything given to the device is done; a CPU is never behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def dtype_of(model: Any) -> torch.dtype:
    """Dtype of a model's first floating-point parameter."""
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


def _check(model: FusedCausalLM, reference: Any, input_ids: Tensor, new_tokens: int, warmup: int, repeats: int) -> None:
    if new_tokens < 2 or repeats < 1 or warmup < 0:
        raise ConfigError(f"need new_tokens >= 2, repeats >= 1, warmup >= 0, got {new_tokens}, {repeats}, {warmup}.")
    if input_ids.ndim != 2:
        raise ConfigError(f"input_ids must be (rows, tokens), got shape {tuple(input_ids.shape)}.")
    if input_ids.shape[1] + new_tokens > model.max_length:
        raise GenerationError(f"{input_ids.shape[1]} prompt and {new_tokens} new tokens exceed the model's {model.max_length}.")
    ours = dtype_of(model.model)
    theirs = {parameter.dtype for parameter in reference.parameters() if parameter.is_floating_point()}
    if theirs != {ours}:
        found = ", ".join(sorted(str(dtype) for dtype in theirs))
        raise ConfigError(f"the reference must be all {ours} like ours, found {found}. Load it with autocast_adapter_dtype=False.")
    devices = {parameter.device.type for parameter in reference.parameters()}
    if devices != {torch.device(model.device).type}:
        raise ConfigError(f"the reference is on {sorted(devices)}, ours on {model.device}; move one of them.")
    if reference.training:
        raise ConfigError("the reference is in training mode, where adapters drop inputs; call .eval() first.")
