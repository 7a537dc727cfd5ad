"""Finding methods, reading presets, refusing what a method file may not say."""

from __future__ import annotations

import importlib.metadata
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from dlplora.cli.main import main
from dlplora.config import list_configs
from dlplora.errors import ConfigError, MethodError
from dlplora.methods import registry
from dlplora.methods.base import FusionMethod, Metadata
from dlplora.methods.dlp import DLP
from dlplora.methods.references import AvgDelta, Base, MultiTask, Oracle

OURS = {"base": Base, "oracle": Oracle, "multitask": MultiTask, "avg_delta": AvgDelta, "dlp": DLP}
LORAHUB = ("lorahub_in_pool", "lorahub_in_pool_nevergrad", "lorahub_leave_one_out", "lorahub_leave_one_out_nevergrad")


class Outside(FusionMethod):
    """A third party's method."""

    name = "outside"
    metadata = Metadata(title="Outside", granularity="prompt")


def offer(monkeypatch: pytest.MonkeyPatch, *pairs: tuple[str, str]) -> None:
    """Pretend that an installed package declares these entry points."""
    points = [importlib.metadata.EntryPoint(name, value, registry.ENTRY_POINT_GROUP) for name, value in pairs]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda *, group: points if group == registry.ENTRY_POINT_GROUP else [])


def write(path: Path, text: str) -> str:
    path.write_text(textwrap.dedent(text))
    return str(path)


def test_our_methods_are_found_without_a_list() -> None:
    methods = registry.available_methods()
    assert {name: methods[name] for name in OURS} == OURS
    assert list(methods) == sorted(methods)


def test_baselines_are_found_by_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "more_baselines"
    package.mkdir()
    (package / "__init__.py").write_text("")
    source = """
        from dlplora.methods.base import FusionMethod, Metadata
        from dlplora.methods.references import Oracle
        class Helper(FusionMethod):
            pass
        class Foo(Helper):
            name = "foo"
            metadata = Metadata(title="Foo", granularity="prompt")
    """
    write(package / "foo.py", source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "SCANNED_PACKAGES", ("dlplora.methods", "more_baselines"))
    methods = registry.available_methods()
    assert methods["foo"].__module__ == "more_baselines.foo"
    assert methods["oracle"] is Oracle
    write(package / "again.py", source)
    with pytest.raises(MethodError, match="two methods are called 'foo'"):
        registry.available_methods()
    for name in [name for name in sys.modules if name.startswith("more_baselines")]:
        del sys.modules[name]


def test_a_method_has_one_module_name() -> None:
    """In a clone the files lie in the top-level folder; imported from there they would give a second class of the same name."""
    assert registry.available_methods()["arrow_out"].__module__ == "dlplora.baselines.arrow"
    with pytest.raises(ImportError, match=r"import dlplora\.baselines\.NAME"):
        import baselines.arrow  # noqa: F401


