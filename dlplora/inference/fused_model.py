"""A Hugging Face causal LM with linear layers fused with an adapter bank; a method decides the routing weights.

Shapes: B rows, T tokens, E experts, V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dlplora.adapters.fingerprint import base_fingerprint, check_backbone
from dlplora.adapters.pool import load_pool
from dlplora.errors import GenerationError, RoutingError
from dlplora.inference import saving
from dlplora.inference.arguments import (
    chosen_method,
    require_folder,
    require_folders,
    require_keywords,
    require_mapping,
    require_parts,
    unknown_options_named,
)
from dlplora.inference.backbones import nano_asset, resolve_backbone
from dlplora.inference.base_facts import BaseModelFacts
from dlplora.inference.devices import choose_device
from dlplora.inference.finite import with_finite_check
from dlplora.inference.generate_options import GenerateOptions
from dlplora.inference.loading import load_backbone, read_backbone
from dlplora.inference.patching import patch
from dlplora.inference.prompt_routing import initial_router_input, routed_questions
from dlplora.inference.prompting import fit_to_context, prompt_tensors
from dlplora.inference.quantization import bitsandbytes_config
from dlplora.inference.request import CompiledTurns, DecodeSetting, Request
from dlplora.inference.request_router import RequestRouter
from dlplora.inference.routed_generation import RoutedGeneration
from dlplora.inference.text import Conversation, TextGeneration
from dlplora.methods.base import FusionMethod, MethodContext
from dlplora.methods.registry import MethodSpec
from dlplora.modules.lora_bank import AdapterBank
from dlplora.modules.routing_slot import RoutingSlot
from dlplora.modules.routing_state import RoutingState
from dlplora.types import PromptBatch

if TYPE_CHECKING:
    from transformers import CompileConfig

    from dlplora.tasks.types import Item

_COUNTING = threading.Lock()


class FusedCausalLM(BaseModelFacts, TextGeneration, nn.Module):
    """Base model, bank and method with one ``forward`` and one ``generate``.

    Args:
        model: A causal LM; its target modules are wrapped until ``close``.
        tokenizer: Its tokenizer.
        bank: The experts, on the model's device.
        method: A method; it is prepared and attached here.
        backend: ``auto``, or a key of ``kernels.backends.BACKENDS``.
        context: What the method may use; None builds one without artifacts.

    Attributes:
        model: The patched Hugging Face model.
        pool: The bank as it was given.
        bank: The bank in use (a static method may have merged it).
        patched: The fused layers by module path (``patched.layers``) and a method's own hooks (``patched.hooks``).
        num_truncated_prompts: Prompts that ``generate`` cut on the left to fit the context.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        bank: AdapterBank,
        method: FusionMethod,
        *,
        backend: str = "auto",
        context: MethodContext | None = None,
    ) -> None:
        super().__init__()
        require_parts(bank, method)
        if context is None:
            context = MethodContext(tokenizer=tokenizer, embedding=model.get_input_embeddings(), device=model.device)
        self.pool = bank
        self.tokenizer = tokenizer
        self.context = context
        self.slot = RoutingSlot()
        self.num_truncated_prompts = 0
        self._source: dict[str, Any] = {}
        self._compile_config: CompileConfig | None = None
        self._turns, self._decoding = CompiledTurns(), DecodeSetting()
        method.require_packages()
        self.bank = method.prepare(bank, context)
        self.model = model
        self.method = method
        self.patched = patch(model, self.bank, self.slot, method.metadata.combine)
        method.attach(self)
        try:
            self.request_router = RequestRouter(method, self.bank, self.patched.layers, backend)
        except RoutingError:
            self.close()
            raise
        self.slot.gate_backend = self.request_router.gate_backend
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        pretrained: str | Path | None = None,
        *,
        pool: str | Path | None = None,
        method: str | Path | MethodSpec | FusionMethod | type[FusionMethod] | None = None,
        router: str | Path | None = None,
        multitask: str | Path | None = None,
        method_params: Mapping[str, Any] | None = None,
        artifacts: Mapping[str, str | Path] | None = None,
        dtype: str | torch.dtype = "auto",
        device: torch.device | str | None = None,
        backend: str = "auto",
        names: Sequence[str] | None = None,
        seed: int = 0,
        untrained: bool = False,
        few_shot: Callable[[str, int], Sequence[Item]] | None = None,
        compile: bool = False,
        **loading: Any,
    ) -> FusedCausalLM:
        """Load a base model, a pool and a method.

        Args:
            pretrained: Model folder, GGUF file, short name (``smollm2-135m``), hub id, or a folder written by ``save_pretrained``; None is
                the embedded nano model, and then ``pool``, ``router`` and ``multitask`` default to the embedded ones too.
            pool: Folder of PEFT LoRA folders; methods that use no adapter (``base``) need none.
            method: Name of a method configuration, path of a method YAML, the result of ``load_method_spec``, a class, or a method
                object that no other model uses; None is the saved model's, else ``dlp``.
            router, multitask: Artifact folders.
            method_params: Overrides of the method's parameters.
            artifacts: Further artifacts by role; ``trained`` is the folder of a method trained by ``LitFusion``.
            dtype: ``auto`` (the checkpoint's; on a CPU float32, or bfloat16 where that is measured to be faster), ``float32``, ``float16``
                or ``bfloat16``; the bank follows it.
            device: None means the first available of CUDA, MPS and CPU.
            backend: See the class.
            names: Experts to use, in this order; None takes the whole pool.
            seed: Seed of methods that draw random numbers.
            untrained: Whether a method that still has to be trained may be loaded, in order to train it.
            few_shot: Training items of a task, for methods that need them; see ``MethodContext``.
            compile: Whether ``generate`` runs its decode steps compiled; see ``compile``.
            loading: ``revision``, ``trust_remote_code``, ``quantization_config``, ``load_in_4bit`` and the other arguments of
            ``load_backbone``.

        Raises:
            DLPLoRAError: Its subclasses; the message names the file, key or size that does not fit.
            TypeError: For an unknown keyword.
        """
        require_keywords(cls.from_pretrained, loading, read_backbone, bitsandbytes_config)
        for name, mapping in (("method_params", method_params), ("artifacts", artifacts)):
            require_mapping(name, mapping)
        require_folders({"pretrained": pretrained, "router": router, "multitask": multitask, **(artifacts or {})})
        method, device = chosen_method(method, method_params), choose_device(device)
        saved = saving.read(pretrained)
        roles: dict[str, str | Path | None] = {"router": router, "multitask": multitask, **(artifacts or {})}
        if saved is not None:
            pretrained, pool, backend = saved.pretrained, pool or saved.pool, backend if backend != "auto" else saved.backend
            method = method or saved.method
            roles = {**saved.artifacts, **{role: path for role, path in roles.items() if path is not None}}
        method = method or "dlp"
        if pretrained is None:
            pool = pool or nano_asset("pool")
            roles = {role: path or nano_asset(role) for role, path in roles.items()}
        opened = None if pool is None else load_pool(pool)
        if opened is None:
            saving.require_no_adapters(method)
        model, tokenizer = load_backbone(pretrained, dtype=dtype, device=device, **loading)
        bank = AdapterBank.empty()
        if opened is not None:
            check_backbone(opened, model, resolve_backbone(pretrained))
            bank = AdapterBank.from_pool(opened.path, names, dtype=model.dtype, device=device)
        context = MethodContext(
            tokenizer=tokenizer,
            embedding=model.get_input_embeddings(),
            artifacts={role: Path(path) for role, path in roles.items() if path is not None},
            seed=seed,
            device=device,
            few_shot=few_shot,
        )
        built = saving.choose_method(saved, method, method_params, bank, context, untrained=untrained)
        fused = cls(model, tokenizer, bank, built, backend=backend, context=context)
        fused._source = {"pretrained": str(pretrained) if pretrained is not None else None, "revision": loading.get("revision")}
        if compile:
            fused.compile()
        return fused

    # ------------------------------------------------------------------ what users expect of a model

    @property
    def backend(self) -> str:
        """The requested kernel backend; assigning another one checks that it can serve the method."""
        return self.request_router.backend

    @backend.setter
    def backend(self, name: str) -> None:
        self.request_router = self.request_router.with_backend(name)
        self.slot.gate_backend = self.request_router.gate_backend

    def train(self, mode: bool = True) -> FusedCausalLM:
        """Switch the method's own modules; the base model stays in eval mode, so its dropout is never active."""
        super().train(False)
        self.method.train(mode)
        return self

    def backends_used(self) -> str:
        """Names of the kernel backends that routing weights and gates have used so far, sorted."""
        return ", ".join(sorted(self.request_router.used))

    def compile(self, **options: Any) -> None:  # type: ignore[override]
        """From now on, run the decode steps of ``generate`` compiled, with a static cache, as in transformers.

        Buffers then have room for as many experts as the method may keep, so that sentence ends, other numbers of kept experts, and
        later requests with as many rows that fit the cache cause no further compilation. Requests of several threads run one at a time.

        Args:
            options: Of ``transformers.CompileConfig``: ``backend``, ``mode``, ``fullgraph``, ``dynamic``.
        """
        from transformers import CompileConfig

        require_keywords(self.compile, options, CompileConfig)
        self._compile_config = CompileConfig(**options)
        self._compile_config._compile_all_devices = True  # type: ignore[assignment]
        self.request_router.fixed_width = True

    # ------------------------------------------------------------------ routing

    def route(
        self,
        prompts: PromptBatch | Tensor | str | Conversation | Sequence[str] | Sequence[Conversation],
        *,
        new_tokens: int = 0,
        questions: PromptBatch | None = None,
    ) -> RoutingState | None:
        """Routing state for a batch of prompts (for the first sentence of the answer), or None if gates inside the layers decide.

        The question of each prompt is routed, without wrapper, system text and worked examples (``inference.question``).

        Args:
            prompts: One prompt or several, as ``generate_text`` takes them, token ids (B, T), or a ``PromptBatch``, whose task names
                reach only methods that declare ``needs = ("task_id", ...)``.
            new_tokens: Tokens to be generated under it; 0 if the prompts are only read. A sentence-level method's state then
                has room for re-routing.
            questions: ``routed_questions`` of the prompts, if the caller has them.

        Raises:
            RoutingError: If the method returns weights of another shape, or not finite.
            GenerationError: If ``prompts`` is none of these, or one is empty.
        """
        prompts = self.as_prompts(prompts)
        tokens = prompts.input_ids.shape[1]
        weights = prompts.weights
        if weights is None:
            prompts = routed_questions(prompts, self.tokenizer, self.chat_markers) if questions is None else questions
            if self.method.granularity == "sentence":
                prompts = initial_router_input(self.method.view, prompts, self.tokenizer)
            weights = self.request_router.route(prompts)
        if weights is None:
            return None
        reroutes = new_tokens > 0 and self.method.granularity == "sentence"
        return self.request_router.state(weights.to(self.device), own=True, reroutes=reroutes, prompt_tokens=tokens, new_tokens=new_tokens)

    @contextmanager
    def routing(self, weights: Tensor | RoutingState) -> Iterator[RoutingState]:
        """Bind routing weights (E,), (B, E) or (B, T, E) for the calls inside the block.

        The block applies to the thread and the asyncio task that opened it. In the body of a generator it applies while the generator
        runs, not while it is suspended.

        Raises:
            RoutingError: If blocks are not closed in the reverse order of opening.
        """
        state = self.request_router.given(weights, self.device)
        try:
            with self.slot.bind(state):
                yield state
        finally:
            if state is not weights:
                state.release()

    def forward(self, *args: Any, routing: Tensor | RoutingState | None = None, **kwargs: Any) -> Any:
        """Forward pass of the base model under routing weights.

        Args:
            routing: Weights as for ``routing``, for this call only; None takes the bound ones. A loop that decodes token by token
                passes a ``RoutingState`` (from ``route``), which keeps its buffers between calls.

        Raises:
            RoutingError: If nothing is given or bound and no gate is installed.
        """
        if routing is None:
            compiling = torch.compiler.is_compiling()
            return self.model(*args, **kwargs) if compiling else self.slot.run(self.slot.state, self.model, args, kwargs)
        state = self.request_router.given(routing, self.device, for_call=True)
        try:
            return self.slot.run(state, self.model, args, kwargs)
        finally:
            if state is not routing:
                state.release()

    @torch.no_grad()
    def generate(
        self,
        texts: str | Sequence[str] | Tensor | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        prompts: PromptBatch | None = None,
        routing: Tensor | RoutingState | None = None,
        trace: list[dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Hugging Face ``generate`` under the method's routing; rows of a batch are routed independently.

        Weights given as ``routing``, or bound with ``with model.routing(w)``, replace the method's. A prompt longer than the context minus
        ``max_new_tokens`` keeps its last tokens and is counted in ``num_truncated_prompts``. Calls in several threads, and calls made
        while another one is running, do not affect each other; only compiled decode steps (``compile``) run one at a time.

        Args:
            texts: One or several prompts as text, or token ids as a tensor (B, T), as transformers takes them; or give
            input_ids, attention_mask: tokens (B, T), padded on either side. Columns stay as they are, as in transformers; padding on the
                right is moved to the left. A missing mask is inferred: padding is masked unless its token also ends texts.
            prompts: What the router reads, if it differs from ``input_ids`` (longer, or with task names).
            routing: Routing weights (E,) or (B, E), or a state from ``route``.
            trace: A list that receives one dict per routed sentence.
            kwargs: Options of ``generate``; those that sentence-level routing does not support are refused (``generate_options``).

        Returns:
            Token ids (B * num_return_sequences, T + new), the prompts first, each ending in column T.

        Raises:
            GenerationError: For an empty prompt, no room for new tokens, an option that cannot be followed, or logits that are not finite.
        """
        if trace is not None and not isinstance(trace, list):
            raise GenerationError(f"trace must be a list, which receives one dict per routed sentence; got {type(trace).__name__}.")
        given = self.slot.state if routing is None else self.request_router.given(routing, self.device, for_call=True)
        options = GenerateOptions(self.model, kwargs, self.method if given is None else None)
        texts = kwargs.pop("inputs", None) if texts is None else texts
        kwargs.setdefault("pad_token_id", options.pad_token(self.tokenizer))
        given_as, given_ids = (texts, input_ids, attention_mask, prompts), texts if isinstance(texts, Tensor) else input_ids
        size = self.config.get_text_config().vocab_size
        ids, mask, prompts = prompt_tensors(self.tokenizer, self.device, *given_as, infer_mask=options.mask_from_padding, vocab_size=size)
        options.require_served()
        kwargs["logits_processor"] = with_finite_check(kwargs.get("logits_processor"))
        new_tokens = options.new_tokens(ids.shape[1])
        ids, mask, num_cut = fit_to_context(ids, mask, new_tokens, self.max_length)
        options.require_same_places(given_ids, attention_mask, ids, mask)
        if num_cut and kwargs.get("max_new_tokens") is None:  # max_length counts columns that are gone
            kwargs["max_new_tokens"] = new_tokens
        with _COUNTING:
            self.num_truncated_prompts += num_cut
        with Request(self.slot, self._turns, self._decoding) as request:
            if self._compile_config is not None and "past_key_values" not in kwargs:
                kwargs.update({"cache_implementation": "static", "compile_config": self._compile_config, **kwargs})
                request.take_turn()
            if given is not None:
                request.use(given, ids.shape[0], options.copies(), owned=isinstance(routing, Tensor))
            else:
                RoutedGeneration(self, request, prompts, ids, mask, options, trace).start(new_tokens)
            with unknown_options_named(kwargs):
                return request.generate(self.model, input_ids=ids, attention_mask=mask, **kwargs)  # type: ignore[no-any-return]

    # ------------------------------------------------------------------ files

    def save_pretrained(self, folder: str | Path) -> None:
        """Write pool, method and a reference to the base model, atomically.

        The base model itself is not copied: ``fused_config.json`` names it.

        Raises:
            ConfigError: If the folder is not empty, or the bank was not loaded from adapter folders.
        """
        require_folder("folder", folder)
        pretrained = self._source.get("pretrained") or (None if self._source else self.model.config.name_or_path)
        saving.save(
            Path(folder),
            self.pool,
            self.method,
            base_model=base_fingerprint(self.model),
            artifacts=self.context.artifacts,
            pretrained=pretrained,
            backend=self.backend,
        )

    def close(self) -> None:
        """Remove the fused layers; the base model is as it was before."""
        self.patched.restore()
