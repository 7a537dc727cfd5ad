"""The engine: one thread that owns the model and advances all running requests by one token per step.

Requests join and leave between steps. A step processes at most one chunk of a prompt, then runs one forward pass over all decoding rows,
each under its own routing weights. All rows with a sentence end in a step are routed in one batch.

Decoding rows are in the first slots, in order; the row after them, if any, is processing its prompt.
Shapes: B rows, T tokens, E experts, V vocabulary.
"""

from __future__ import annotations

import inspect
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dlplora.errors import DLPLoRAError, GenerationError
from dlplora.inference.finite import NOT_FINITE as NOT_FINITE_LOGITS
from dlplora.inference.finite import is_finite
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.serve.batch import Batch
from dlplora.serve.deciding import Decider, require_servable
from dlplora.serve.failures import FAILURES, settle, shown
from dlplora.serve.intake import Intake
from dlplora.serve.jobs import Decision, Failed, Job, Sentence, Started
from dlplora.serve.options import EngineOptions
from dlplora.serve.rows import Row
from dlplora.serve.sampling import Chosen
from dlplora.serve.slots import SlotCache, causal_mask, check_slots

log = logging.getLogger(__name__)
__all__ = ["Engine", "EngineOptions"]


class Engine(Intake):
    """Runs jobs on a fused model until it is closed.

    Args:
        fused: The model; nothing else may use it at the same time.
        options: Bounds.

    Raises:
        ConfigError: If the method or the base model cannot be served this way.
    """

    def __init__(self, fused: FusedCausalLM, options: EngineOptions | None = None) -> None:
        self.options = options or EngineOptions()
        self.max_model_len = min(self.options.max_model_len or 4096, fused.max_length)
        super().__init__(self.options.max_queue)
        self._admitted: deque[Job] = deque()
        """Taken from those that wait, but in no slot yet."""
        self._state: Any = None
        self.adopt(fused)
        check_slots(fused, self._cache)
        self._thread = threading.Thread(target=self._run, name="dlplora-engine", daemon=True)
        self._thread.start()

    def adopt(self, fused: FusedCausalLM) -> None:
        """Serve another model; only before the start, or from the engine's thread while no request is in a slot."""
        require_servable(fused)
        self.fused = fused
        self.decider = Decider(fused, self.options.min_confidence)
        self._cache = SlotCache(fused.config, self.options.max_batch + 1, self.max_model_len)
        self._batch = Batch(self._cache)
        eos = fused.generation_config.eos_token_id if fused.generation_config.eos_token_id is not None else fused.tokenizer.eos_token_id
        takes = inspect.signature(fused.model.forward).parameters
        self._last_only: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self._eos = frozenset(eos if isinstance(eos, (list, tuple)) else [eos]) - {None}

    # ------------------------------------------------------------------ called from other threads

    @property
    def num_running(self) -> int:
        """Requests in a slot."""
        return len(self._batch)

    @property
    def is_alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive()

    def cache_bytes(self) -> int:
        """Bytes of keys and values held now."""
        return self._cache.num_bytes()

    def run_idle(self, task: Callable[[], FusedCausalLM | None]) -> FusedCausalLM | None:
        """Run a task in the engine's thread when no request is in a slot; waiting requests stay in the queue.

        Args:
            task: May return another model, which is served from then on.

        Raises:
            DLPLoRAError: What the task raised; the engine keeps the model it had.
            GenerationError: If the engine is closed.
        """

        def adopt() -> FusedCausalLM | None:
            found = task()
            if found is not None:
                self.adopt(found)
            return found

        found: FusedCausalLM | None = self._result(self._tasks, adopt)
        return found

    def close(self) -> None:
        """End the thread; unfinished jobs are reported as failed."""
        with self._ready:
            self._closed = True
            self._ready.notify()
        self._thread.join()

    # ------------------------------------------------------------------ the loop

    def _run(self) -> None:
        try:
            while self._wait(lambda: self.num_running > 0):
                try:
                    self._advance()
                except FAILURES as error:  # the model's own errors: out of memory, a shape that does not fit
                    log.exception("a step failed; its requests are reported as failed")
                    self._fail_all(error)
        finally:  # any other error ends the thread, and nobody may wait for it
            self._fail_all(GenerationError("the server is shutting down."), self._end())

    def _fail_all(self, error: Exception, waiting: Sequence[Job] = ()) -> None:
        jobs = dict.fromkeys([*(row.job for row in self._batch.clear()), *self._admitted, *waiting])
        self._admitted.clear()
        self._state = None
        for job in jobs:
            job.report(Failed(shown(error)))

    def _advance(self) -> None:
        for row in [row for row in self._batch.everyone if row.job.cancelled]:
            row.finish("cancelled")
            self._leave(row)
        while self._calls:
            settle(*self._calls.popleft())
        if self._tasks:
            if not len(self._batch):
                settle(*self._tasks.popleft())
                return
        else:
            self._admit()
        chosen = self._batch.next_chunk(self.options.prefill_chunk)
        if chosen:
            try:
                self._process_chunk(self._batch.arrange(chosen))
            except FAILURES as error:  # the requests that decode go on
                for row, _ in chosen:
                    self._fail(row, error)
        if self._batch.rows:
            self._step()

    def _admit(self) -> None:
        """Give the free slots to the requests that have waited longest; their prompts are routed in one batch."""
        with self._ready:
            free = min(len(self._waiting), self.options.max_batch - len(self._batch))
            self._admitted.extend(self._waiting.popleft() for _ in range(free))
        if not self._admitted:
            return
        found = self.decider.decide_each([job.target for job in self._admitted], [job.routed_text for job in self._admitted])
        for one in found:
            job = self._admitted[0]
            if isinstance(one, DLPLoRAError):
                job.report(Failed(one))
            else:
                self._begin(job, *one)
            self._admitted.popleft()

    def _begin(self, job: Job, decision: Decision, weights: Tensor) -> None:
        try:
            row = Row(job, self.fused.tokenizer, self.fused.vocabulary, self.fused.device, weights=weights, routing_s=decision.seconds)
        except FAILURES as error:
            log.exception("request %d is reported as failed", job.number)
            job.report(Failed(shown(error)))
            return
        row.out_of_scope = decision.out_of_scope
        job.report(Started(decision))
        self._batch.join(row)

    def _fail(self, row: Row, error: Exception) -> None:
        """End one request with an error and clear its slot, unless it has left already."""
        if row not in self._batch.everyone:
            return
        if not isinstance(error, DLPLoRAError):
            log.error("request %d is reported as failed", row.job.number, exc_info=error)
        self._cache.erase(self._batch.everyone.index(row))
        self._leave(row)
        row.job.report(Failed(shown(error)))

    def _leave(self, row: Row) -> None:
        if row in self._batch.rows:
            self._state = None
        self._batch.leave(row)

    # ------------------------------------------------------------------ forwards

    @torch.inference_mode()
    def _process_chunk(self, chunk: Sequence[tuple[Row, int]]) -> None:
        """Process the next tokens of some prompts in one padded batch; finished prompts begin to decode.

        Rows end in the same column. Padding in front of them is written where the row's next token will be written, behind
        all that the row's tokens see.
        """
        fused, first = self.fused, len(self._batch.rows)
        width = max(count for _, count in chunk)
        ids, places = [], []
        for row, count in chunk:
            end, padding = row.cached + count, width - count
            ids.append([row.pending[0]] * padding + row.pending[:count])
            places.append([end] * padding + list(range(row.cached, end)))
        positions = torch.tensor(places, device=fused.device)
        length = max(map(max, places)) + 1
        started = time.perf_counter()
        weights = torch.stack([row.weights for row, _ in chunk if row.weights is not None])
        state = fused.request_router.state(weights, prompt_tokens=width)
        self._cache.at(first, positions, length)
        with fused.routing(state):
            spent = time.perf_counter() - started
            logits = fused(
                input_ids=torch.tensor(ids, device=fused.device),
                attention_mask=causal_mask(positions, length, fused.dtype),
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
                **self._last_only,
            ).logits[:, -1]
        for row, count in chunk:
            row.cached, row.pending = row.cached + count, row.pending[count:]
            row.routing_s += spent
        ends = [row for row, _ in chunk if not row.pending]
        self._batch.begin_decoding(len(ends))
        self._state = None if ends else self._state
        resumed = {id(row) for row in ends if row.resumes}
        for row in ends:
            row.resumes = False
        sound = self._sound([row for row, _ in chunk], logits)
        self._take([(row, place) for place, row in sound if not row.pending and id(row) not in resumed], logits)

    @torch.inference_mode()
    def _step(self) -> None:
        """One token for every row that decodes."""
        fused, rows = self.fused, list(self._batch.rows)
        positions = torch.tensor([[row.cached] for row in rows], device=fused.device)
        length = max(row.cached for row in rows) + 1
        if self._state is None:
            weights = torch.stack([row.weights for row in rows if row.weights is not None])
            bare = not any(self._may_change(row) for row in rows) and not weights.any()  # then the layers skip the adapters
            self._state = fused.request_router.state(weights, reroutes=not bare, prompt_tokens=1, new_tokens=self.max_model_len)
        self._cache.at(0, positions, length)
        with fused.routing(self._state):
            logits = fused(
                input_ids=torch.tensor([[row.newest] for row in rows], device=fused.device),
                attention_mask=causal_mask(positions, length, fused.dtype),
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
            ).logits[:, -1]
        for row in rows:
            row.cached += 1
        self._take([(row, place) for place, row in self._sound(rows, logits)], logits)

    def _sound(self, rows: Sequence[Row], logits: Tensor) -> list[tuple[int, Row]]:
        """The rows with finite logits (B, V), with their places; the others are ended."""
        finite = is_finite(logits).tolist()
        for row, fine in zip(rows, finite, strict=True):
            if not fine:
                self._fail(row, GenerationError(NOT_FINITE_LOGITS))
        return [(place, row) for place, row in enumerate(rows) if finite[place]]

    def _take(self, taken: Sequence[tuple[Row, int]], logits: Tensor) -> None:
        """Sample a token for each row from its place in the logits, end what has ended, and route again where a sentence ended."""
        greedy = logits.argmax(dim=-1).tolist()
        going: list[Row] = []
        for row, place in taken:
            try:
                chosen = Chosen(greedy[place]) if row.sampler.is_plain_greedy else row.sampler.choose(logits[place])
                reason = row.take(chosen, self._eos)
            except FAILURES as error:  # of this request's sampling or text; the others go on
                self._fail(row, error)
                continue
            if reason is None and row.cached + 1 > self.max_model_len:
                reason = "length"
            if reason is None:
                going.append(row)
            else:
                row.finish(reason)
                self._leave(row)
        self._reroute(going)

    def _may_change(self, row: Row) -> bool:
        """Whether a row is routed again at sentence ends."""
        return self.fused.method.granularity == "sentence" and row.job.target.kind == "routed" and not row.out_of_scope

    def _reroute(self, rows: list[Row]) -> None:
        """Route the rows with a sentence end at the newest token, in one batch."""
        ended: list[Row] = []
        views: list[str] = []
        for row in filter(self._may_change, rows):
            try:
                view = row.ended_sentence(self.fused.method.view)
            except FAILURES as error:
                self._fail(row, error)
                continue
            if view is not None:
                ended.append(row)
                views.append(view)
        if not ended:
            return
        found = self.decider.decide_each([row.job.target for row in ended], views, prompts=False)
        decided: list[tuple[Row, Tensor]] = []
        for row, one in zip(ended, found, strict=True):
            if isinstance(one, DLPLoRAError):
                self._fail(row, one)
            else:
                row.job.report(Sentence(len(row.detokenizer.text), one[0]))
                decided.append((row, one[1]))
        if decided:
            self._switch([row for row, _ in decided], torch.stack([own for _, own in decided]))

    def _switch(self, rows: Sequence[Row], weights: Tensor) -> None:
        """Give rows new weights (N, E), and the running state those of all of them at once."""
        before = torch.stack([row.weights for row in rows if row.weights is not None])
        changed = [place for place, differs in enumerate((before != weights).any(dim=-1).tolist()) if differs]
        for place in changed:
            rows[place].weights = weights[place]
        if self.fused.method.kv_policy == "recompute":
            for row in [rows[place] for place in changed]:
                self._leave(row)
                row.restart()
                self._batch.join(row)
        elif changed and self._state is not None:
            places = [self._batch.rows.index(rows[place]) for place in changed]
            self._state.update_rows(torch.tensor(places, device=weights.device), weights[changed])
