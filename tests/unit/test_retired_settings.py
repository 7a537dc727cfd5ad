"""Settings that protocols no longer have: without effect, but part of the hashes that committed records name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dlplora.errors import ConfigError
from dlplora.evaluation.protocol import load_protocol

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["nano", "nano_composite", "nano_composite_ablation"])
def test_hashes_are_those_of_the_committed_records(name: str) -> None:
    found = {
        json.loads(path.read_text())["protocol_hash"]
        for path in sorted((ROOT / "results" / "runs").rglob("*.json"))
        if json.loads(path.read_text())["protocol_name"] == name
    }
    assert found == {load_protocol(name).hash()}


def test_a_file_that_names_them_is_read(tmp_path: Path) -> None:
    path = tmp_path / "old.yaml"
    path.write_text("suite: nano\nlatency_repeats: 0\nlatency_new_tokens: 24\n")
    old = load_protocol(str(path))
    assert old.hash() != load_protocol("nano").hash()
    assert not [key for key in old.resolved() if key.startswith(("latency", "retired"))]
    path.write_text("suite: nano\nlatency_prompt_tokens: 32\nlatency_new_tokens: 24\nlatency_repeats: 9\n")
    assert load_protocol(str(path)).hash() == load_protocol("nano").hash()


@pytest.mark.parametrize("line", ["latency_repeats: nine", "latency_repeats: true", "latency_repeat: 9"])
def test_bad_values_are_one_line(line: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(f"suite: nano\n{line}\n")
    with pytest.raises(ConfigError, match="latency_repeat"):
        load_protocol(str(path))
