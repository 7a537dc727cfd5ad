"""``generate_text`` and transformers' pipeline, against the bare model, PEFT and templates written by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from dlplora.cli.main import main
from dlplora.errors import GenerationError
from dlplora.inference.fused_model import FusedCausalLM
from tests.toy_tasks import NAMES, write_tasks

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
PROMPTS = ["the cat sees", "Mia likes a plum . Tom"]
GREEDY: dict[str, Any] = {"max_new_tokens": 7, "do_sample": False}


@pytest.fixture
def tokenizer(tiny_tokenizer: Any) -> Any:
    return copy.deepcopy(tiny_tokenizer)


@pytest.fixture(scope="module")
def one_pool(make_adapter: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    make_adapter(folder / "alpha", seed=1)
    return folder


@pytest.fixture
def adapted(tiny_llama_folder: Path, one_pool: Path) -> Any:
    """PEFT's model with the pool's one adapter."""
    from transformers import LlamaForCausalLM

    base = LlamaForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32)
    return PeftModel.from_pretrained(base, str(one_pool / "alpha")).eval()


@pytest.fixture
def fused(tiny_llama_folder: Path, one_pool: Path) -> Any:
    return FusedCausalLM.from_pretrained(tiny_llama_folder, pool=one_pool, method="avg_delta", device="cpu")


def continued(model: Any, tokenizer: Any, text: str, *, special: bool = True, **options: Any) -> str:
    """One prompt by itself through transformers' own generate."""
    ids = tokenizer(text, add_special_tokens=special, return_tensors="pt")["input_ids"]
    made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **{**GREEDY, **options})
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))


def test_text_is_what_peft_generates(fused: Any, adapted: Any, tokenizer: Any) -> None:
    expected = [continued(adapted, tokenizer, prompt) for prompt in PROMPTS]
    assert all(expected)
    assert fused.generate_text(PROMPTS, **GREEDY) == expected
    assert fused.generate_text(PROMPTS[0], **GREEDY) == expected[0]
    assert fused.generate_text(PROMPTS[:1], **GREEDY) == expected[:1]
    assert fused.generate_text([], **GREEDY) == []
    several = fused.generate_text(PROMPTS[1], num_return_sequences=2, num_beams=2, **GREEDY)
    assert isinstance(several, list)
    assert len(several) == 2


def test_conversations_go_through_the_chat_template(fused: Any, adapted: Any) -> None:
    fused.tokenizer.chat_template = TEMPLATE
    talks = [[{"role": "user", "content": text}] for text in PROMPTS]
    talks[1].insert(0, {"role": "system", "content": "yes"})
    written = ["[user] the cat sees\n[assistant]", "[system] yes\n[user] Mia likes a plum . Tom\n[assistant]"]
    expected = [continued(adapted, fused.tokenizer, text, special=False) for text in written]
    assert fused.generate_text(talks, **GREEDY) == expected
    assert fused.generate_text(talks[1], **GREEDY) == expected[1]  # a list of messages is one conversation
    assert fused.generate_text([*talks[:1], PROMPTS[1]], **GREEDY)[1] == continued(adapted, fused.tokenizer, PROMPTS[1])


def test_a_prompt_that_is_too_long_is_cut_on_the_left(fused: Any, adapted: Any, tokenizer: Any) -> None:
    ids = tokenizer("the cat sees a plum . " * 60)["input_ids"]
    assert len(ids) > 256
    kept = torch.tensor([ids[-(256 - 7) :]])
    made = adapted.generate(input_ids=kept, attention_mask=torch.ones_like(kept), pad_token_id=0, **GREEDY)
    assert fused.generate_text("the cat sees a plum . " * 60, **GREEDY) == tokenizer.decode(made[0, 249:], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("prompts", "part"),
    [
        (7, "got int"),
        ([7], "prompt 0 must be text or a conversation"),
        (["a", None], "prompt 1 must be text or a conversation"),
        ([{"role": "user"}], r"message 0 .* needs 'role' and 'content'"),
        ([{"role": "user", "content": ["a"]}], r"message 0 .* both text"),
        ([{"role": "user", "content": "a"}], "no chat template"),
        ("", "prompt 0 is empty"),
    ],
)
def test_what_is_no_prompt(fused: Any, prompts: Any, part: str) -> None:
    with pytest.raises(GenerationError, match=part):
        fused.generate_text(prompts, **GREEDY)


def test_other_refusals(fused: Any) -> None:
    with pytest.raises(GenerationError, match="1 task names for 2 prompts"):
        fused.generate_text(PROMPTS, task_names=["alpha"], **GREEDY)
    with pytest.raises(GenerationError, match="use generate"):
        fused.generate_text("the cat", return_dict_in_generate=True, **GREEDY)
    fused.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(GenerationError, match="refuses this conversation: roles must alternate"):
        fused.generate_text([{"role": "user", "content": "a"}], **GREEDY)