def test_a_broken_package_is_not_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "broken_baselines"
    package.mkdir()
    (package / "__init__.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "SCANNED_PACKAGES", ("broken_baselines",))
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        registry.available_methods()


def test_entry_points_of_third_parties(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, ("outside", f"{__name__}:Outside"))
    assert registry.available_methods()["outside"] is Outside
    spec = registry.load_method_spec("outside")
    assert (spec.name, spec.method, spec.params, spec.path) == ("outside", "outside", {}, None)
    assert isinstance(registry.build_method(spec), Outside)


def test_an_installed_package_brings_its_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Laid out as pip would leave it: a package and its dist-info folder on the path. Nothing of ours is patched."""
    package, info = tmp_path / "even_mixture", tmp_path / "even_mixture-0.1.dist-info"
    package.mkdir()
    info.mkdir()
    source = """
        import torch
        from dlplora.methods.base import FusionMethod, Metadata

        class EvenMixture(FusionMethod):
            name = "even_mixture"
            metadata = Metadata(title="Even mixture", granularity="prompt")

            def route(self, prompts):
                return torch.full((len(prompts), len(self.expert_names)), 1.0 / len(self.expert_names))
        """
    write(package / "__init__.py", source)
    write(info / "METADATA", "Metadata-Version: 2.1\nName: even-mixture\nVersion: 0.1\n")
    write(info / "entry_points.txt", f"[{registry.ENTRY_POINT_GROUP}]\neven_mixture = even_mixture:EvenMixture\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["methods"]) == 0
    assert "| even_mixture | Even mixture |" in capsys.readouterr().out
    assert main(["generate", "Is it red?", "--method", "even_mixture", "--max-new-tokens", "2", "--trace"]) == 0
    assert capsys.readouterr().out
    monkeypatch.undo()
    assert "even_mixture" not in registry.available_methods()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("outside", "no_such_module_here:Thing", "cannot be imported"),
        ("outside", f"{__name__}:Missing", "cannot be imported"),
        ("outside", f"{__name__}:OURS", "must name a FusionMethod subclass"),
        ("other", f"{__name__}:Outside", "whose name is 'outside'"),
        ("dlp", f"{__name__}:Impostor", "two methods are called 'dlp'"),
        ("bare", f"{__name__}:Bare", "has no metadata"),
    ],
)
def test_bad_entry_points_are_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str) -> None:
    offer(monkeypatch, (name, value))
    with pytest.raises(MethodError, match=message):
        registry.available_methods()


class Impostor(FusionMethod):
    """Takes another method's name."""

    name = "dlp"
    metadata = Metadata(title="Impostor", granularity="prompt")


class Bare(FusionMethod):
    """Says nothing about itself."""

    name = "bare"


@pytest.mark.parametrize("preset", list_configs("method"))
def test_every_shipped_preset_builds(preset: str) -> None:
    spec = registry.load_method_spec(preset)
    method = registry.build_method(spec)
    assert method.name == spec.method
    assert spec.name == preset
    for key, value in spec.params.items():
        built = getattr(method.config, key)
        assert (list(built) if isinstance(built, tuple) else built) == value
    assert set(spec.params) <= set(registry.resolved_params(spec))


def test_presets_mean_what_they_say() -> None:
    wanted = {
        "dlp": ("threshold", 0.2, "softmax", "sentence", "tail"),
        "dlp_code": ("nucleus", 0.6, "softmax", "prompt", "tail"),
        "dlp_top1": ("argmax", 0.2, "sum", "sentence", "tail"),
        "dlp_renorm": ("nucleus", 0.6, "sum", "prompt", "tail"),
        "dlp_threshold": ("threshold", 0.2, "softmax", "prompt", "tail"),
    }
    for preset, values in wanted.items():
        params = registry.resolved_params(registry.load_method_spec(preset))
        bound = "top_p" if params["selector"] == "nucleus" else "threshold"
        assert tuple(params[key] for key in ("selector", bound, "renormalize", "reroute", "view")) == values, preset


def test_overrides_replace_the_file_and_are_checked() -> None:
    method = registry.build_method("dlp_code", {"top_p": 0.9})
    assert (method.config.top_p, method.config.selector) == (0.9, "nucleus")
    assert registry.build_method(registry.load_method_spec("dlp_code"), {"top_p": 0.8}).config.top_p == 0.8
    with pytest.raises(ConfigError, match=r"dlp_code\.yaml: unknown key 'selektor'\. Did you mean 'selector'\?"):
        registry.load_method_spec("dlp_code", {"selektor": "argmax"})
    with pytest.raises(ConfigError, match="'selector' must be"):
        registry.load_method_spec("dlp_code", {"selector": "best"})
    with pytest.raises(ConfigError, match="'batch_size' belongs to the evaluation protocol"):
        registry.load_method_spec("dlp_code", {"batch_size": 4})
    with pytest.raises(ConfigError, match="unknown key 'p'"):
        registry.load_method_spec("base", {"p": 0.5})


@pytest.mark.parametrize(
    ("preset", "old", "new"),
    [
        ("dlp", {"p": 0.4}, {"threshold": 0.4}),
        ("dlp_code", {"p": 0.9}, {"top_p": 0.9}),
        ("dlp", {"selector": "nucleus", "p": 0.9}, {"selector": "nucleus", "top_p": 0.9}),
        ("dlp", {"selector": "topk", "k": 3}, {"selector": "topk", "top_k": 3}),
        ("knn_minilm", {"k": 3}, {"top_k": 3}),
    ],
)
def test_earlier_names_are_read(preset: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    assert registry.load_method_spec(preset, old).params == registry.load_method_spec(preset, new).params


def test_hashes_of_renamed_parameters_are_those_of_old_records() -> None:
    """Parameters as old records hold them."""
    presets = ("dlp", "dlp_code", "dlp_top1", "knn_minilm_k3")
    hashed = {preset: registry.hashed_params(registry.load_method_spec(preset)) for preset in presets}
    common = {"min_keep": 1, "router": None, "view": "tail", "k": 2}
    assert hashed == {
        "dlp": {**common, "selector": "threshold", "p": 0.2, "renormalize": "softmax", "reroute": "sentence"},
        "dlp_code": {**common, "selector": "nucleus", "p": 0.6, "renormalize": "softmax", "reroute": "prompt"},
        "dlp_top1": {**common, "selector": "argmax", "p": 0.2, "renormalize": "sum", "reroute": "sentence"},
        "knn_minilm_k3": {"num_samples": 200, "encoder": "minilm", "k": 3},
    }


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"threshold": -0.1}, "'threshold' must be"),
        ({"top_p": -0.1}, "'top_p' must be"),
        ({"top_k": 0}, "'top_k' must be"),
        ({"min_keep": 0}, "'min_keep' must be"),
        ({"top_p": float("nan")}, "'top_p' must be"),
    ],
)
def test_values_out_of_range_are_refused(params: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        registry.load_method_spec("dlp", params)


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml", "method: dlp\nparams:\n  selector: topk\n  top_k: 3\n")
    spec = registry.load_method_spec(path)
    assert (spec.name, spec.method, spec.params, str(spec.path)) == ("mine", "dlp", {"selector": "topk", "top_k": 3}, path)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("method: dlp\nparam: {p: 1}\n", ConfigError, r"mine\.yaml: unknown key 'param'\. Did you mean 'params'\?"),
        ("method: dlp\nselector: topk\n", ConfigError, r"mine\.yaml: unknown key 'selector'\. It is a parameter: indent it"),
        ("method: dlp\nparams: {thresold: 1}\n", ConfigError, r"mine\.yaml: unknown key 'thresold'"),
        (
            "method: dlp\nmax_length: 10\n",
            ConfigError,
            r"mine\.yaml: 'max_length' belongs to the evaluation protocol.*Valid keys here: method, params",
        ),
        (
            "method: dlp\nparams: {seed: 0}\n",
            ConfigError,
            r"mine\.yaml: params: 'seed' belongs to the evaluation protocol.*Valid keys here: selector, threshold,",
        ),
        (
            "method: xlora\nparams: {pool: 0}\n",
            ConfigError,
            r"'pool' belongs to .* Valid keys here: layerwise, temperature, global_scaling",
        ),
        ("params: {p: 1}\n", ConfigError, r"mine\.yaml: 'method' must name a method, got None"),
        (
            "method: dpl\n",
            MethodError,
            r"mine\.yaml: unknown method 'dpl'\. Did you mean 'dlp'\? Known methods: .*avg_delta.* base.*oracle",
        ),
        ("method: dlp\nparams: [p]\n", ConfigError, r"mine\.yaml: 'params' must be a mapping"),
        ("method: dlp\nparams: {top_p: high}\n", ConfigError, r"mine\.yaml: 'top_p' must be float, got 'high'"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, text: str, error: type[Exception], message: str) -> None:
    path = write(tmp_path / "mine.yaml", text)
    with pytest.raises(error, match=message):
        registry.load_method_spec(path)


def test_unknown_names_get_a_hint_and_the_list(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match=r"unknown method 'orakle'\. Did you mean 'oracle'\? Known: .*dlp_code.*multitask"):
        registry.load_method_spec("orakle")
    with pytest.raises(MethodError, match=r"unknown method 'avg'"):
        registry.method_class("avg")
    with pytest.raises(ConfigError, match="not found"):
        registry.load_method_spec(str(tmp_path / "none.yaml"))


def test_described_rows_come_from_the_classes() -> None:
    rows = {row["name"]: row for row in registry.describe_methods()}
    assert set(list_configs("method")) <= set(rows)
    assert rows["dlp"] == {
        "name": "dlp",
        "title": "DLP-LoRA",
        "paper": "https://arxiv.org/abs/2410.01497",
        "granularity": "sentence",
        "depth": "model",
        "fusion": "output",
        "needs": ["inputs", "labels"],
        "heterogeneous": True,
    }
    assert (rows["dlp_code"]["granularity"], rows["oracle_segment"]["granularity"]) == ("prompt", "sentence")  # the preset decides
    assert [name for name, row in rows.items() if row["fusion"] == "factor"] == [
        "adapter_soup", "arrow_factor", "avg_factor", *LORAHUB, "retriever_fusion",
    ]  # fmt: skip
    told_the_task = ["adapter_soup", *LORAHUB, "oracle", "oracle_segment"]  # weights per task, and the task itself
    assert [name for name, row in rows.items() if "task_id" in row["needs"]] == told_the_task


def test_trained_parameters_are_counted_on_the_method(capsys: pytest.CaptureFixture[str]) -> None:
    """By hand for the embedded backbone: 4 layers, width 128, q (128 -> 128) and v (128 -> 128 or less), 26 experts of rank 8."""
    assert main(["methods", "--format", "json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(list_configs("method")) == set(rows)
    counts = {name: row["trained parameters (nano, 26 experts)"] for name, row in rows.items()}
    wanted = {
        "dlp_paper5m": 4_936_730,
        "adafuse": 26 * 128,
        "xlora": 26 * 128 + 26,
        "xlora_frozen": 26 * 128 + 26,
        "lora_flow": 4 * (26 * 128 + 26),
        "phatgoose": 4 * 2 * 26 * 128,
        "meteora_gate": 4 * 2 * 26 * 128,
        "mole": 4 * (26 * 128 * 26 + 1),
        "mole_lr": 4 * (128 * 16 + 26 * 16 * 26 + 1),
    }
    assert {name: counts[name] for name in wanted} == wanted
    assert counts["multitask_r64"] == 8 * counts["multitask"]
    assert counts["multitask_r208"] == 26 * counts["multitask"] == counts["meteora_full"] - counts["meteora_gate"]
    assert 0 < counts["dlp"] == counts["dlp_code"] <= 5_000_000
    assert {name for name, count in counts.items() if count == 0} >= {"base", "oracle", "ties", "arrow_out", "lorauter", "lorahub_in_pool"}
    assert None not in counts.values()
