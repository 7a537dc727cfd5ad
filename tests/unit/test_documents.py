"""Malformed JSON and YAML at every door: one line that names the file, nothing executed, nothing printed that is secret, no hang."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from safetensors.torch import load_file, save_file

from dlplora.adapters.pool import load_pool
from dlplora.cli.main import main
from dlplora.config import ASSETS_ROOT, build
from dlplora.documents import parse_json, parse_yaml, read_yaml
from dlplora.errors import ConfigError, DLPLoRAError, MethodError
from dlplora.evaluation.protocol import load_protocol
from dlplora.methods.registry import method_class
from dlplora.modules.lora_bank import AdapterBank
from dlplora.modules.router import MiniMLPRouter, RouterConfig
from tests.broken_documents import BROKEN, DIGITS, one_line

# ---------------------------------------------------------------------- the loader


@pytest.mark.parametrize("what", [name for name in BROKEN if name not in {"list", "null", "text", "object", "wrong"}])
def test_json_is_plain_data_or_one_line(what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_json(BROKEN[what], "f.json")
    one_line(caught.value, "f.json")
    with pytest.raises(ConfigError) as caught:
        parse_json(b'{"a": "\xff"}', "f.json")
    one_line(caught.value, "f.json", "not UTF-8")


def test_json_of_all_sound_kinds_is_read_as_the_standard_library_reads_it() -> None:
    text = json.dumps({"a": [1, -2, 0.5, 1e300, True, None, "ü \U0001f600", {"b": {}}], "n": 2**63, "m": -(2**63)})
    assert parse_json(text, "f") == json.loads(text)


YAMLS = {
    "env": ("a: ${oc.env:DLPLORA_SECRET}", "may refer to its own keys only"),
    "env in text": ("a: x${oc.env:DLPLORA_SECRET}y", "may refer to its own keys only"),
    "env with default": ("a: ${oc.env:DLPLORA_SECRET,none}", "may refer to its own keys only"),
    "env in pieces": ("x: env\na: ${oc.${x}:DLPLORA_SECRET}", "may refer to its own keys only"),
    "env by reference": ("b: 'oc.env:DLPLORA_SECRET'\na: ${${b}}", "may refer to its own keys only"),
    "decode": ("a: ${oc.decode:'1'}", "may refer to its own keys only"),
    "circle": ("a: ${b}\nb: ${a}", "refers to itself"),
    "missing": ("a: ${no.such}", "refers to a missing key"),
    "growing": ("\n".join(f"a{i}: ${{a{i + 1}}}${{a{i + 1}}}" for i in range(60)) + "\na60: xx", "grows beyond"),
    "growing lists": ("\n".join(f"a{i}: ['${{a{i + 1}}}', '${{a{i + 1}}}']" for i in range(60)) + "\na60: xx", "more than"),
    "aliases": (
        "a: &a [x]\n" + "\n".join(f"b{i}: &b{i} [*{p}, *{p}]" for i, p in enumerate(["a", *(f"b{j}" for j in range(30))])),
        "values",
    ),
    "recursive alias": ("a: &a [*a]", "nested too deeply"),
    "deep": ("a: " + "[" * 3_000, "as YAML"),
    "digits": ("a: " + DIGITS, "as YAML"),
    "sexagesimal": ("a: 1" + ":59" * 30, "digits"),
    "NaN": ("a: .nan", "field 'a' is nan"),
    "infinite": ("a: [1, .inf]", "field 'a[1]' is inf"),
    "twice": ("a: 1\na: 2", "duplicate key 'a'"),
    "tag": ("a: !!python/object/apply:os.system [echo x]", "as YAML"),
    "list": ("[1]", "must hold a mapping"),
    "NUL": ('a: "\\0"', "NUL"),
    "surrogate": ('a: "\\ud800"', "surrogate"),
    "many references": ("a: xx\nb: '" + "${a}" * 200_000 + "${c}'", "refers to a missing key"),
    "references inside each other": ("b: '" + "${a" * 20_000 + "}" * 20_000 + "'", "own keys only"),
    "a chain of references": ("\n".join(f"a{i}: ${{a{i + 1}}}" for i in range(5_000)) + "\na5000: x", "too many other references"),
    "no index": ("a: [1]\nb: ${a[\u00b2]}", "refers to a missing key"),
    "base 60 without end": ("a: " + "1:" * 100_000 + "1", "too many digits"),
    "no truth value": ("a: !!bool x", "does not fit its value"),
    "no time": ("a: !!timestamp x", "does not fit its value"),
    "no number": ("a: !!float ''", "does not fit its value"),
    "set": ("a: !!set {x}", "neither text nor number"),
}


@pytest.mark.parametrize("what", YAMLS)
def test_yaml_is_plain_data_or_one_line(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DLPLORA_SECRET", "hunter2")
    text, part = YAMLS[what]
    (tmp_path / "f.yaml").write_text(text)
    start = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        read_yaml(tmp_path / "f.yaml")
    assert time.monotonic() - start < 10
    one_line(caught.value, part)
    assert "f.yaml" in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_yaml_of_all_sound_kinds(tmp_path: Path) -> None:
    """References are OmegaConf's: absolute, relative, into lists, whole values and parts of a text."""
    from omegaconf import OmegaConf

    text = """
        a: 1e-3
        b: {c: '${a}', d: [1, 2.5, yes, null, text, 2024-01-01], e: '${.d}', f: '${..a}', g: 'x${b.d[0]}y', h: "${b.${name}}"}
        name: c
        merged: {<<: {x: 1, y: 2}, y: 3}
        plain: &anchor {k: 1.0e+3}
        again: *anchor
    """
    (tmp_path / "f.yaml").write_text(text)
    assert read_yaml(tmp_path / "f.yaml") == OmegaConf.to_container(OmegaConf.create(text), resolve=True)
    assert parse_yaml("-1.5e3", "x") == -1500.0
    assert parse_yaml("'\\${a}'", "x") == "\\${a}"


