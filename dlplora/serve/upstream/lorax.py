"""LoRAX's own endpoint, which merges adapters per request, behind OpenAI's request format.

LoRAX merges the factors A and B of the adapters, not their products, so it computes another fusion when a request uses several adapters.

Source: LoRAX, docs/guides/merging_adapters.md and its REST API (``/generate``, ``/generate_stream``).
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Any

from dlplora.serve.jobs import BadRequestError
from dlplora.serve.sampling import GREEDY_BELOW
from dlplora.serve.schemas import ChatRequest, CompletionRequest

_REASONS = {"length": "length"}


def generate_body(request: ChatRequest | CompletionRequest, prompt: str, merged: Mapping[str, Any], default_tokens: int) -> dict[str, Any]:
    """The body of ``/generate`` and ``/generate_stream``.

    Raises:
        BadRequestError: For several choices or log-probabilities, which this endpoint is not asked for.
    """
    if request.n != 1:
        raise BadRequestError("several weighted adapters and 'n' above 1 cannot be combined on this upstream server.", "n")
    if request.num_logprobs is not None:
        raise BadRequestError("several weighted adapters and 'logprobs' cannot be combined on this upstream server.", "logprobs")
    greedy = request.top_p == 0 or (request.temperature is not None and request.temperature < GREEDY_BELOW)
    parameters: dict[str, Any] = {
        "merged_adapters": dict(merged),
        "max_new_tokens": request.limit or default_tokens,
        "do_sample": not greedy,
        "temperature": None if greedy else request.temperature,
        "top_p": None if greedy or request.top_p == 1 else request.top_p,
        "frequency_penalty": request.frequency_penalty,
        "presence_penalty": request.presence_penalty,
        "ignore_eos_token": request.ignore_eos or None,
        "seed": None if request.seed is None else request.seed % 2**63,
        "stop": list(request.stops),
        "return_full_text": False,
        "details": True,
    }
    return {"inputs": prompt, "parameters": {key: value for key, value in parameters.items() if value is not None}}


def openai_fields(sent: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a request for LoRAX's OpenAI endpoints: some have another name there, or take fewer values."""
    found = {("ignore_eos_token" if key == "ignore_eos" else key): value for key, value in sent.items()}
    if found.get("seed") is not None:
        found["seed"] %= 2**63
    if isinstance(found.get("stop"), str):
        found["stop"] = [found["stop"]]
    return found


class LoraxFormat:
    """Answers of LoRAX's endpoint in OpenAI's form, for one request.

    Attributes:
        complete: Whether the last event of a stream came; this endpoint sends no ``[DONE]``.
    """

    def __init__(self, chat: bool, usage: bool) -> None:
        self.chat, self.usage = chat, usage
        self.complete = False
        self.first = {"role": "assistant"}
        name = "chat.completion" if chat else "text_completion"
        self.head = {"id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", "created": int(time.time())}
        self.names = (name, f"{name}.chunk" if chat else name)

    def whole(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """A whole answer."""
        text, details = str(found.get("generated_text", "")), found.get("details") or {}
        content: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": _reason(details)}
        return {**self.head, "object": self.names[0], "choices": [choice], "usage": _usage(details)}

    def chunks(self, event: Mapping[str, Any]) -> list[dict[str, Any]]:
        """One event of the stream; the last one is followed by the usage, if it is wanted."""
        token = event.get("token") or {}
        text = "" if token.get("special") else str(token.get("text", ""))
        details = event.get("details")
        first, self.first = self.first, {}
        content: dict[str, Any] = {"delta": {**first, "content": text}} if self.chat else {"text": text}
        reason = _reason(details) if details else None
        head = {**self.head, "object": self.names[1]}
        self.complete = self.complete or bool(details)
        found = [{**head, "choices": [{"index": 0, **content, "logprobs": None, "finish_reason": reason}]}]
        return [*found, {**head, "choices": [], "usage": _usage(details)}] if details and self.usage else found


def _usage(details: Mapping[str, Any]) -> dict[str, int]:
    prompt, new = int(details.get("prompt_tokens") or 0), int(details.get("generated_tokens") or 0)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def _reason(details: Mapping[str, Any]) -> str:
    return _REASONS.get(str(details.get("finish_reason")), "stop")
