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
    greedy = request.temperature == 0
    parameters: dict[str, Any] = {
        "merged_adapters": dict(merged),
        "max_new_tokens": request.limit or default_tokens,
        "do_sample": not greedy,
        "temperature": None if greedy else request.temperature,
        "top_p": None if greedy or request.top_p == 1 else request.top_p,
        "seed": request.seed,
        "stop": list(request.stops),
        "return_full_text": False,
        "details": True,
    }
    return {"inputs": prompt, "parameters": {key: value for key, value in parameters.items() if value is not None}}


class LoraxFormat:
    """Answers of LoRAX's endpoint in OpenAI's form, for one request."""

    def __init__(self, chat: bool) -> None:
        self.chat = chat
        name = "chat.completion" if chat else "text_completion"
        self.head = {"id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", "created": int(time.time())}
        self.names = (name, f"{name}.chunk" if chat else name)

    def whole(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """A whole answer."""
        text, details = str(found.get("generated_text", "")), found.get("details") or {}
        content: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": _reason(details)}
        prompt, new = int(details.get("prompt_tokens") or 0), int(details.get("generated_tokens") or 0)
        usage = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
        return {**self.head, "object": self.names[0], "choices": [choice], "usage": usage}

    def chunk(self, event: Mapping[str, Any]) -> dict[str, Any]:
        """One event of the stream."""
        token = event.get("token") or {}
        text = "" if token.get("special") else str(token.get("text", ""))
        details = event.get("details")
        content: dict[str, Any] = {"delta": {"content": text}} if self.chat else {"text": text}
        reason = _reason(details) if details else None
        return {**self.head, "object": self.names[1], "choices": [{"index": 0, **content, "logprobs": None, "finish_reason": reason}]}


def _reason(details: Mapping[str, Any]) -> str:
    return _REASONS.get(str(details.get("finish_reason")), "stop")
