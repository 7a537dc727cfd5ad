"""Text in, text out: ``generate_text``, ``stream_text``, and what ``transformers.pipeline("text-generation")`` needs of a model.

A conversation is a list of mappings with ``role`` and ``content``; the tokenizer's chat template turns it into a prompt. Any other text is
a plain prompt and is tokenised unchanged. Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard, overload

import torch
from torch import Tensor

from dlplora.errors import GenerationError
from dlplora.inference.chat_formats import learn_markers, rendered
from dlplora.inference.prompting import prompt_tensors, require_text
from dlplora.inference.question import question_of_messages, question_text
from dlplora.inference.streaming import stream
from dlplora.types import PromptBatch

if TYPE_CHECKING:
    from dlplora.inference.request_router import RequestRouter
    from dlplora.modules.routing_slot import RoutingSlot

Message: TypeAlias = Mapping[str, str]
Conversation: TypeAlias = Sequence[Message]
DEFAULT_NEW_TOKENS = 256


class TextGeneration:
    """Text methods of ``FusedCausalLM``; all use its ``generate``."""

    if TYPE_CHECKING:
        tokenizer: Any
        request_router: RequestRouter
        slot: RoutingSlot

        @property
        def device(self) -> torch.device: ...
        @property
        def generation_config(self) -> Any: ...
        @property
        def max_length(self) -> int: ...
        def generate(self, texts: str | Sequence[str] | None = None, *, prompts: PromptBatch | None = None, **kwargs: Any) -> Tensor: ...

    main_input_name = "input_ids"
    input_modalities = ("text",)
    output_modalities = ("text",)

    def can_generate(self) -> bool:
        """True; needed by transformers' pipelines."""
        return True

    @overload
    def generate_text(
        self,
        prompts: str | Conversation,
        *,
        max_new_tokens: int | None = None,
        task_names: str | Sequence[str | None] | None = None,
        **kwargs: Any,
    ) -> str: ...

    @overload
    def generate_text(
        self,
        prompts: Sequence[str] | Sequence[Conversation],
        *,
        max_new_tokens: int | None = None,
        task_names: str | Sequence[str | None] | None = None,
        **kwargs: Any,
    ) -> list[str]: ...

    def generate_text(
        self,
        prompts: str | Conversation | Sequence[str] | Sequence[Conversation],
        *,
        max_new_tokens: int | None = None,
        task_names: str | Sequence[str | None] | None = None,
        **kwargs: Any,
    ) -> str | list[str]:
        """The text that the model adds to each prompt, without special tokens.

        Args:
            prompts: One prompt or a list of prompts; a prompt is a string, or a conversation (a list of mappings with ``role`` and
                ``content``), which the tokenizer's chat template renders. An empty list gives an empty list.
            max_new_tokens: Maximum number of new tokens; None takes the generation configuration's, else 256.
            task_names: The task of each prompt (one name serves all), for methods that need it (``oracle``).
            kwargs: Other options of ``generate``, such as ``do_sample``, ``num_return_sequences`` or ``trace``.

        Returns:
            One string for one prompt, a list for a list. With ``num_return_sequences`` of N, always a list, N strings per prompt.

        Raises:
            GenerationError: If prompts are neither text nor conversations, the tokenizer has no chat template, or ``generate`` refuses.
        """
        if task_names is not None and not isinstance(task_names, (str, Sequence)):
            raise GenerationError(f"task_names must be the name of a task, or one for each prompt, got {type(task_names).__name__}.")
        single = isinstance(prompts, str) or is_conversation(prompts)
        listed: list[Any] = [prompts] if single else _listed(prompts)
        if not listed:
            return []
        names = [task_names] * len(listed) if task_names is None or isinstance(task_names, str) else list(task_names)
        if len(names) != len(listed):
            raise GenerationError(f"{len(names)} task names for {len(listed)} prompts; give one for each, or one for all.")
        batch = prompt_batch(listed, self.tokenizer, device=self.device, task_names=names)
        new_tokens = self._text_tokens(max_new_tokens, kwargs)
        if "prompts" in kwargs or "input_ids" in kwargs:
            raise GenerationError("generate_text takes its prompts as text; use generate for prompts and input_ids.")
        ids = self.generate(prompts=batch, max_new_tokens=new_tokens, **kwargs)
        if not hasattr(ids, "shape"):
            raise GenerationError("generate_text returns text; use generate for return_dict_in_generate=True.")
        width = min(batch.input_ids.shape[1], max(1, self.max_length - new_tokens))  # generate cuts longer prompts on the left
        added = [str(text) for text in self.tokenizer.batch_decode(ids[:, width:], skip_special_tokens=True)]
        return added[0] if single and len(added) == 1 else added

    def as_prompts(self, prompts: PromptBatch | Tensor | str | Conversation | Sequence[str] | Sequence[Conversation]) -> PromptBatch:
        """Prompts in any form that ``generate`` or ``generate_text`` takes, as a ``PromptBatch``.

        Raises:
            GenerationError: If they have none of these forms, or one is empty.
        """
        if isinstance(prompts, PromptBatch):
            return prompts
        if not isinstance(prompts, (Tensor, Mapping)) and not hasattr(prompts, "input_ids"):
            listed = [prompts] if isinstance(prompts, str) or is_conversation(prompts) else _listed(prompts)
            prompts = prompt_batch(listed, self.tokenizer, device=self.device)
            return prompt_tensors(self.tokenizer, self.device, None, None, None, prompts)[2]
        return prompt_tensors(self.tokenizer, self.device, prompts, None, None, None)[2]

    def stream_text(
        self, prompt: str | Conversation, *, max_new_tokens: int | None = None, task_names: str | None = None, **kwargs: Any
    ) -> Iterator[str]:
        """The text that the model adds to one prompt, piece by piece, while another thread generates it.

        Any number of streams may be interleaved. Closing or dropping the iterator ends its generation at the next token.

        Args:
            prompt: Text, or a conversation, as for ``generate_text``.
            max_new_tokens: Maximum number of new tokens; None takes the generation configuration's, else 256.
            task_names: The prompt's task, for methods that need it (``oracle``).
            kwargs: Other options of ``generate`` for one sequence.

        Raises:
            GenerationError: If the prompt is neither, or ``generate`` refuses; while the stream is read.
        """
        if not (isinstance(prompt, str) or is_conversation(prompt)) or kwargs.keys() & {"streamer", "prompts", "input_ids"}:
            raise GenerationError("stream_text takes one prompt, as text or as a conversation, and has its own streamer.")
        if task_names is not None and not isinstance(task_names, str):
            raise GenerationError(f"task_names must be the name of a task, got {type(task_names).__name__}.")
        bound = self.slot.state
        if bound is not None and not self.request_router.is_gated:
            kwargs.setdefault("routing", bound.weights.clone())  # the block may end before the answer does
        kwargs["max_new_tokens"] = self._text_tokens(max_new_tokens, kwargs)
        kwargs["prompts"] = prompt_batch([prompt], self.tokenizer, device=self.device, task_names=[task_names])
        return stream(self.generate, self.tokenizer, kwargs)

    def _text_tokens(self, asked: int | None, kwargs: Mapping[str, Any]) -> int:
        """``max_new_tokens`` of a call."""
        if asked is not None:
            return asked
        given = getattr(kwargs.get("generation_config"), "max_new_tokens", None) or self.generation_config.max_new_tokens
        return int(given or DEFAULT_NEW_TOKENS)


