"""Requests of the OpenAI API, and this server's own, as pydantic models.

Unknown fields are ignored, as OpenAI's server does, except those that would change the meaning of the answer.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MAX_CHOICES = 16
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_DEPTH = 64
"""Levels of lists and objects in a field; what is passed on to another server is written by recursion."""
UNSUPPORTED = (
    "tools",
    "functions",
    "tool_choice",
    "function_call",
    "response_format",
    "logit_bias",
    "suffix",
    "echo",
    "best_of",
    "audio",
    "modalities",
)
"""Fields that would change the answer and are not implemented: refused unless they are empty."""
_NOTHING: tuple[Any, ...] = (None, False, 0, "", [], {}, "none", {"type": "text"}, ["text"])


def _check_field(name: str, value: Any) -> None:
    level = [name, value]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                inner += [*one.keys(), *one.values()]
            elif isinstance(one, list):
                inner += one
            elif isinstance(one, str) and not one.isascii() and any("\ud800" <= character <= "\udfff" for character in one):
                raise _wrong(name, "a text holds half of a surrogate pair, which is not valid text; send UTF-8.")
        level = inner
        if not level:
            return
    raise _wrong(name, f"'{name}' is nested more than {MAX_DEPTH} levels deep.")


def _wrong(param: str, message: str) -> PydanticCustomError:
    """An error of a whole body that names the field."""
    return PydanticCustomError("wrong_field", "{message}", {"message": message, "param": param})


class Defaulting(BaseModel):
    """Fields that are null have their default, as in OpenAI's API."""

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: Any) -> Any:
        return {name: field for name, field in value.items() if field is not None} if isinstance(value, dict) else value


class Body(Defaulting):
    """A request body: text that no tokenizer and no answer can hold is refused at any depth, and too many levels are."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_cannot_be_written(cls, value: Any) -> Any:
        for name, field in value.items() if isinstance(value, dict) else ():
            _check_field(name, field)
        return value


def _or_null(schema: dict[str, Any]) -> None:
    """Say in the OpenAPI schema that a field may be null."""
    kind = {key: schema.pop(key) for key in list(schema) if key not in {"default", "title", "description"}}
    schema["anyOf"] = [kind, {"type": "null"}]


Switch = Annotated[bool, Field(json_schema_extra=_or_null)]


class DlploraOptions(Defaulting):
    """Options of this server, under the key ``dlplora``."""

    model_config = ConfigDict(extra="forbid", strict=True)

    trace: Switch = False
    """Return the routing weights of each sentence."""


class StreamOptions(Defaulting):
    """As in the OpenAI API."""

    model_config = ConfigDict(strict=True)

    include_usage: Switch = False


class TextPart(BaseModel):
    """A part of a message; only text is supported."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a conversation. What tools were asked and answered is for the chat template; tools themselves are not supported."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _require_content(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of role '{self.role}' needs 'content'.")
        return self

    @property
    def text(self) -> str:
        """The text of all parts."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())

    def for_template(self) -> dict[str, Any]:
        """What a chat template reads; the arguments of a call are objects there, and text in OpenAI's API."""
        found: dict[str, Any] = {"role": self.role, "content": self.text}
        found |= {key: value for key in ("name", "tool_call_id") if (value := getattr(self, key)) is not None}
        return found | ({"tool_calls": [_parsed_call(call) for call in self.tool_calls]} if self.tool_calls else {})


def _parsed_call(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"] or "{}")}}
    except (ValueError, RecursionError):
        return call


Probability = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2.0, le=2.0, allow_inf_nan=False)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Weight = Annotated[float, Field(ge=0.0, le=100.0, allow_inf_nan=False)]


class GenerationRequest(Body):
    """What both kinds of completion have in common; ``false`` and ``"5"`` are not accepted as numbers."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: Annotated[str, Field(json_schema_extra=_or_null)] = "auto"
    stream: Switch = False
    stream_options: StreamOptions | None = None
    n: int = Field(default=1, ge=1, le=MAX_CHOICES, json_schema_extra=_or_null)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0, allow_inf_nan=False)] | None = None
    top_p: Probability | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    ignore_eos: Switch = False
    adapter_weights: dict[str, Weight] | None = None
    dlplora: DlploraOptions | None = None

    @model_validator(mode="after")
    def _refuse_unsupported(self) -> GenerationRequest:
        for name, value in (self.model_extra or {}).items():
            if name in UNSUPPORTED and value not in _NOTHING and not (name == "best_of" and value == self.n):
                raise _wrong(name, f"'{name}' is not supported by this server.")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop texts."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def wants_trace(self) -> bool:
        """Whether the routing weights of each sentence are returned."""
        return self.dlplora is not None and self.dlplora.trace


class ChatRequest(GenerationRequest):
    """Body of ``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to report for each token; None reports nothing."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def limit(self) -> int | None:
        """Tokens to generate at most."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class CompletionRequest(GenerationRequest):
    """Body of ``POST /v1/completions``."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(default=16, ge=1)
    logprobs: int | None = Field(default=None, ge=0, le=20)

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to report for each token; None reports nothing."""
        return self.logprobs

    @property
    def limit(self) -> int | None:
        """Tokens to generate at most."""
        return self.max_tokens


class RouteRequest(Body):
    """Body of ``POST /v1/route``: either a prompt or messages."""

    prompt: str | None = None
    messages: list[Message] | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _one_of_both(self) -> RouteRequest:
        if (self.prompt is None) == (self.messages is None):
            raise _wrong("prompt", "give either 'prompt' or 'messages'.")
        return self


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every response with a status from 400 on."""

    error: ErrorDetail


class Usage(BaseModel):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(BaseModel):
    """What the bodies of both kinds of completion have in common."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["chat.completion", "text_completion"]
    created: int
    model: str
    choices: Annotated[list[dict[str, Any]], Field(min_length=1)]
    usage: Usage


class RouteDecision(BaseModel):
    """Body of a response of ``POST /v1/route``."""

    object: Literal["route"]
    read: str
    decision: Literal["routed", "base"]
    out_of_scope: bool
    adapter: str
    confidence: float | None
    weights: dict[str, float]
    seconds: float


ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request cannot be served."},
    "5XX": {"model": ErrorBody, "description": "The server failed."},
}
COMPLETIONS: dict[int | str, dict[str, Any]] = {200: {"model": Completion, "content": {"text/event-stream": {}}}}
ROUTES: dict[int | str, dict[str, Any]] = {200: {"model": RouteDecision}}
"""Responses as the OpenAPI schema describes them."""
