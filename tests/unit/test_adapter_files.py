"""Every door for adapters and pools: what cannot be fused exactly is refused with its name, and nothing is left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dlplora.adapters.add import add_adapter
from dlplora.adapters.files import read_adapter
from dlplora.adapters.pool import load_pool, unlisted, write_manifest
from dlplora.errors import AdapterError, IncompatibleAdapterError, PoolError, RoutingError, UnsafeFileError
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.methods.references import Base, Oracle
from dlplora.modules.lora_bank import AdapterBank

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def folder(tiny_pool: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_pool / "alpha", tmp_path / "alpha"))


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"r": 0}, "'r' must be a positive number"),
        ({"r": 5}, "declares rank 5"),
        ({"rank_pattern": {"q_proj": 3}}, "declares rank 3"),
        ({"lora_alpha": "x"}, "'lora_alpha'"),
    ],
)
def test_unsupported_configurations(folder: Path, change: dict[str, Any], part: str) -> None:
    edit(folder, **change)
    with pytest.raises(AdapterError) as caught:
        read_adapter(folder)
    assert part in str(caught.value)
    assert "alpha" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_damaged_files(folder: Path) -> None:
    with pytest.raises(AdapterError, match="folder not found"):
        read_adapter(folder / "no")
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])
    with pytest.raises(AdapterError, match="damaged or truncated"):
        read_adapter(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(AdapterError, match=f"{WEIGHTS} is missing"):
        read_adapter(folder)
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04N.")
    with pytest.raises(UnsafeFileError, match="pickled weights only"):
        read_adapter(folder)
    (folder / CONFIG).write_text("[1]")
    with pytest.raises(AdapterError, match="expected an object, got list"):
        read_adapter(folder)
    (folder / CONFIG).write_text("{")
    with pytest.raises(AdapterError, match="not JSON"):
        read_adapter(folder)
    (folder / CONFIG).unlink()
    with pytest.raises(AdapterError, match=f"{CONFIG} is missing"):
        read_adapter(folder)


def spoil(folder: Path, change: Callable[[dict[str, torch.Tensor], str], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors, sorted(tensors)[0])
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda tensors, key: tensors[key].__setitem__((0, 0), float("nan")), "NaN or infinite"),
        (lambda tensors, key: tensors[key].__setitem__((0, 0), float("inf")), "NaN or infinite"),
        (lambda tensors, key: tensors.pop(key), "only lora_B"),
        (lambda tensors, key: tensors.update({key: tensors[key][:2]}), "expected (R, I) and (O, R)"),
        (lambda tensors, key: tensors.update({"base_model.model.embed.lora_embedding_A": torch.ones(1)}), "trained embedding"),
        (lambda tensors, key: tensors.update({"base_model.model.lm_head.weight": torch.ones(1)}), "not a LoRA factor"),
        (lambda tensors, key: tensors.clear(), "no LoRA weights"),
        (lambda tensors, key: tensors.update({key.removeprefix("base_model.model."): tensors[key].clone()}), "are one factor"),
        (lambda tensors, key: tensors.update({"base_model.model.model.norm.bias": torch.ones(1)}), "trained bias"),
    ],
)
def test_damaged_weights(folder: Path, change: Any, part: str) -> None:
    spoil(folder, change)
    with pytest.raises(AdapterError) as caught:
        read_adapter(folder)
    assert part in str(caught.value)


@pytest.fixture
def pool(tiny_pool: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_pool, tmp_path / "pool"))


def test_manifests_are_checked(pool: Path, tmp_path: Path) -> None:
    write_manifest(pool, ["gamma", "alpha"], None)
    assert load_pool(pool).names == ("gamma", "alpha")
    assert unlisted(load_pool(pool)) == ["beta"]
    shutil.copy(pool / "beta" / WEIGHTS, pool / "alpha" / WEIGHTS)
    with pytest.raises(PoolError, match=r"'alpha'.*changed after it was added"):
        load_pool(pool)
    manifest = json.loads((pool / "pool.json").read_text())
    for change, part in (
        ({"format": 9}, "format 9 is not known"),
        ({"adapters": [{"name": "x"}]}, r"adapters\[0\]: missing required key\(s\): path, sha256"),
        ({"adapters": [{"name": "x", "path": "../../x", "sha256": "0"}]}, "leaves the pool folder"),
        ({"adapters": manifest["adapters"][:1] * 2}, "must be unique"),
        ({"adapters": []}, "lists no adapter"),
        ({"adapters": {"x": 1}}, r"'adapters' must be list\[_?Row\]"),
        ({"adapters": [{"name": "../x", "path": "alpha", "sha256": "0"}]}, "'../x' cannot name an adapter"),
        ({"adapters": [{"name": "a\nb", "path": "alpha", "sha256": "0"}]}, "cannot name an adapter"),
    ):
        (pool / "pool.json").write_text(json.dumps(manifest | change))
        with pytest.raises(PoolError, match=part):
            load_pool(pool)
    (pool / "pool.json").write_text("{")
    with pytest.raises(PoolError, match="not JSON"):
        load_pool(pool)
    with pytest.raises(PoolError, match="not found"):
        load_pool(tmp_path / "no")
    with pytest.raises(PoolError, match="looks like a single adapter"):
        load_pool(pool / "alpha")


def test_a_folder_that_is_a_link_out_of_the_pool_is_refused_without_a_manifest_too(pool: Path, tmp_path: Path) -> None:
    (pool / "pool.json").unlink(missing_ok=True)
    shutil.move(pool / "beta", tmp_path / "outside")
    (pool / "beta").symlink_to(tmp_path / "outside")
    with pytest.raises(PoolError, match="'beta' is a link out of the pool"):
        load_pool(pool)


def test_adding_an_adapter(tmp_path: Path, tiny_pool: Path, folder: Path) -> None:
    pool = add_adapter(tmp_path / "new", tiny_pool / "beta")
    assert pool.names == ("beta",)
    assert add_adapter(tmp_path / "new", tiny_pool / "gamma", "third").names == ("beta", "third")
    assert sorted(path.name for path in (tmp_path / "new" / "third").iterdir()) == [CONFIG, WEIGHTS]
    for adapter, name, part in ((tiny_pool / "alpha", "beta", "already has"), (tiny_pool / "alpha", "a/b", "cannot name")):
        with pytest.raises(PoolError, match=part):
            add_adapter(tmp_path / "new", adapter, name)
    edit(folder, use_dora=True)
    before = sorted(path.name for path in (tmp_path / "new").iterdir())
    with pytest.raises(AdapterError, match="use_dora"):
        add_adapter(tmp_path / "new", folder, "bad")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == before
    shutil.copytree(tiny_pool / "alpha", tmp_path / "new" / "inside")
    assert unlisted(load_pool(tmp_path / "new")) == ["inside"]
    assert add_adapter(tmp_path / "new", tmp_path / "new" / "inside").names == ("beta", "third", "inside")


def test_a_pool_of_another_backbone_is_refused(pool: Path, tiny_llama_folder: Path) -> None:
    write_manifest(pool, ["alpha"], {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2})
    with pytest.raises(PoolError, match="hidden_size"):
        FusedCausalLM.from_pretrained(tiny_llama_folder, pool=pool, method="base")


def test_modules_the_backbone_lacks_are_named(folder: Path, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({key.replace("q_proj", "q_prok"): value for key, value in tensors.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text((folder / CONFIG).read_text().replace("q_proj", "q_prok"))
    with pytest.raises(IncompatibleAdapterError, match=r"no module '.*q_prok'.*alpha.*[Dd]id you mean '.*q_proj'"):
        FusedCausalLM(tiny_llama, tiny_tokenizer, AdapterBank.from_peft({"alpha": folder}), Base())
    assert not any("base." in name for name, _ in tiny_llama.named_parameters())


def test_sizes_that_do_not_fit_are_named(folder: Path, tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({key: torch.ones(4, 16) if "lora_A" in key else value for key, value in tensors.items()}, folder / WEIGHTS)
    with pytest.raises(IncompatibleAdapterError, match=r"32 -> .* the adapters \(alpha\) expect 16 -> "):
        FusedCausalLM(tiny_llama, tiny_tokenizer, AdapterBank.from_peft({"alpha": folder}), Base())
    with pytest.raises(IncompatibleAdapterError, match=r"'beta' has sizes 32.*'alpha' has"):
        AdapterBank.from_peft({"alpha": folder, "beta": tiny_pool / "beta"})


def test_factor_fusion_needs_equal_ranks(tiny_pool: Path) -> None:
    with pytest.raises(IncompatibleAdapterError, match=r"'mine'.*alpha 4, beta 6, gamma 2"):
        AdapterBank.from_pool(tiny_pool).require_equal_ranks("mine")


def test_routing_that_is_missing_or_does_not_fit(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    fused = FusedCausalLM(tiny_llama, tiny_tokenizer, AdapterBank.from_pool(tiny_pool), Oracle())
    ids = torch.tensor([[1, 5, 6], [1, 7, 8]])
    with pytest.raises(RoutingError, match="no routing weights are bound"):
        fused(input_ids=ids)
    with pytest.raises(RoutingError, match="for 2 experts, the bank has 3"):
        fused.routing(torch.ones(2)).__enter__()
    with fused.routing(torch.ones(3, 3)), pytest.raises(RoutingError, match="made for 3 rows, the batch has 2"):
        fused(input_ids=ids)
    with pytest.raises(RoutingError, match="NaN"):
        fused.routing(torch.tensor([1.0, float("nan"), 0.0])).__enter__()
    with pytest.raises(RoutingError, match=r"must be \(E,\)"):
        fused.routing(torch.ones(1, 1, 1, 3)).__enter__()
    with fused.routing(torch.ones(3)):
        fused(input_ids=ids)
    assert fused.slot.state is None