# ---------------------------------------------------------------------- the validator


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int = 1


@dataclass(frozen=True, kw_only=True)
class Outer:
    numbers: list[int]
    pair: tuple[int, float] = (1, 2.0)
    mode: Literal["a", "b"] = "a"
    inner: Inner | None = None
    by_name: dict[str, Inner] | None = None
    either: int | str | None = None
    widths: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.numbers) > 3:
            raise ValueError("'numbers' holds more than three")


def test_merged_mappings(tmp_path: Path) -> None:
    """A merge may be merged again, its keys may be overridden, and doubling it in every line does not double the work."""
    text = "x: {y: &a {<<: &b {one: 1, two: 2}, one: 3}}\nz: {<<: *a, two: 4}\n"
    text += "m0: &m0 {k: 1}\n" + "".join(f"m{i + 1}: &m{i + 1} {{<<: [*m{i}, *m{i}]}}\n" for i in range(40))
    (tmp_path / "f.yaml").write_text(text)
    found = read_yaml(tmp_path / "f.yaml")
    assert (found["x"], found["z"], found["m40"]) == ({"y": {"one": 3, "two": 2}}, {"one": 3, "two": 4}, {"k": 1})


def test_plain_data_become_dataclasses() -> None:
    found = build(Outer, {"numbers": [1], "pair": [3, 4], "inner": {"size": 2}, "by_name": {"x": {}}, "widths": [1, 2]}, "f")
    assert found == Outer(numbers=[1], pair=(3, 4.0), inner=Inner(size=2), by_name={"x": Inner()}, widths=(1, 2))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"numbers": ["a"]}, "'numbers[0]' must be int, got 'a'"),
        ({"numbers": [1, True]}, "'numbers[1]' must be int, got True"),
        ({"numbers": [1.5]}, "'numbers[0]' must be int, got 1.5"),
        ({"numbers": "12"}, "'numbers' must be list[int], got '12'"),
        ({"numbers": [1, 2, 3, 4]}, "f: 'numbers' holds more than three"),
        ({"pair": [1]}, "'pair"),
        ({"pair": [1, "x"]}, "'pair[1]' must be float, got 'x'"),
        ({"mode": "c"}, "'mode' must be Literal['a', 'b'], got 'c'"),
        ({"mode": ["a"]}, "'mode' must be Literal"),
        ({"inner": 5}, "'inner' must be Inner | None, got 5"),
        ({"inner": {"size": "x"}}, "'inner.size' must be int, got 'x'"),
        ({"inner": {"sizes": 1}}, "f: inner: unknown key 'sizes'. Did you mean 'size'? Valid keys: size."),
        ({"by_name": {"x": {"size": None}}}, "'by_name.x.size' must be int, got None"),
        ({"either": [1]}, "'either' must be int | str | None, got [1]"),
        ({"widths": [1, "x"]}, "'widths[1]' must be int, got 'x'"),
        ({"number": [1]}, "f: unknown key 'number'. Did you mean 'numbers'?"),
        ({"either": {1, 2}}, "not text, a number, a list or a mapping"),
        ({"pair": [1, float("nan")]}, "f: field 'pair[1]' is nan"),
    ],
)
def test_wrong_types_at_any_depth_are_one_line(change: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(Outer, {"numbers": [1], **change}, "f")
    one_line(caught.value, part)


def test_other_things_than_mappings() -> None:
    for value in (None, 5, "x", [1]):
        with pytest.raises(ConfigError, match="f must be an object"):
            build(Outer, value, "f")
    with pytest.raises(ConfigError, match=r"f: missing required key\(s\): numbers"):
        build(Outer, {}, "f")


# ---------------------------------------------------------------------- the doors


@pytest.fixture(scope="module")
def method_folder(tiny_pool: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved method."""
    folder = tmp_path_factory.mktemp("method")
    bank = AdapterBank.from_pool(tiny_pool)
    method = method_class("avg_delta")(method_class("avg_delta").Config())
    method.expert_names = tuple(bank.names)
    method.save(folder)
    return folder


@pytest.mark.parametrize("what", BROKEN)
def test_method_json(what: str, method_folder: Path, tiny_pool: Path) -> None:
    bank = AdapterBank.from_pool(tiny_pool)
    kept = (method_folder / "method.json").read_text()
    try:
        (method_folder / "method.json").write_text(BROKEN[what])
        with pytest.raises(MethodError) as caught:
            method_class("avg_delta").saved_config(method_folder, bank)
    finally:
        (method_folder / "method.json").write_text(kept)
    one_line(caught.value, "method.json")
    method_class("avg_delta").saved_config(method_folder, bank)


@pytest.mark.parametrize("what", BROKEN)
def test_router_json(what: str, tmp_path: Path) -> None:
    MiniMLPRouter(["a", "b"], RouterConfig(variant="table", table_rows=8, table_width=4)).save(tmp_path)
    MiniMLPRouter.load(tmp_path)
    (tmp_path / "router.json").write_text(BROKEN[what])
    with pytest.raises(MethodError) as caught:
        MiniMLPRouter.load(tmp_path)
    one_line(caught.value, "router.json")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"names": ["a", 5]}, "'names[1]' must be str, got 5"),
        ({"config": {"variant": "table", "hidden": ["x", 1, 2]}}, "'config.hidden[0]' must be int"),
        ({"config": 5}, "'config'"),
        ({"config": {"variant": "chair"}}, "'config.variant' must be Literal"),
        ({"embedding_shape": [1]}, "'embedding_shape"),
        ({"temperature": -1.0}, "'temperature' must be more than 0, got -1.0"),
        ({"metrics": [1]}, "'metrics' must be dict"),
    ],
)
def test_a_router_of_wrong_types(change: dict[str, Any], part: str, tmp_path: Path) -> None:
    MiniMLPRouter(["a", "b"], RouterConfig(variant="table", table_rows=8, table_width=4)).save(tmp_path)
    raw = json.loads((tmp_path / "router.json").read_text())
    (tmp_path / "router.json").write_text(json.dumps(raw | change))
    with pytest.raises(MethodError) as caught:
        MiniMLPRouter.load(tmp_path)
    one_line(caught.value, "router.json", part)


@pytest.mark.parametrize("value", [-1.0, 0.0, float("nan"), float("inf")])
def test_a_temperature_that_is_none(value: float, tmp_path: Path) -> None:
    MiniMLPRouter(["a", "b"], RouterConfig(variant="table", table_rows=8, table_width=4)).save(tmp_path)
    tensors = load_file(tmp_path / "router.safetensors")
    tensors["temperature"].fill_(value)
    save_file(tensors, tmp_path / "router.safetensors")
    with pytest.raises(MethodError, match="temperature") as caught:
        MiniMLPRouter.load(tmp_path)
    one_line(caught.value, "router.safetensors")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("tasks: [5]", "'tasks[0]' must be str, got 5"),
        ("seeds: [0, x]", "'seeds[1]' must be int, got 'x'"),
        ("suite: [nano]", "'suite' must be str"),
        ("batch_size: " + DIGITS, "as YAML"),
        ("data_root: ${oc.env:DLPLORA_SECRET}", "own keys only"),
        ("batch_size: 0", "p.yaml: 'batch_size' must be at least 1"),
    ],
)
def test_protocols(text: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DLPLORA_SECRET", "hunter2")
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_protocol(str(tmp_path / "p.yaml"))
    one_line(caught.value, part)
    assert main(["eval", "--protocol", str(tmp_path / "p.yaml"), "--method", "base", "--limit", "1"]) == 2
    said = capsys.readouterr()
    assert part in said.err
    assert said.err.count("\n") == 1
    assert "hunter2" not in said.err + said.out


@pytest.mark.parametrize("value", ["[[[", "[" * 100_000, DIGITS, "${oc.env:HOME}", "!!python/name:os.system x", ".nan", "{a: 1, a: 2}"])
def test_parameters_of_the_command_line(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--method", "dlp", "--method-param", f"top_p={value}", "--limit", "1"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "--method-param top_p" in said


def test_the_environment_is_never_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DLPLORA_SECRET", "hunter2")
    (tmp_path / "m.yaml").write_text("method: dlp\nparams: {top_p: '${oc.env:DLPLORA_SECRET}'}")
    from dlplora.methods.registry import load_method_spec

    with pytest.raises(DLPLoRAError) as caught:
        load_method_spec(str(tmp_path / "m.yaml"))
    one_line(caught.value, "own keys only")
    assert "hunter2" not in str(caught.value)


def test_shipped_files_are_sound() -> None:
    assert load_pool(ASSETS_ROOT / "nano" / "pool").names
