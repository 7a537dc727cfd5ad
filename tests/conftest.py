"""Tiny random models and adapters, made once a session. No network, no shared state."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported

WORDS = (
    "the a cat dog plum pear red blue sees likes box tree is in on Mia Leo Ann Tom . , ? ! : yes no one two three what who where".split()
)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer with <pad> <s> </s> = 0 1 2 that adds <s> by itself; any text round-trips."""
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


@pytest.fixture(scope="session")
def _tiny_llama_master(tiny_tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    generator_state = torch.get_rng_state()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
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
    model = LlamaForCausalLM(config).eval()
    torch.set_rng_state(generator_state)
    return model


@pytest.fixture
def tiny_llama(_tiny_llama_master: Any) -> Any:
    """A fresh float32 copy of one random 2-layer Llama with grouped keys and values."""
    return copy.deepcopy(_tiny_llama_master)


@pytest.fixture(scope="session")
def tiny_llama_folder(_tiny_llama_master: Any, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model and tokenizer as an ordinary Hugging Face folder."""
    folder = tmp_path_factory.mktemp("tiny_llama")
    _tiny_llama_master.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_adapter(_tiny_llama_master: Any) -> Callable[..., Path]:
    """Factory: PEFT itself writes a LoRA folder with random, non-zero B.

    ``make_adapter(folder, seed=0, dtype=torch.float32, **lora_config_options)`` returns the folder.
    """

    def make(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 0.3, **options: Any) -> Path:
        from peft import LoraConfig, get_peft_model

        settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
        settings.update(options)
        model = get_peft_model(copy.deepcopy(_tiny_llama_master), LoraConfig(task_type="CAUSAL_LM", **settings))
        generator = torch.Generator().manual_seed(1000 + seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        model.to(dtype).save_pretrained(folder)
        return Path(folder)

    return make


@pytest.fixture(scope="session")
def tiny_pool(make_adapter: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool folder of three adapters: plain, another rank and alpha, rsLoRA."""
    folder = tmp_path_factory.mktemp("tiny_pool")
    make_adapter(folder / "alpha", seed=1)
    make_adapter(folder / "beta", seed=2, r=6, lora_alpha=3)
    make_adapter(folder / "gamma", seed=3, r=2, lora_alpha=4, use_rslora=True)
    return folder


@pytest.fixture(scope="session")
def uniform_pool(make_adapter: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool folder of three adapters of one rank with different scalings, for methods that sum factors."""
    folder = tmp_path_factory.mktemp("uniform_pool")
    make_adapter(folder / "alpha", seed=1)
    make_adapter(folder / "beta", seed=2, lora_alpha=3)
    make_adapter(folder / "gamma", seed=3, lora_alpha=4, use_rslora=True)
    return folder
