"""Stream the text of one answer while it is generated in another thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer


class _Abandoned(StoppingCriteria):
    """Ends a generation when its reader is gone."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, input_ids: Tensor, scores: Tensor | None, **kwargs: Any) -> Tensor:
        """True for all rows (B,) once the reader has gone."""
        return torch.full((input_ids.shape[0],), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


def stream(generate: Callable[..., Any], tokenizer: Any, kwargs: dict[str, Any]) -> Iterator[str]:
    """Yield the text of an answer as it comes; the generation ends with the iterator.

    Args:
        generate: ``FusedCausalLM.generate``.
        tokenizer: Decodes the answer.
        kwargs: Of ``generate``, for one sequence.

    Raises:
        Whatever ``generate`` raises.
    """
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    abandoned = _Abandoned()
    criteria = StoppingCriteriaList([abandoned, *(kwargs.pop("stopping_criteria", None) or [])])
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="dlplora-stream") as threads:
        answer = threads.submit(generate, streamer=streamer, stopping_criteria=criteria, **kwargs)
        answer.add_done_callback(lambda _: streamer.end())  # an error ends the text as well
        try:
            yield from (piece for piece in streamer if piece)
        finally:
            abandoned.event.set()
    answer.result()
