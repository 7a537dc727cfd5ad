"""The page for newcomers is run as it stands: its method is found, built from its YAML, and keeps the whole checklist."""

from __future__ import annotations

import copy
import importlib.util
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dlplora.methods import registry
from dlplora.testing.conformance import Case, run_all

PAGE = Path(__file__).resolve().parents[2] / "docs" / "adding_a_baseline.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The page's method as a module that the registry scans, as if its file lay in ``baselines/``."""
    path = tmp_path / "nearest_length.py"
    path.write_text(blocks("python")[0])
    spec = importlib.util.spec_from_file_location("dlplora.baselines.nearest_length", path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, made)
    spec.loader.exec_module(made)
    original = registry._modules_of
    monkeypatch.setattr(registry, "_modules_of", lambda name: [*original(name), *([made] if name == "dlplora.baselines" else [])])
    return made


def test_the_example_is_a_whole_method(module: ModuleType, tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    (tmp_path / "nearest_length.yaml").write_text(blocks("yaml")[0])
    spec = registry.load_method_spec(str(tmp_path / "nearest_length.yaml"))
    assert registry.method_class("nearest_length") is module.NearestLength
    assert registry.build_method(spec).config.num_samples == 20
    run_all(
        Case(
            build=lambda: registry.build_method(spec),
            make_model=lambda: copy.deepcopy(tiny_llama),
            tokenizer=tiny_tokenizer,
            pool=tiny_pool,
            workdir=tmp_path / "work",
        )
    )


def test_the_pages_own_test_passes(module: ModuleType) -> None:
    page: dict[str, Any] = {}
    exec(blocks("python")[1], page)  # its conformance check is the one above
    page["test_weights_by_hand"]()
    module.NearestLength.route = lambda self, prompts: module.torch.full((len(prompts), 2), 0.5)
    with pytest.raises(AssertionError):
        page["test_weights_by_hand"]()


def test_the_entry_point_names_the_registrys_group() -> None:
    declared = tomllib.loads(blocks("toml")[0])
    assert list(declared["project"]["entry-points"]) == [registry.ENTRY_POINT_GROUP]
    assert declared["project"]["entry-points"][registry.ENTRY_POINT_GROUP] == {"nearest_length": "my_package.nearest_length:NearestLength"}
