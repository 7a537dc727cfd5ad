"""Any fusion method as an lm-eval model: ``lm_eval --model dlplora --model_args method=...,pretrained=...,pool=...``.

A subclass of lm-eval's Hugging Face model, used by the command line and by ``dlplora eval``. Tokenisation, chat templates, batch size
detection and data parallelism are inherited. Reading and generating tokens are replaced, because of these rules:

* Routing weights are computed from the **context** only, one prompt at a time, and cached by (context tokens, task name, question).
  The options of a question share them; no continuation, padding or other row of the batch changes them.
* The question is routed (``routed_texts``), without chat template, system instruction, task description and few-shot examples.
* ``loglikelihood_rolling`` has no context. The first window of the text (its first ``max_length`` tokens) is treated as the prompt, and
  its routing weights serve all windows. Only here does routing read text that is scored.
* An empty context becomes the beginning-of-text token, as in the parent class, and is routed in this form.
* Prompts that do not fit are cut on the left and counted.
* The task name reaches only methods that declare the need (the fused model withholds it). It is the field ``task`` of a document, else
  lm-eval's task name without ``dlplora_<suite>_``; the first that names an expert wins.

Shapes: B rows, T tokens, E experts, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from torch import Tensor
from tqdm import tqdm
from transformers import LogitsProcessorList, StoppingCriteriaList

from dlplora.errors import ConfigError, GenerationError
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.inference.positions import length_dependence
from dlplora.lm_eval import CACHE_REFUSAL
from dlplora.lm_eval.answer_form import AnswerForm, Form, form_of, require_whole
from dlplora.lm_eval.distributed import accelerator_if_launched, without_messages
from dlplora.lm_eval.gate_statistics import GateWatch
from dlplora.lm_eval.harness_options import present_device, require_fit
from dlplora.lm_eval.model_args import ModelArgs, load_model, parse_model_args, split_text
from dlplora.lm_eval.prefix_sharing import Readings, Scorer, answers, batches_of, decide_sharing, questions_of, read_questions, score_full
from dlplora.lm_eval.requests import (
    GenerationSettings,
    Prompt,
    ScoringRequest,
    Side,
    StopTexts,
    answer_text,
    consecutive,
    options_key,
    pad_rows,
    question_of,
    task_of,
)
from dlplora.lm_eval.routed_texts import RoutedTexts
from dlplora.lm_eval.routing_statistics import COUNTERS, RoutingStatistics, summarize
from dlplora.types import PromptBatch

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

ROUTED_TOGETHER = 64  # prompts that a router reads in one batch
TEXTS_KEPT = 100_000
"""Number of texts with cached tokens (contexts, and contexts with an option): enough for some thousand questions."""
MISLEADING_NOTICES = ("`pretrained` model kwarg is not of type", "Passed an already-initialized model", "Overrode HF model backend")
"""What the parent says of a model built outside it; none of it applies to one built here."""


class DLPLoRALM(HFLM):
    """A fused model behind lm-eval's interface.

    Args:
        fused: A model that is already built; the model arguments must then be absent.
        **model_args: The fields of ``ModelArgs`` and the names in ``HARNESS_OPTIONS``; dotted keys ``method.KEY`` override
            settings of the method. Nothing at all gives the embedded nano model with method ``dlp``.

    Raises:
        ConfigError: If an argument is unknown or of the wrong type. Loading raises the errors of ``FusedCausalLM``.
    """

    def __init__(self, fused: FusedCausalLM | None = None, **model_args: Any) -> None:
        self.model_args, harness = parse_model_args(model_args)
        accelerator = accelerator_if_launched(self.model_args.device)
        if fused is None:
            fused = load_model(self.model_args, accelerator.device if accelerator else present_device(self.model_args.device))
        elif dataclasses.replace(self.model_args, share_prefix="auto") != ModelArgs():
            raise ConfigError("give either a fused model or the arguments to build one, not both.")
        require_fit(harness, fused.model.config, len(fused.tokenizer))
        with without_messages(MISLEADING_NOTICES, "lm_eval.models.huggingface"):
            super().__init__(pretrained=fused.model, tokenizer=fused.tokenizer, backend="causal", **harness)
        self.fused = fused
        self._routed_texts = RoutedTexts(fused.chat_markers)
        self.pretrained = self.model_args.pretrained or str(fused.model.config.name_or_path)
        self.revision = self.model_args.revision or "main"
        self._device = torch.device(fused.device)
        if accelerator is not None:
            self.accelerator = accelerator
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        self.encodings: dict[Any, array[int]] = {}
        """Texts tokenised so far; may be handed on to the next model with the same tokenizer."""
        self.progress_bar: Any = tqdm  # or what else takes these arguments and has `update`
        self._weights_of: dict[Any, Tensor | None] = {}
        self._cut: set[Any] = set()
        self._pending: list[tuple[str | None, str, tuple[str, int]]] = []
        self.statistics = RoutingStatistics(fused.bank.names)
        self._watched = GateWatch(fused.patched.layers, self.statistics).over
        self._shares_prefix, self.prefix_note = decide_sharing(self.model_args.share_prefix, fused)
        self._by_length = length_dependence(fused.model) is not None
        self._totals: dict[str, float] | None = None

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> DLPLoRALM:
        """As the parent's, but an option given in both places is taken from ``--model_args``."""
        return cls(**({key: value for key, value in (additional_config or {}).items() if value is not None} | arg_dict))

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> DLPLoRALM:
        """``create_from_arg_obj`` of the parsed text; ``split_text`` reads mappings, which lm-eval's parser does not."""
        return cls.create_from_arg_obj((split_text if "{" in arg_string else simple_parse_args_string)(arg_string), additional_config)

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Refuse lm-eval's response cache, in every form.

        Raises:
            ConfigError: Always, when the hook would store anything.
        """
        if getattr(cache_hook, "dbdict", None) is not None:
            raise ConfigError(CACHE_REFUSAL)
        super().set_cache_hook(cache_hook)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **kw: Any) -> list[int]:
        """The parent's tokens; a text is tokenised once, though lm-eval asks for a context with every option."""
        key = (string, add_special_tokens, self.add_bos_token, left_truncate_len)
        found = self.encodings.get(key)
        if found is None:
            found = array("l", super().tok_encode(string, add_special_tokens, left_truncate_len, **kw))
            if len(self.encodings) < TEXTS_KEPT:
                self.encodings[key] = found
        return found.tolist()

    def _route(self, prompt: Prompt) -> Tensor | None:
        """Weights (E,) of one prompt, or None if gates decide; computed once per prompt and task."""
        if prompt.key not in self._weights_of:
            self._route_all([prompt])
        return self._weights_of[prompt.key]

    def _route_all(self, prompts: Iterable[Prompt]) -> None:
        """Route the prompts that were not routed yet, in batches of similar length, regardless of task."""
        missing = {prompt.key: prompt for prompt in prompts if prompt.key not in self._weights_of}
        new = sorted(missing.values(), key=lambda one: len(one.ids))
        for start in range(0, len(new), ROUTED_TOGETHER):
            batch = new[start : start + ROUTED_TOGETHER]
            with torch.no_grad():
                state = self.fused.route(self._prompt_batch(batch))
            for row, prompt in enumerate(batch):
                weights = None if state is None else state.weights[row]
                if weights is not None:
                    self.statistics.add_weights(self.fused.request_router.per_expert(weights), prompt.task)
                self._weights_of[prompt.key] = weights

    def _prompt_batch(self, prompts: Sequence[Prompt], side: Side = "right") -> PromptBatch:
        ids, mask = pad_rows([prompt.ids for prompt in prompts], self._pad_id, side, self.device)
        texts = tuple(prompt.text if prompt.text is not None else self.tok_decode(list(prompt.ids)) for prompt in prompts)
        asked = tuple(text if prompt.question is None else prompt.question for prompt, text in zip(prompts, texts, strict=True))
        return PromptBatch(ids, mask, texts, tuple(prompt.task for prompt in prompts), asked)

    def _prompt(self, ids: Sequence[int], text: str | None, task: str | None, room: int, question: str | None) -> Prompt:
        """A prompt of at most ``room`` tokens, cut on the left; cuts are counted once per prompt."""
        whole = Prompt(tuple(ids), task, text, question)
        if len(ids) <= room:
            return whole
        self._note_cut(whole)
        return Prompt(cut := whole.ids[-room:], task, None, question if question and question in self.tok_decode(list(cut)) else None)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """As the parent's; which message of the user a rendered prompt ends with is remembered for the router."""
        rendered = str(super().apply_chat_template(chat_history, add_generation_prompt))
        self._routed_texts.remember(rendered, chat_history)
        return rendered

    def _note_cut(self, prompt: Prompt) -> None:
        if (key := prompt.key[:2]) not in self._cut:
            self._cut.add(key)
            self.statistics.count("truncated")

    def _weights(self, prompts: Sequence[Prompt]) -> Tensor | None:
        """Routing weights (B, E) of the rows of a batch; None where gates decide."""
        rows = [weights for weights in map(self._route, prompts) if weights is not None]
        return torch.stack(rows) if rows else None

    def _bound(self, prompts: Sequence[Prompt]) -> AbstractContextManager[Any]:
        weights = self._weights(prompts)
        return nullcontext() if weights is None else self.fused.routing(weights)

    def _autocast(self) -> torch.autocast:
        enabled = self.mixed_precision_dtype is not None
        return torch.autocast(device_type=self.device.type, dtype=self.mixed_precision_dtype, enabled=enabled)

    @property
    def _pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id or 0)

    def routing_statistics(self) -> dict[str, float | int | None]:
        """What routing looked like so far, over all processes; the keys are those of ``summarize``."""
        return summarize(self.statistics.sums if self._totals is None else self._totals)

    def _share_statistics(self) -> None:
        """Add up the counters of all processes; every process calls it after the same request type."""
        if self.world_size > 1:
            gathered = self.all_gather(self.statistics.as_tensor(self.device)).view(-1, len(COUNTERS)).sum(dim=0)
            self._totals = dict(zip(COUNTERS, gathered.tolist(), strict=True))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation given its context, and whether greedy decoding would produce it."""
        names = self.fused.bank.names
        self._pending = [(task_of(request, names), self._routed_texts.of(request), question_of(request)) for request in requests]
        try:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        finally:
            self._pending = []

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Score tokenised pairs; ``loglikelihood`` has left task, question and place of each in ``_pending``."""
        units = []
        pending: Sequence[Any] = self._pending or [(None, None, None)] * len(requests)
        for (strings, context, continuation), (task, question, _) in zip(requests, pending, strict=True):
            # the parent moves blanks at the end of a context to the continuation, so the text follows the tokens
            prompt = self._prompt(context, strings[0].rstrip() if strings else None, task, self.max_length, question and question.rstrip())
            if len(context) + len(continuation) > self.max_length + 1:
                self._note_cut(Prompt(tuple(context), task))
            units.append(ScoringRequest(tuple(context), tuple(continuation), prompt))
        found = self._score(units, disable_tqdm=disable_tqdm, batch_size=override_bs)
        for (_, _, place), unit in zip(self._pending, units, strict=False):
            self.statistics.add_route(place, self._route(unit.prompt))
        self._share_statistics()
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts; a text is routed on its first window."""
        owners: list[int] = []
        units: list[ScoringRequest] = []
        for index, request in enumerate(requests):
            (text,) = request.args
            tokens = self.tok_encode(text)
            prompt = Prompt(
                tuple(tokens[: self.max_length]), task_of(request, self.fused.bank.names), text if len(tokens) <= self.max_length else None
            )
            windows = get_rolling_token_windows(tokens, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1)
            for context, continuation in map(make_disjoint_window, windows):
                owners.append(index)
                units.append(ScoringRequest(tuple(context), tuple(continuation), prompt))
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._score(units, disable_tqdm=disable_tqdm), strict=True):
            totals[owner] += value
        self._share_statistics()
        return totals

    def _score(self, requests: list[ScoringRequest], *, disable_tqdm: bool, batch_size: int | None = None) -> list[tuple[float, bool]]:
        groups: dict[Any, list[int]] = {}
        for index, request in enumerate(requests):
            if not 0 < len(request.continuation) <= self.max_length:
                length = len(request.continuation)
                raise GenerationError(f"a continuation of {length} tokens cannot be scored; allowed are 1 to {self.max_length}.")
            groups.setdefault(request.forward_key, []).append(index)
        units = sorted((requests[members[0]] for members in groups.values()), key=lambda unit: unit.sort_key)
        self._route_all(unit.prompt for unit in units)
        self.batch_sizes: dict[int, int] = {}
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with self.progress_bar(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="loglikelihood") as progress:
            for readings in self._readings(units, batch_size):
                logprobs = torch.log_softmax(readings.logits, dim=-1, dtype=self.softmax_dtype)
                members = [groups[unit.forward_key] for unit in readings.units]
                owners = [index for group in members for index in group]
                places = [place for place, group in zip(readings.places, members, strict=True) for _ in group]
                values = answers(logprobs, places, [requests[index].continuation for index in owners])
                for index, value in zip(owners, values, strict=True):
                    found[index] = value
                progress.update(len(owners))
        return found

    @torch.no_grad()
    def _readings(self, units: list[ScoringRequest], batch_size: int | None) -> Iterator[Readings]:
        """Logits for all units, batch by batch: after shared contexts where that is possible, else the plain way."""
        scorer = Scorer(self.fused.model, self._bound, self._watched, self._pad_id, self.device, self.max_length)
        shared = [unit for unit in units if self._shares_prefix and unit.reads_prompt and unit.num_read <= self.max_length]
        together = {id(unit) for unit in shared}
        if shared:
            for questions in batches_of(questions_of(shared), self._size_at(shared, 0, batch_size, [])):
                with self._autocast():
                    yield read_questions(scorer, questions)
        for batch in self._batches([unit for unit in units if id(unit) not in together], batch_size):
            with self._autocast():
                yield score_full(scorer, batch)

    def _batches(self, units: list[ScoringRequest], batch_size: int | None = None) -> Iterator[list[ScoringRequest]]:
        """Consecutive batches; with ``batch_size=auto`` the parent finds their size, as often as configured."""
        pairs: list[Any] = []
        start = 0
        while start < len(units):
            these = units[start : start + self._size_at(units, start, batch_size, pairs)]
            batch = next(consecutive(these, len(these), (lambda unit: unit.num_read) if self._by_length else None))
            yield batch
            start += len(batch)

    def _size_at(self, units: list[ScoringRequest], start: int, batch_size: int | None, pairs: list[Any]) -> int:
        """Rows of the batch that begins with unit ``start``; ``pairs`` holds the units in the parent's format, after its first request."""
        size = batch_size or self.batch_size
        if size != "auto":
            return int(size)
        if not pairs:
            pairs.extend((None, list(unit.context), list(unit.continuation)) for unit in units)
        enough = len(units) >= self.batch_schedule
        return int(self._batch_scheduler(start, pairs) if enough else self._detect_batch_size(pairs, start))

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) for the parent's batch size detection, the only caller: every row with weights of its own."""
        num_experts = self.fused.bank.num_experts
        weights = torch.full((inps.shape[0], num_experts), 1.0 / num_experts, device=self.device)
        with torch.no_grad(), self._autocast(), self.fused.routing(weights):
            return self.fused(input_ids=inps).logits

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text generated for each prompt, up to its first stop text; rows are routed, and re-routed, on their own."""
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(options_key(request.args[1]), []).append(index)
        size = self._detect_batch_size() if self.batch_size == "auto" else int(self.batch_size)
        eos = self.tok_decode([self.eot_token_id], skip_special_tokens=False)
        with self.progress_bar(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="generate_until") as progress:
            for members in groups.values():
                settings = GenerationSettings.parse(requests[members[0]].args[1], default_max_new_tokens=self.max_gen_toks, eos=eos)
                prompts = {index: self._generation_prompt(requests[index], settings) for index in members}
                self._route_all(prompts.values())
                order = sorted(members, key=lambda index: (-len(prompts[index].ids), prompts[index].ids))
                lengths = {index: len(prompts[index].ids) for index in members}
                for rows in consecutive(order, size, lengths.__getitem__ if self._by_length else None):
                    questions, forms = [question_of(requests[i]) for i in rows], [form_of(requests[i].doc) for i in rows]
                    for index, answer in zip(rows, self._generate([prompts[i] for i in rows], settings, questions, forms), strict=True):
                        texts[index] = answer
                    progress.update(len(rows))
        self._share_statistics()
        return texts

    def _generation_prompt(self, request: Instance, settings: GenerationSettings) -> Prompt:
        room = self.max_length - settings.max_new_tokens
        if room < 1:
            raise GenerationError(
                f"{settings.max_new_tokens} new tokens leave no room for a prompt in {self.max_length}. "
                "Lower max_gen_toks (--gen_kwargs max_gen_toks=N)."
            )
        context = request.args[0]
        ids = self.tok_encode(context) or [self.prefix_token_id]
        require_whole(request.doc, len(ids), room, settings.max_new_tokens)
        return self._prompt(ids, context, task_of(request, self.fused.bank.names), room, self._routed_texts.of(request))

    def _generate(
        self, prompts: list[Prompt], settings: GenerationSettings, questions: Sequence[tuple[str, int]], forms: Sequence[Form]
    ) -> list[str]:
        batch = dataclasses.replace(self._prompt_batch(prompts, side="left"), weights=self._weights(prompts))
        width = batch.input_ids.shape[1]
        trace: list[dict[str, Any]] = []
        for prompt, question in zip(prompts, questions, strict=True):
            self.statistics.add_route(question, self._route(prompt))  # counted once per prompt
        with torch.no_grad(), self._autocast(), self._watched(prompts, batch.attention_mask):
            tokens = self.fused.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                prompts=batch,
                trace=trace,
                max_new_tokens=settings.max_new_tokens,
                stopping_criteria=StoppingCriteriaList([StopTexts(self.tokenizer, settings.until, width)]),
                pad_token_id=self._pad_id,
                logits_processor=LogitsProcessorList([AnswerForm(forms, self.tokenizer, width)] if any(forms) else []),
                use_cache=True,
                **settings.options,
            )
        for entry in (entry for entry in trace if entry["sentence_idx"] > 0):
            self.statistics.count("reroutes")
            self.statistics.routes[questions[entry["row"]]].append((entry["at"], entry["weights"]))
        return [answer_text(row[width:], settings.until, self.think_end_token, self.tok_decode) for row in tokens.tolist()]

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval stores with its results: the parent's facts, and which method, pool, backend and routing it was."""
        return super().get_model_info() | {
            "dlplora_method": self.fused.method.name,
            "dlplora_experts": list(self.fused.bank.names),
            "dlplora_bank_sha256": self.fused.bank.checksum(),
            "dlplora_backend": self.fused.backends_used(),
            "dlplora_routing": self.routing_statistics(),
            "dlplora_contexts": self.prefix_note,
        }

    def close(self) -> None:
        """Restore the base model."""
        self.fused.close()
