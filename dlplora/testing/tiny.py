"""A tiny random model, tokenizer and adapters, to test a method anywhere without a download."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

WORDS = (
    "the a cat dog plum pear red blue sees likes box tree is in on Mia Leo Ann Tom . , ? ! : yes no one two three what who where".split()
)
ADAPTERS: dict[str, dict[str, Any]] = {
    "alpha": {"seed": 1},
    "beta": {"seed": 2, "r": 6, "lora_alpha": 3},
    "gamma": {"seed": 3, "r": 2, "lora_alpha": 4, "use_rslora": True},
}
"""A plain adapter, one of another rank and scaling, one with rsLoRA."""


@dataclass(frozen=True)
class TinySetup:
    """What a conformance case is made of.

    Attributes:
        model: A 2-layer Llama with grouped keys and values, float32.
        tokenizer: Its tokenizer.
        pool: Folder of three PEFT adapters of different kinds.
        uniform_pool: The same with adapters of one rank, for methods that sum factors.
    """

    model: Any
    tokenizer: Any
    pool: Path
    uniform_pool: Path


def tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer with <pad> <s> </s> = 0 1 2 that adds <s>; any text round-trips."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    corpus = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(corpus, trainer)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=256)


def tiny_llama(tokenizer: Any) -> Any:
    """A random 2-layer Llama; the random state is left as it was."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def write_adapter(
    model: Any, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 0.3, **options: Any
) -> Path:
    """Let PEFT write a LoRA folder with random factors, B included.

    Args:
        model: Base model; copied.
        folder: Where to write.
        seed: Of the factors.
        dtype: Of the file.
        scale: Standard deviation of the factors.
        options: Of ``LoraConfig``; the default has rank 4, alpha 8, on q_proj and v_proj.

    Returns:
        The folder.
    """
    from peft import LoraConfig, get_peft_model

    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(task_type="CAUSAL_LM", **{**settings, **options}))
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    adapted.to(dtype).save_pretrained(str(folder))
    return Path(folder)


def tiny_setup(folder: Path) -> TinySetup:
    """Model, tokenizer and adapters, the latter written below ``folder``."""
    tokenizer = tiny_tokenizer()
    model = tiny_llama(tokenizer)
    for name, options in ADAPTERS.items():
        write_adapter(model, folder / "pool" / name, **options)
        write_adapter(model, folder / "uniform" / name, **{key: value for key, value in options.items() if key != "r"})
    return TinySetup(model, tokenizer, folder / "pool", folder / "uniform")
