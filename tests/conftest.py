"""Tiny random models and adapters, made once a session. No network, no shared state."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dlplora.testing import tiny

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """See ``dlplora.testing.tiny``."""
    return tiny.tiny_tokenizer()


@pytest.fixture(scope="session")
def _tiny_llama_master(tiny_tokenizer: Any) -> Any:
    return tiny.tiny_llama(tiny_tokenizer)


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

    return partial(tiny.write_adapter, _tiny_llama_master)


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
