"""Requests in progress: from a parsed body to jobs of the engine, and from their events to a response."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from dlplora.errors import DLPLoRAError
from dlplora.serve.answers import Answer, ResponseFormat, headers_of
from dlplora.serve.catalog import Catalog
from dlplora.serve.engine import Engine
from dlplora.serve.jobs import BadRequestError, Event, Failed, Finished, Job, Piece, QueueFullError, Sentence, Started, Target
from dlplora.serve.logprobs import TokenTexts
from dlplora.serve.metrics import Metrics
from dlplora.serve.prompts import Prompt, PromptBuilder
from dlplora.serve.sampling import SamplingOptions
from dlplora.serve.schemas import ChatRequest, CompletionRequest

Queue = asyncio.Queue[tuple[int, list[Event]]]
"""Events of a choice, with its number."""


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """What the application needs besides the engine."""

    base_name: str = "base"
    created: int = 0
    api_key: str | None = None
    """Key that every request must send; None asks for none."""
    admin_key: str | None = None
    """Key of ``POST /admin/reload``; None switches it off."""
    default_max_tokens: int = 512
    """Tokens of a chat answer without a limit of its own."""
    max_body_bytes: int = 1 << 20
    chat_template: str | None = None
    reload: Callable[[], Sequence[str]] | None = None
    """Loads the pool again and returns the names of its adapters; blocks."""
    folders: tuple[str, ...] = ()
    """Folders that were given at the start; no response names more than the last part of them."""


class Server:
    """The state of the endpoints."""

    def __init__(self, engine: Engine, options: ServerOptions) -> None:
        self.engine, self.options = engine, options
        self.catalog = Catalog(engine, options.base_name, options.created)
        self.metrics = Metrics(engine)
        self.texts = TokenTexts(engine.fused.tokenizer)
        vocab_size = engine.fused.config.get_text_config().vocab_size
        self.prompts = PromptBuilder(engine.fused.tokenizer, vocab_size, engine.max_model_len, options.chat_template)

    def _jobs(self, request: ChatRequest | CompletionRequest, prompt: Prompt, target: Target, first: int, queue: Queue) -> list[Job]:
        """``n`` jobs of one prompt; the number of the first choice is ``first``.

        The events of a streamed answer reach the queue one by one, those of another one together when it ends: each hand-over wakes the
        thread of the event loop, which then competes with the engine's for the interpreter.
        """
        limit = self.prompts.room(prompt, request.limit, self.options.default_max_tokens)
        loop = asyncio.get_running_loop()
        jobs = []
        for place in range(request.n):
            held: list[Event] = []

            def report(event: Event, index: int = first + place, held: list[Event] = held) -> None:
                self.metrics.observe(event)
                held.append(event)
                if request.stream or isinstance(event, (Finished, Failed)):
                    with suppress(RuntimeError):  # the loop is closed: the server has stopped, and nobody waits
                        loop.call_soon_threadsafe(queue.put_nowait, (index, held.copy()))
                    held.clear()

            job = Job(
                prompt_ids=prompt.ids,
                routed_text=prompt.routed_text,
                question_s=prompt.question_s,
                target=target,
                sampling=_sampling(request, place),
                max_tokens=limit,
                report=report,
                stops=request.stops,
                ignore_eos=request.ignore_eos,
            )
            jobs.append(job)
        return jobs

    async def complete(self, http: Request, request: ChatRequest | CompletionRequest, prompts: Sequence[Prompt], chat: bool) -> Response:
        """Run a request and answer it, whole or as a stream."""
        target = self.catalog.target(request.model, request.adapter_weights)
        most = self.engine.options.max_queue
        if len(prompts) * request.n > most:  # trying again later would not help
            raise BadRequestError(
                f"{len(prompts)} prompts times n = {request.n} are more answers than this server queues: --max-queue is {most}.",
                "n" if request.n > most else "prompt",
            )
        queue: Queue = asyncio.Queue()
        jobs = [job for place, prompt in enumerate(prompts) for job in self._jobs(request, prompt, target, place * request.n, queue)]
        shape = ResponseFormat(
            chat=chat,
            model=request.model,
            texts=self.texts,
            logprobs=request.num_logprobs is not None,
            trace=request.wants_trace,
            n=request.n,
        )
        answers = [Answer(index) for index in range(len(jobs))]
        self.engine.submit(*jobs)
        handed_over = False
        try:
            if request.stream:
                index, (event,) = await _next(http, queue)
                answers[index].take(event)
                headers = headers_of(answers[index].sentences[0][1])
                usage = request.stream_options is not None and request.stream_options.include_usage
                chunks = self._stream(queue, jobs, answers, shape, (index, event), usage)
                handed_over = True
                return StreamingResponse(chunks, media_type="text/event-stream", headers={**headers, "cache-control": "no-store"})
            while not all(answer.finished for answer in answers):
                index, events = await _next(http, queue)
                for event in events:
                    answers[index].take(event)
            return JSONResponse(shape.whole(answers), headers=headers_of(answers[0].sentences[0][1]))
        finally:
            if not handed_over:
                self.engine.cancel(*jobs)

    async def _stream(
        self, queue: Queue, jobs: Sequence[Job], answers: Sequence[Answer], shape: ResponseFormat, first: tuple[int, Event], usage: bool
    ) -> AsyncIterator[str]:
        try:
            if shape.chat:
                for answer in answers:
                    yield _sse(shape.first(answer.index))
            if shape.trace and isinstance(first[1], Started):
                yield _sse(shape.sentence(first[0], 0, first[1].decision))
            while not all(answer.finished for answer in answers):
                index, (event,) = await queue.get()
                answers[index].take(event)
                if isinstance(event, Piece):
                    yield _sse(shape.chunk(index, event))
                elif isinstance(event, (Started, Sentence)) and shape.trace:
                    start = event.start if isinstance(event, Sentence) else 0
                    yield _sse(shape.sentence(index, start, event.decision))
                elif isinstance(event, Finished):
                    yield _sse(shape.last(answers[index]))
            end = shape.end(answers, usage)
            if end is not None:
                yield _sse(end)
            yield "data: [DONE]\n\n"
        except DLPLoRAError as error:
            yield _sse(error_body(error)[1])
        finally:
            self.engine.cancel(*jobs)


def _sampling(request: ChatRequest | CompletionRequest, place: int) -> SamplingOptions:
    """Options of one choice; choices of one request have seeds of their own."""
    return SamplingOptions(
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        seed=None if request.seed is None else (request.seed + place) % 2**63,
        top_logprobs=request.num_logprobs,
        frequency_penalty=request.frequency_penalty or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
    )


async def _next(http: Request, queue: Queue) -> tuple[int, list[Event]]:
    """The next events of a choice; a client that disconnects cancels the request."""
    waiting = asyncio.ensure_future(queue.get())
    gone = asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait({waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            return waiting.result()
        raise BadRequestError("the client closed the connection.", status=499)
    finally:
        waiting.cancel()
        gone.cancel()


async def _disconnected(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _sse(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def error_body(error: Exception) -> tuple[int, dict[str, Any]]:
    """HTTP status and body of an error, in OpenAI's form; internal errors are not described to clients."""
    if isinstance(error, BadRequestError):
        kind = "authentication_error" if error.status == 401 else "server_error" if error.status >= 500 else "invalid_request_error"
        return error.status, error_of(str(error), kind, error.param, error.code)
    if isinstance(error, QueueFullError):
        return 429, error_of(str(error), "rate_limit_error", None, "queue_full")
    return 500, error_of("the server failed to answer; its log has the reason.", "server_error", None, None)


def error_of(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    """An error in OpenAI's form."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