def is_conversation(prompts: Any) -> TypeGuard[Conversation]:
    """Whether this is one conversation: a list of mappings, as opposed to a list of prompts."""
    return isinstance(prompts, Sequence) and not isinstance(prompts, str) and bool(prompts) and all(isinstance(m, Mapping) for m in prompts)


def _listed(prompts: Any) -> list[Any]:
    """Several prompts as a list.

    Raises:
        GenerationError: If one is neither text nor a conversation.
    """
    if not isinstance(prompts, Sequence):
        raise GenerationError(f"prompts must be text, a conversation or a list of either, got {type(prompts).__name__}.")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str) and not is_conversation(prompt):
            raise GenerationError(
                f"prompt {index} must be text or a conversation (a list of mappings with role and content), got {type(prompt).__name__}."
            )
    return list(prompts)


def prompt_batch(
    prompts: Sequence[str | Conversation],
    tokenizer: Any,
    *,
    device: torch.device | str = "cpu",
    task_names: Sequence[str | None] | None = None,
) -> PromptBatch:
    """Prompts as tokens and the question of each for the router; a rendered conversation already holds its special tokens.

    Raises:
        GenerationError: If a conversation is malformed, or the tokenizer has no chat template.
    """
    texts = [prompt if isinstance(prompt, str) else render(prompt, tokenizer) for prompt in prompts]
    require_text(texts)
    rows = [tokenizer(text, add_special_tokens=isinstance(prompt, str))["input_ids"] for text, prompt in zip(texts, prompts, strict=True)]
    markers = learn_markers(tokenizer)
    asked = [question_text(one, markers) if isinstance(one, str) else question_of_messages(one) for one in prompts]
    return PromptBatch.from_ids(rows, tokenizer, device=device, task_names=task_names, texts=texts, questions=asked)


def render(conversation: Conversation, tokenizer: Any, chat_template: str | None = None) -> str:
    """A conversation as the chat template writes it, up to where the assistant begins.

    Args:
        conversation: Its messages.
        tokenizer: Renders them.
        chat_template: In place of the tokenizer's own.

    Raises:
        GenerationError: If a message lacks a role or text, the tokenizer has no chat template, or the template refuses.
    """
    for index, message in enumerate(conversation):
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise GenerationError(f"message {index} of a conversation needs 'role' and 'content', both text; it has {sorted(message)}.")
    if not (chat_template or getattr(tokenizer, "chat_template", None)):
        raise GenerationError("the tokenizer has no chat template, so a conversation cannot be turned into a prompt; pass text.")
    try:
        return rendered(tokenizer, conversation, chat_template)
    except ValueError as error:
        raise GenerationError(f"the chat template refuses this conversation: {error}") from error
