"""Malformed files of a pool and its adapters: one line that names the file, no hang."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dlplora.adapters.config import pattern_value
from dlplora.adapters.files import read_adapter
from dlplora.adapters.hub import find_pool
from dlplora.adapters.pool import load_pool, write_manifest
from dlplora.cli.main import main
from dlplora.errors import AdapterError, PoolError
from tests.broken_documents import BROKEN, one_line


@pytest.fixture
def pool_copy(tiny_pool: Path, tmp_path: Path) -> Path:
    """A pool with a manifest, to be spoilt."""
    pool = Path(shutil.copytree(tiny_pool, tmp_path / "pool"))
    write_manifest(pool, ["alpha", "beta", "gamma"], None)
    return pool


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("what", BROKEN)
def test_pool_json(what: str, pool_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pool_copy / "pool.json").write_text(BROKEN[what])
    with pytest.raises(PoolError) as caught:
        load_pool(pool_copy)
    one_line(caught.value, "pool.json")
    for action in (["list", str(pool_copy)], ["check", str(pool_copy)], ["add", str(pool_copy), str(pool_copy / "alpha")]):
        assert main(["pool", *action]) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda row: row.update(name=5),
        lambda row: row.update(name=""),
        lambda row: row.update(name="a\0b"),
        lambda row: row.update(path=["x"]),
        lambda row: row.update(sha256=None),
        lambda row: row.update(config_sha256=5),
        lambda row: row.update(source={"a": 1}),
        lambda row: row.update(rank="8"),
        lambda row: row.update(target_modules=[5]),
        lambda row: row.update(colour="red"),
    ],
)
def test_rows_of_a_pool(change: Callable[[dict[str, Any]], Any], pool_copy: Path) -> None:
    edit(pool_copy / "pool.json", lambda content: change(content["adapters"][0]))
    with pytest.raises(PoolError) as caught:
        load_pool(pool_copy)
    one_line(caught.value, "pool.json")


@pytest.mark.parametrize("name", ["", " ", "a\0b"])
def test_a_pool_without_a_name(name: str) -> None:
    with pytest.raises(PoolError, match="empty"):
        find_pool(name)


@pytest.mark.parametrize("what", BROKEN)
def test_adapter_config(what: str, pool_copy: Path) -> None:
    (pool_copy / "alpha" / "adapter_config.json").write_text(BROKEN[what])
    with pytest.raises(AdapterError) as caught:
        read_adapter(pool_copy / "alpha")
    one_line(caught.value, "alpha", "adapter_config.json")


@pytest.mark.parametrize(
    "change",
    [
        {"r": int("9" * 400)},
        {"lora_alpha": int("9" * 400)},
        {"lora_alpha": 1e308},
        {"lora_alpha": -1},
        {"r": 1e300},
        {"r": [4]},
        {"rank_pattern": {"q_proj": 1e308}},
        {"rank_pattern": {"(": 4}},
        {"rank_pattern": {"(" * 5_000 + ")" * 5_000: 4}},
        {"rank_pattern": {"x" * 20_000: 4}},
        {"alpha_pattern": {"q_proj": int("9" * 30)}},
        {"alpha_pattern": [1]},
        {"use_rslora": "false"},
        {"base_model_name_or_path": {"a": 1}},
        {"target_modules": 5},
        {"bias": 5},
    ],
    ids=str,
)
def test_adapter_settings_of_wrong_types_or_sizes(change: dict[str, Any], pool_copy: Path) -> None:
    edit(pool_copy / "alpha" / "adapter_config.json", lambda config: config.update(change))
    with pytest.raises(AdapterError) as caught:
        read_adapter(pool_copy / "alpha")
    one_line(caught.value, "alpha")


EXPONENTIAL = [r"(.*)*x", r"(a+)+b", r"([a-z_.0-9]+)*!", r"(\w+\.?)*!", r"(?:(?:\w+)+\.)+?!"]


@pytest.mark.parametrize("pattern", EXPONENTIAL)
def test_a_pattern_that_never_ends_is_refused_in_time(pattern: str, pool_copy: Path) -> None:
    edit(pool_copy / "alpha" / "adapter_config.json", lambda config: config.update(rank_pattern={pattern: 4}))
    start = time.monotonic()
    try:
        read_adapter(pool_copy / "alpha")
    except AdapterError as error:
        one_line(error, "alpha", "takes too long")
    assert time.monotonic() - start < 5


def test_patterns_are_pefts() -> None:
    from peft.utils.other import get_pattern_key

    modules = ["model.layers.0.self_attn.q_proj", "model.layers.11.self_attn.v_proj", "q_proj", "lm_head", "model.layers.1.mlp"]
    patterns = [
        "q_proj",
        "layers.1",
        r"layers\.\d+\.self_attn\.q_proj",
        ".*mlp.*",
        "model.layers.0.self_attn.q_proj",
        r"(q|v)_proj",
        "head",
    ]
    for module in modules:
        for number in range(len(patterns)):
            listed = patterns[number:] + patterns[:number]
            key = get_pattern_key(listed, module)
            assert pattern_value({one: one for one in listed}, module, module) == key


@pytest.mark.parametrize(
    "row",
    [
        {"shape": [float("inf"), 2]},
        {"shape": [-1, 2]},
        {"shape": [True, 2]},
        {"shape": [2.0, 2]},
        {"shape": 5},
        {"shape": [int("9" * 400), 2]},
        {"data_offsets": [0]},
        {"data_offsets": ["0", "8"]},
        {"dtype": {"a": 1}},
        None,
        5,
    ],
    ids=str,
)
def test_headers_of_weights(row: Any, pool_copy: Path) -> None:
    path = pool_copy / "alpha" / "adapter_model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    key = sorted(key for key in header if key != "__metadata__")[0]
    header[key] = {**header[key], **row} if isinstance(row, dict) else row
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    with pytest.raises(AdapterError) as caught:
        read_adapter(pool_copy / "alpha")
    one_line(caught.value, "alpha")
