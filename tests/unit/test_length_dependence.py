"""Models whose positions depend on the length of the sequence are read row by row as stock lm-eval reads them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, get_peft_model

from dlplora.inference.positions import length_dependence
from dlplora.lm_eval.model import DLPLoRALM
from dlplora.lm_eval.prefix_sharing import why_not_in_a_trial

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
CONTEXT = ("the cat sees " * 9).strip()
PAIRS = [(context, " the box ." + " the cat" * k) for context in (CONTEXT, "the dog sees", CONTEXT + " a") for k in (0, 1, 4, 8)]


def phi3(vocab: int) -> Any:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32}
    rope |= {"long_factor": [2.0] * 4, "short_factor": [1.0] * 4}
    config = transformers.Phi3Config(
        vocab_size=vocab, **SIZES, **IDS, max_position_embeddings=128, original_max_position_embeddings=32, rope_parameters=rope
    )
    return transformers.Phi3ForCausalLM(config), ["qkv_proj"]


def llama(vocab: int, **rope: Any) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=vocab, **SIZES, **IDS, max_position_embeddings=32, rope_parameters={"rope_theta": 1e4, **rope}
    )
    return transformers.LlamaForCausalLM(config), ["q_proj", "v_proj"]


def saved(root: Path, model: Any, targets: list[str], tokenizer: Any) -> tuple[Path, Path]:
    model.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets, init_lora_weights=False))
    adapted.save_pretrained(root / "pool" / "it")
    return root / "base", root / "pool"


@pytest.fixture(params=["longrope", "dynamic"])
def folders(request: Any, tiny_tokenizer: Any, tmp_path: Path) -> tuple[Path, Path]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        vocab = len(tiny_tokenizer)
        model, targets = phi3(vocab) if request.param == "longrope" else llama(vocab, rope_type="dynamic", factor=4.0)
        return saved(tmp_path, model.eval(), targets, tiny_tokenizer)


def scores(lm: Any) -> list[float]:
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(PAIRS)]
    return [value for value, _ in lm.loglikelihood(requests, disable_tqdm=True)]


@pytest.mark.parametrize("batch_size", [1, 8])
def test_scores_are_stock_lm_evals(batch_size: int, folders: tuple[Path, Path]) -> None:
    base, pool = folders
    stock = HFLM(pretrained=str(base), peft=str(pool / "it"), dtype="float32", device="cpu", batch_size=1, max_length=128)
    ours = DLPLoRALM(pretrained=str(base), pool=str(pool), method="avg_delta", device="cpu", batch_size=batch_size, max_length=128)
    assert "depend on the length of the sequence" in ours.prefix_note
    assert scores(ours) == pytest.approx(scores(stock), abs=1e-4)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_generation_is_stock_lm_evals(batch_size: int, folders: tuple[Path, Path]) -> None:
    """Prompts on both sides of the length at which the frequencies change."""
    base, pool = folders
    if "dynamic" in (base / "config.json").read_text():
        pytest.skip("its limit of positions is the length in question, and generate cuts prompts there")
    settings = {"until": ["\n\n"], "max_gen_toks": 6, "do_sample": False}
    prompts = [("the cat sees " * k).strip() for k in (12, 9, 5, 3)]
    requests = [Instance("generate_until", {}, (prompt, settings), index) for index, prompt in enumerate(prompts)]
    stock = HFLM(pretrained=str(base), peft=str(pool / "it"), dtype="float32", device="cpu", batch_size=1, max_length=128)
    ours = DLPLoRALM(pretrained=str(base), pool=str(pool), method="avg_delta", device="cpu", batch_size=batch_size, max_length=128)
    assert ours.generate_until(requests, disable_tqdm=True) == stock.generate_until(requests, disable_tqdm=True)


def test_which_positions_depend_on_the_length(tiny_llama: Any) -> None:
    assert length_dependence(tiny_llama) is None
    for rope, expected in (
        ({"rope_type": "linear", "factor": 2.0}, None),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}, None),
        ({"rope_type": "dynamic", "factor": 2.0}, "dynamic"),
    ):
        found = length_dependence(llama(64, **rope)[0])
        assert (found is None) if expected is None else expected in str(found)
    gemma = transformers.Gemma3TextConfig(vocab_size=64, **SIZES, head_dim=8, sliding_window=4)
    assert length_dependence(transformers.Gemma3ForCausalLM(gemma)) is None  # rotary parameters for each type of layer
    tiny_llama.config.use_dynamic_ntk = True
    assert "use_dynamic_ntk" in str(length_dependence(tiny_llama))
    del tiny_llama.config.use_dynamic_ntk
    tiny_llama.config.rope_parameters = {"full_attention": {"rope_type": "invented"}}
    assert "invented" in str(length_dependence(tiny_llama))


def test_a_trial_finds_positions_that_are_not_kept(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    from dlplora.inference.fused_model import FusedCausalLM
    from dlplora.methods.references import Base
    from dlplora.modules.lora_bank import AdapterBank

    fused = FusedCausalLM(tiny_llama, tiny_tokenizer, AdapterBank.from_pool(tiny_pool), Base())
    assert why_not_in_a_trial(fused) is None
    assert fused.slot.state is None

    def forget(module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "position_ids": torch.zeros_like(kwargs["position_ids"])}

    hook = tiny_llama.model.rotary_emb.register_forward_pre_hook(forget, with_kwargs=True)
    assert why_not_in_a_trial(fused) is None  # wrong, but the same both ways
    hook.remove()

    def count_from_the_cache(module: Any, args: Any, kwargs: Any) -> Any:
        """A model that takes position_ids and makes its own."""
        ids, cache = kwargs["input_ids"], kwargs.get("past_key_values")
        start = cache.get_seq_length() if cache is not None else 0
        return args, {**kwargs, "position_ids": torch.arange(start, start + ids.shape[1])[None].expand(ids.shape)}

    hook = tiny_llama.model.register_forward_pre_hook(count_from_the_cache, with_kwargs=True)
    # rotary positions are relative, so it takes a hole in them to be seen: padding on the left makes none, two lengths do
    assert why_not_in_a_trial(fused) is None
    hook.remove()

    def lose_the_cache(module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "attention_mask": kwargs["attention_mask"] * (torch.arange(kwargs["attention_mask"].shape[1]) > 2)}

    hook = tiny_llama.model.register_forward_pre_hook(lose_the_cache, with_kwargs=True)
    assert "gives other numbers after a shared context" in str(why_not_in_a_trial(fused))
    hook.remove()
