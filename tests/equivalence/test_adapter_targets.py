"""What PEFT writes is read, tensors that PEFT would pass over are refused. The truth is PEFT."""

from __future__ import annotations

import copy
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from dlplora.adapters.headers import examine, read_header
from dlplora.adapters.targets import left_out, target_problems
from dlplora.cli.main import main
from dlplora.errors import AdapterError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ALL: dict[str, dict[str, Any]] = {
    "llama": {"target_modules": "all-linear"},
    "gpt2": {"target_modules": "all-linear", "fan_in_fan_out": True},
    "opt": {"target_modules": "all-linear"},
}
SELECTIONS: dict[str, list[dict[str, Any]]] = {
    "llama": [
        {"target_modules": "all-linear"},
        {"target_modules": "All-Linear"},
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["model.layers.0.self_attn.q_proj"]},
        {"target_modules": ["0.self_attn.q_proj", "down_proj"]},
        {"target_modules": ["self_attn.q_proj", "elf_attn.v_proj", "proj", ""]},
        {"target_modules": r".*\.1\..*\.(q|up)_proj"},
        {"target_modules": r"q_proj"},
        {"target_modules": r"model\.layers\.\d+\.self_attn\.\w_proj"},
        {"target_modules": r".*_proj|lm_head"},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0]},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": []},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 7]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["blocks"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": []},
        {"target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"], "layers_to_transform": [1]},
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["lm_head", "q_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj"]},
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["model.layers.0.self_attn.k_proj", "1.self_attn.q_proj"]},
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*layers\.1\..*"},
        {"target_modules": "all-linear", "exclude_modules": r".*mlp.*"},
        {"target_modules": ["q_proj"], "exclude_modules": r"q_proj"},
        {"target_modules": ["q_proj"], "exclude_modules": []},
    ],
    "gpt2": [
        {"target_modules": ["c_attn"]},
        {"target_modules": ["attn.c_proj", "c_fc"], "layers_to_transform": [1], "layers_pattern": "h"},
        {"target_modules": r"transformer\.h\.0\..*c_\w+"},
        {"target_modules": "all-linear", "exclude_modules": ["mlp.c_proj"]},
        {"target_modules": ["c_attn"], "layers_to_transform": [0]},
    ],
    "opt": [
        {"target_modules": ["fc1", "q_proj"]},
        {"target_modules": ["fc1", "out_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
        {"target_modules": r"model\.decoder\.layers\.1\.fc\d"},
        {"target_modules": "all-linear", "exclude_modules": r".*self_attn.*"},
    ],
}
CASES = [(kind, selection) for kind, selections in SELECTIONS.items() for selection in selections]


@pytest.fixture(scope="module")
def bases(tiny_tokenizer: Any, _tiny_llama_master: Any) -> dict[str, Any]:
    size = len(tiny_tokenizer)
    torch.manual_seed(0)
    return {
        "llama": _tiny_llama_master,
        "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval(),
        "opt": OPTForCausalLM(
            OPTConfig(vocab_size=size, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32)
        ).eval(),
    }


@pytest.fixture(scope="module")
def full(bases: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of each kind an adapter with tensors for every linear layer, the output layer included where it is one of its own."""
    folders = {}
    for kind, base in bases.items():
        options = dict(ALL[kind])
        if kind == "llama":
            options["target_modules"] = r".*_proj|lm_head"
        folders[kind] = adapter(base, tmp_path_factory.mktemp("full") / kind, **options)
    return folders


def adapter(base: Any, folder: Path, **options: Any) -> Path:
    model = get_peft_model(copy.deepcopy(base), LoraConfig(task_type="CAUSAL_LM", r=3, init_lora_weights=False, **options))
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def chosen_by_peft(base: Any, selection: dict[str, Any]) -> set[str]:
    """Module paths that PEFT adapts; none where it finds nothing to adapt."""
    try:
        model = get_peft_model(copy.deepcopy(base), LoraConfig(task_type="CAUSAL_LM", r=3, **selection))
    except ValueError as error:
        if "arget modules" not in str(error) and "No modules were targeted" not in str(error):
            raise
        return set()
    return set(model.base_model.targeted_module_names)


@pytest.mark.parametrize(("kind", "selection"), CASES)
def test_modules_are_left_out_exactly_where_peft_leaves_them_out(
    kind: str, selection: dict[str, Any], bases: dict[str, Any], full: dict[str, Path]
) -> None:
    modules = read_header(full[kind], "full").modules
    kept = chosen_by_peft(bases[kind], selection)
    assert target_problems(selection) == []
    found = left_out(selection, dict.fromkeys(modules, ()))
    assert {module for these in found.values() for module in these} == set(modules) - kept


@pytest.mark.parametrize(("kind", "selection"), CASES)
def test_what_peft_writes_is_read(kind: str, selection: dict[str, Any], bases: dict[str, Any], tmp_path: Path) -> None:
    kept = chosen_by_peft(bases[kind], selection)
    if not kept:
        pytest.skip("PEFT makes no such adapter")
    options = {"fan_in_fan_out": True} if kind == "gpt2" else {}
    folder = adapter(bases[kind], tmp_path / "it", **selection, **options)
    assert set(read_header(folder, "it").modules) == kept
    as_sets = {key: set(value) if isinstance(value, list) and key.endswith("modules") else value for key, value in selection.items()}
    assert set(read_header(adapter(bases[kind], tmp_path / "sets", **as_sets, **options), "sets").modules) == kept


def test_many_targets_that_peft_shortens_are_read(bases: dict[str, Any], tmp_path: Path) -> None:
    """PEFT writes long lists of targets as a few ends."""
    names = [name for name, module in bases["llama"].named_modules() if name.endswith("_proj") and isinstance(module, torch.nn.Linear)]
    names += [f"model.layers.0.other{i}" for i in range(20)]
    folder = adapter(bases["llama"], tmp_path / "it", target_modules=names)
    assert len(read_header(folder, "it").modules) == 14


def edited(source: Path, folder: Path, **changes: Any) -> Path:
    shutil.copytree(source, folder)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "setting", "first"),
    [
        ({"layers_to_transform": [0]}, "layers_to_transform", "model.layers.1.self_attn.q_proj"),
        ({"target_modules": ["q_proj"]}, "target_modules", "model.layers.0.self_attn.v_proj"),
        ({"target_modules": r".*0\.self_attn\.q_proj"}, "target_modules", "model.layers.0.self_attn.v_proj"),
        ({"exclude_modules": ["v_proj"]}, "exclude_modules", "model.layers.0.self_attn.v_proj"),
        ({"exclude_modules": r".*layers\.1\..*"}, "exclude_modules", "model.layers.1.self_attn.q_proj"),
        ({"target_modules": []}, "target_modules", "model.layers.0.self_attn.q_proj"),
    ],
)
def test_edited_settings_are_refused_by_name(
    changes: dict[str, Any], setting: str, first: str, tiny_pool: Path, tiny_llama: Any, tmp_path: Path, capsys: Any
) -> None:
    """PEFT loads such a folder and answers with fewer tensors than the file has."""
    folder = edited(tiny_pool / "alpha", tmp_path / "pool" / "alpha", **changes)
    with pytest.raises(AdapterError, match=rf"'{setting}' in {CONFIG} leaves out '{first}'.*PEFT would not use") as caught:
        read_header(folder, "alpha")
    assert "\n" not in str(caught.value)
    assert main(["pool", "check", str(tmp_path / "pool")]) == 2
    assert setting in capsys.readouterr().err
    if changes.get("target_modules") != []:
        ids = torch.tensor([[1, 5, 9, 40]])
        whole, part = (PeftModel.from_pretrained(copy.deepcopy(tiny_llama), str(one)).eval() for one in (tiny_pool / "alpha", folder))
        assert not torch.equal(whole(input_ids=ids).logits, part(input_ids=ids).logits)


def test_all_linear_leaves_out_the_output_layer(full: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="leaves out 'lm_head': 'all-linear'"):
        read_header(edited(full["llama"], tmp_path / "it", target_modules="all-linear"), "it")


def test_settings_that_are_not_there_select_everything(full: dict[str, Path], tmp_path: Path) -> None:
    nothing = {"target_modules": None, "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
    assert len(read_header(edited(full["llama"], tmp_path / "it", **nothing), "it").modules) == 15


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"target_modules": 5}, "'target_modules' must be text or a list of texts, got 5"),
        ({"target_modules": ["q_proj", 5]}, "'target_modules' must be text or a list of texts"),
        ({"target_modules": "("}, "'target_modules' holds '(', which is not a regular expression"),
        ({"exclude_modules": {"a": 1}}, "'exclude_modules' must be text or a list of texts"),
        ({"exclude_modules": "a" * 20_000}, "longer than 10,000 characters"),
        ({"layers_to_transform": "0"}, "'layers_to_transform' must be a whole number or a list of them"),
        ({"layers_to_transform": [0, True]}, "'layers_to_transform' must be a whole number"),
        ({"layers_to_transform": 1.0}, "'layers_to_transform' must be a whole number"),
        ({"layers_to_transform": [0], "layers_pattern": ["("]}, "'layers_pattern' holds '('"),
        ({"layers_to_transform": [0], "layers_pattern": ["h"] * 101}, "'layers_pattern' holds 101 patterns"),
        ({"layers_to_transform": [0], "target_modules": ".*q_proj"}, "'layers_to_transform' is set, but 'target_modules' is one text"),
    ],
)
def test_settings_of_wrong_types_are_one_line(changes: dict[str, Any], part: str, tiny_pool: Path, tmp_path: Path) -> None:
    _, problems = examine(edited(tiny_pool / "alpha", tmp_path / "it", **changes), "it")
    assert part in str(problems[0])
    assert "\n" not in str(problems[0])


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": "(.*.*)*.*.*.*x(a+a+)+y"},
        {"exclude_modules": r"([a-z._0-9]+)+$\d"},
        {"layers_to_transform": [0], "layers_pattern": r"(\w+\w+)+x"},
        {"exclude_modules": [str(i) for i in range(500_000)]},
    ],
)
def test_settings_cannot_hang(changes: dict[str, Any], tiny_pool: Path, tmp_path: Path) -> None:
    folder = edited(tiny_pool / "alpha", tmp_path / "it", **changes)
    start = time.monotonic()
    _, problems = examine(folder, "it")
    assert time.monotonic() - start < 5
    assert all("takes too long" in str(one) or "leaves out" in str(one) for one in problems)


def test_names_of_wrappers_may_be_part_of_the_settings(tiny_pool: Path, tmp_path: Path) -> None:
    """A model that was compiled before it was adapted: the pattern was compared with the wrapped names, the keys are unwrapped here."""
    source = tiny_pool / "alpha"
    for number, prefix in enumerate(("base_model.model._orig_mod.", "module.base_model.model._orig_mod.")):
        folder = edited(source, tmp_path / f"it{number}", target_modules=r"_orig_mod\.model\..*_proj")
        tensors = {key.replace("base_model.model.", prefix, 1): value for key, value in load_file(source / WEIGHTS).items()}
        save_file(tensors, folder / WEIGHTS)
        assert set(read_header(folder, "it").modules) == set(read_header(source, "alpha").modules)
