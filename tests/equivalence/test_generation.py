"""Generation against PEFT's ``generate`` and against a plain loop that re-routes by the documented rule."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from dlplora.errors import ConfigError, GenerationError
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.inference.sentences import sentence_end_positions
from dlplora.methods.base import FusionMethod, Metadata, MethodContext
from dlplora.methods.references import Oracle
from dlplora.modules.lora_bank import AdapterBank
from dlplora.types import PromptBatch

NAMES = ("alpha", "beta", "gamma")
TEXTS = ("the cat sees", "Mia likes the plum. Who likes it? Answer:", "a", "Tom and Ann and Leo in the tree . two three")


class ByLength(FusionMethod):
    """Routes by the number of characters the router reads, so that every further sentence changes the weights."""

    name = "by_length"
    metadata = Metadata(title="By length", granularity="sentence")

    def route(self, prompts: PromptBatch) -> Tensor:
        turns = torch.tensor([len(text) % 7 for text in prompts.texts]).float()[:, None]
        return torch.cat([turns / 10, 1 - turns / 10, torch.zeros_like(turns)], dim=1)


class ByLengthOnce(ByLength):
    name = "by_length_once"
    metadata = Metadata(title="By length, once", granularity="prompt")


@pytest.fixture
def fuse(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> Callable[..., FusedCausalLM]:
    def make(method: FusionMethod, model: Any = None) -> FusedCausalLM:
        return FusedCausalLM(model or copy.deepcopy(tiny_llama), tiny_tokenizer, AdapterBank.from_pool(tiny_pool), method)

    return make


@pytest.fixture
def talkative(tiny_llama: Any, tiny_tokenizer: Any) -> Any:
    """The tiny model with a head that prefers full stops and words, and never ends: it speaks in sentences."""
    model = copy.deepcopy(tiny_llama)
    bias = torch.full((len(tiny_tokenizer),), -30.0)
    words = [" the", " cat", " Mia", " sees", " box", ".", "!", " two", "?", "\n"]
    ids = [tiny_tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in words]
    bias[ids] = 0.0
    model.lm_head = torch.nn.Linear(32, len(tiny_tokenizer))
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 1.5, generator=torch.Generator().manual_seed(9))
        model.lm_head.bias.copy_(bias)
    return model


def batch(tokenizer: Any, texts: tuple[str, ...], names: tuple[str, ...] | None = None) -> PromptBatch:
    return PromptBatch.from_texts(texts, tokenizer, task_names=names)


def peft_tokens(model: Any, pool: Path, name: str, ids: list[int], **kwargs: Any) -> Tensor:
    adapted = PeftModel.from_pretrained(copy.deepcopy(model), str(pool / name), autocast_adapter_dtype=False).eval()
    given = torch.tensor([ids])
    torch.manual_seed(4)  # loading draws numbers too
    return adapted.generate(input_ids=given, attention_mask=torch.ones_like(given), pad_token_id=0, **kwargs)


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2, "temperature": 1.3},
        {"do_sample": False, "repetition_penalty": 1.4},
    ],
)
def test_one_expert_speaks_as_pefts_adapter(how: dict[str, Any], fuse: Any, tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    fused = fuse(Oracle())
    for name in NAMES:
        prompts = batch(tiny_tokenizer, TEXTS[1:2], (name,))
        expected = peft_tokens(tiny_llama, tiny_pool, name, prompts.input_ids[0].tolist(), max_new_tokens=12, **how)
        torch.manual_seed(4)
        assert torch.equal(fused.generate(prompts=prompts, max_new_tokens=12, **how), expected)


def test_rows_of_a_batch_speak_as_they_do_alone(fuse: Any, tiny_tokenizer: Any) -> None:
    fused = fuse(Oracle())
    names = ("beta", "alpha", "gamma", "beta")
    together = fused.generate(prompts=batch(tiny_tokenizer, TEXTS, names), max_new_tokens=9, do_sample=False)
    for row, (text, name) in enumerate(zip(TEXTS, names, strict=True)):
        alone = fused.generate(prompts=batch(tiny_tokenizer, (text,), (name,)), max_new_tokens=9, do_sample=False)
        new = alone[0, len(tiny_tokenizer(text)["input_ids"]) :]
        assert together[row, -9:][: len(new)].tolist() == new.tolist()


@torch.no_grad()
def naive(fused: FusedCausalLM, text: str, steps: int) -> tuple[list[int], list[list[float]]]:
    """One token at a time with the cache kept as it is; weights are asked for again when the text has ended a sentence."""
    tokenizer, ids = fused.tokenizer, fused.tokenizer(text)["input_ids"]
    weights = [fused.method.route(batch(tokenizer, (text,)))]
    with fused.routing(weights[0]):
        out = fused(input_ids=torch.tensor([ids]), use_cache=True)
    new: list[int] = []
    ended = 0
    for _ in range(steps):
        new.append(int(out.logits[0, -1].argmax()))
        said = tokenizer.decode(new)
        ends = len(sentence_end_positions(said, final=False))
        if ends > ended:
            ended = ends
            weights.append(fused.method.route(batch(tokenizer, (text.strip() + said,))))
        with fused.routing(weights[-1]):
            out = fused(input_ids=torch.tensor([new[-1:]]), past_key_values=out.past_key_values, use_cache=True)
    return new, [row[0].tolist() for row in weights]


def test_rerouting_equals_a_plain_loop(fuse: Any, talkative: Any, tiny_tokenizer: Any) -> None:
    fused = fuse(ByLength(), talkative)
    expected = [naive(fused, text, 30) for text in TEXTS]
    assert sum(len(weights) for _, weights in expected) >= len(TEXTS) + 8  # sentences did end
    trace: list[dict[str, Any]] = []
    tokens = fused.generate(prompts=batch(tiny_tokenizer, TEXTS), max_new_tokens=30, do_sample=False, eos_token_id=None, trace=trace)
    for row, (new, weights) in enumerate(expected):
        assert tokens[row, -30:].tolist() == new
        entries = [entry for entry in trace if entry["row"] == row]
        assert entries[0]["sentence_idx"] == 0
        assert len(entries) == len(weights)
        for entry, row_weights in zip(entries, weights, strict=True):
            got = [entry["weights"].get(name, 0.0) for name in NAMES]
            assert got == pytest.approx(row_weights, abs=1e-6)


def test_prompt_level_does_not_reroute(fuse: Any, talkative: Any, tiny_tokenizer: Any) -> None:
    trace: list[dict[str, Any]] = []
    fused = fuse(ByLengthOnce(), copy.deepcopy(talkative))
    tokens = fused.generate(prompts=batch(tiny_tokenizer, TEXTS[:2]), max_new_tokens=20, do_sample=False, trace=trace)
    assert [entry["sentence_idx"] for entry in trace] == [0, 0]
    again = fuse(ByLength(), talkative).generate(prompts=batch(tiny_tokenizer, TEXTS[:2]), max_new_tokens=20, do_sample=False)
    assert not torch.equal(tokens, again)


def test_sampled_sequences_are_routed_apart(fuse: Any, talkative: Any, tiny_tokenizer: Any) -> None:
    trace: list[dict[str, Any]] = []
    torch.manual_seed(0)
    options = {"max_new_tokens": 25, "do_sample": True, "num_return_sequences": 3}
    tokens = fuse(ByLength(), talkative).generate(prompts=batch(tiny_tokenizer, TEXTS[:1]), trace=trace, **options)
    assert tokens.shape[0] == 3
    assert {entry["row"] for entry in trace if entry["sentence_idx"]} == {0, 1, 2}


def test_bound_weights_replace_the_plan(fuse: Any, tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    fused = fuse(ByLengthOnce())
    prompts = batch(tiny_tokenizer, TEXTS[:1])
    with fused.routing(torch.tensor([0.0, 0.0, 1.0])):
        got = fused.generate(prompts=prompts, max_new_tokens=8, do_sample=False)
    assert torch.equal(got, peft_tokens(tiny_llama, tiny_pool, "gamma", prompts.input_ids[0].tolist(), max_new_tokens=8, do_sample=False))


def test_streamer_receives_prompt_and_tokens(fuse: Any, tiny_tokenizer: Any) -> None:
    class Collect:
        def __init__(self) -> None:
            self.values: list[int] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.values += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    streamer = Collect()
    tokens = fuse(ByLength()).generate("the cat", max_new_tokens=6, do_sample=False, streamer=streamer)
    assert streamer.values == tokens[0].tolist()
    assert streamer.ended


def test_long_prompts_lose_their_beginning_and_are_counted(fuse: Any, tiny_tokenizer: Any) -> None:
    fused = fuse(ByLengthOnce())
    long = "the cat sees the box and " * 80
    count = len(tiny_tokenizer(long)["input_ids"])
    assert count > fused.max_length
    tokens = fused.generate([long, "the cat"], max_new_tokens=10, do_sample=False)
    assert tokens.shape[1] == fused.max_length
    assert tokens[0, : fused.max_length - 10].tolist() == tiny_tokenizer(long)["input_ids"][-(fused.max_length - 10) :]
    assert fused.num_truncated_prompts == 1
    with pytest.raises(GenerationError, match="leave no room for a prompt"):
        fused.generate("the cat", max_new_tokens=fused.max_length)


@pytest.mark.parametrize("text", ["", "   "])
def test_an_empty_prompt_is_refused(fuse: Any, text: str, tiny_tokenizer: Any) -> None:
    if text.strip() or tiny_tokenizer(text, add_special_tokens=False)["input_ids"]:
        pytest.skip("this tokenizer has tokens for white space, so the prompt is not empty")
    with pytest.raises(GenerationError, match=r"prompt 1 is empty"):
        fuse(ByLength()).generate(["the cat", text], max_new_tokens=3)


def test_bad_calls_are_refused(fuse: Any, tiny_tokenizer: Any) -> None:
    fused = fuse(ByLength())
    with pytest.raises(GenerationError, match="beam search"):
        fused.generate("the cat", max_new_tokens=3, num_beams=2)
    with pytest.raises(GenerationError, match="needs a prompt"):
        fused.generate(max_new_tokens=3)
    with pytest.raises(GenerationError, match="not several"):
        fused.generate("the cat", input_ids=torch.tensor([[1, 5]]), max_new_tokens=3)
    with pytest.raises(GenerationError, match="at least 1, got 0"):
        fused.generate("the cat", max_new_tokens=0)


def test_a_saved_model_says_the_same(tmp_path: Path, tiny_llama_folder: Path, tiny_pool: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dlplora.methods.dlp import DLP

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_llama_folder), AutoTokenizer.from_pretrained(tiny_llama_folder)
    bank = AdapterBank.from_pool(tiny_pool)
    made = DLP.example_artifacts(tmp_path, bank, MethodContext(tokenizer=tokenizer, embedding=model.get_input_embeddings()))
    fused = FusedCausalLM.from_pretrained(tiny_llama_folder, pool=tiny_pool, method="dlp_renorm", router=made["router"])
    expected = fused.generate(list(TEXTS), max_new_tokens=12, do_sample=False)
    fused.save_pretrained(tmp_path / "saved")
    loaded = FusedCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.method.config == fused.method.config
    assert torch.equal(loaded.generate(list(TEXTS), max_new_tokens=12, do_sample=False), expected)
    with pytest.raises(ConfigError, match="not empty"):
        fused.save_pretrained(tmp_path / "saved")
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]
    (tmp_path / "saved" / "fused_config.json").write_text('{"format": 7}')
    with pytest.raises(ConfigError, match="format 7"):
        FusedCausalLM.from_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "fused_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"fused_config\.json: not JSON"):
        FusedCausalLM.from_pretrained(tmp_path / "saved")


def test_a_bank_from_tensors_cannot_be_saved(tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    bank = AdapterBank.from_tensors(("x",), {"model.layers.0.self_attn.q_proj": [(torch.ones(2, 32), torch.ones(32, 2), 1.0)]})
    with pytest.raises(ConfigError, match="made from tensors"):
        FusedCausalLM(tiny_llama, tiny_tokenizer, bank, ByLength()).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_the_embedded_model_answers() -> None:
    fused = FusedCausalLM.from_pretrained()
    from dlplora.tasks.nano import nano_suite

    items = nano_suite().task("translate_zargi").items("test", 8)
    tokens = fused.generate([item.prompt for item in items], max_new_tokens=24, do_sample=False)
    said = [text.partition("Answer:")[2].strip() for text in fused.tokenizer.batch_decode(tokens, skip_special_tokens=True)]
    assert sum(text == item.answer for text, item in zip(said, items, strict=True)) >= 7