def test_task_names_reach_the_oracle(tiny_llama_folder: Path, one_pool: Path, adapted: Any, tokenizer: Any) -> None:
    fused = FusedCausalLM.from_pretrained(tiny_llama_folder, pool=one_pool, method="oracle", device="cpu")
    assert fused.generate_text(PROMPTS, task_names="alpha", **GREEDY) == [continued(adapted, tokenizer, text) for text in PROMPTS]
    assert "".join(fused.stream_text(PROMPTS[0], task_names="alpha", **GREEDY)) == continued(adapted, tokenizer, PROMPTS[0])
    with pytest.raises(GenerationError, match="task_names must be the name of a task, got list"):
        fused.stream_text(PROMPTS[0], task_names=["alpha"], **GREEDY)


@pytest.mark.filterwarnings("ignore")
def test_transformers_pipeline(fused: Any, adapted: Any) -> None:
    from transformers import pipeline

    fused.tokenizer.chat_template = TEMPLATE
    ours = pipeline("text-generation", model=fused, tokenizer=fused.tokenizer)
    theirs = pipeline("text-generation", model=adapted, tokenizer=copy.deepcopy(fused.tokenizer))
    assert "FusedCausalLM" in repr(ours)
    talk = [{"role": "user", "content": PROMPTS[0]}]
    for given, options in (
        (PROMPTS[0], {}),
        (PROMPTS, {}),
        (PROMPTS, {"batch_size": 2}),
        (talk, {}),
        (PROMPTS[0], {"return_full_text": False}),
    ):
        found = ours(given, **GREEDY, **options)
        assert found == theirs(given, **GREEDY, **options)
    assert ours(PROMPTS[0], **GREEDY, return_full_text=False)[0]["generated_text"] == fused.generate_text(PROMPTS[0], **GREEDY)


def test_a_method_that_reads_training_prompts_is_told_of_them(
    tiny_llama_folder: Path, make_adapter: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = write_tasks(tmp_path / "rows")
    for seed, name in enumerate(NAMES):
        make_adapter(tmp_path / "pool" / name, seed=seed)
    question = "Ann likes the box . who likes what in the tree and in the box ?\\nAnswer:"
    model = ["--pretrained", str(tiny_llama_folder), "--pool", str(tmp_path / "pool"), "--method", "lorauter", "--device", "cpu"]
    options = ["generate", question, *model, "--max-new-tokens", "2", "--trace"]
    assert main(options) == 2
    assert "and no suite was given. Pass --suite or --data-root" in capsys.readouterr().err
    for given, kept in (([], 3), (["--suite", "local:all"], 3), (["--method-param", "top_k=1"], 1)):
        assert main([*options, *given, "--data-root", str(rows)]) == 0
        trace = capsys.readouterr().out.splitlines()[-1]
        assert trace.partition("prompt: ")[2].startswith("echo ")
        assert sum(f"{name} " in trace.partition("  (read")[0] for name in NAMES) == kept
    told = ["--method-param", "top_k=1", "--data-root", str(rows)]
    assert main(["export", "peft", str(tmp_path / "out"), "--prompt", question, *model, *told]) == 0
    assert ": echo 1; rank" in capsys.readouterr().out
    assert main([*options, "--suite", "local:petz", "--data-root", str(rows)]) == 2
    assert "pets" in capsys.readouterr().err
    assert main([*options, "--artifact", "router"]) == 2
    assert "--artifact must be ROLE=DIR" in capsys.readouterr().err


def test_the_base_model_alone_needs_no_pool(
    tiny_llama_folder: Path, tiny_llama: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    fused = FusedCausalLM.from_pretrained(tiny_llama_folder, method="base", device="cpu")
    assert fused.bank.names == ()
    assert fused.generate_text(PROMPTS, **GREEDY) == [continued(tiny_llama, tokenizer, text) for text in PROMPTS]
    with pytest.raises(Exception, match="adapter folders can be saved"):
        fused.save_pretrained(tmp_path / "saved")
    options = ["generate", PROMPTS[0], "--pretrained", str(tiny_llama_folder), "--max-new-tokens", "7", "--device", "cpu"]
    assert main([*options, "--method", "base"]) == 0
    assert capsys.readouterr().out.strip() == continued(tiny_llama, tokenizer, PROMPTS[0]).strip()
    assert main(options) == 2
    assert "method 'dlp' needs a pool of adapters: pass pool=FOLDER" in capsys.readouterr().err
    assert main([*options, "--method", "base", "--chat"]) == 2
    assert "no chat template" in capsys.readouterr().err
