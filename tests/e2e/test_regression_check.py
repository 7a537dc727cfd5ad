"""The regression check lets a healthy copy pass and stops planted faults in selection, scaling and batching."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dlplora.cli.main import main
from dlplora.evaluation import regression
from dlplora.lm_eval import model as lm_eval_adapter
from dlplora.methods import dlp
from dlplora.modules import routing
from dlplora.modules.lora_bank import AdapterBank
from dlplora.reporting import goldens

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ["--out", str(ROOT / "results")]


def check(methods: str) -> int:
    return main(["report", "check", *RESULTS, "--methods", methods])


def test_a_healthy_copy_gives_what_was_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "check", *RESULTS]) == 0, capsys.readouterr().out
    assert f"{len(regression.GUARDS)} guarded methods" in capsys.readouterr().out


def test_a_fault_in_top_p_selection_is_caught(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def without_the_crossing_expert(probs: Tensor, p: float, min_keep: int = 1) -> Tensor:
        values, order = torch.sort(probs, dim=-1, descending=True, stable=True)
        mask = torch.zeros_like(probs, dtype=torch.bool).scatter(-1, order, values.cumsum(dim=-1) <= p)
        return mask.scatter(-1, order[..., :1], True)

    probs = torch.tensor([[0.5, 0.3, 0.2]])
    assert not torch.equal(without_the_crossing_expert(probs, 0.6), routing.nucleus_mask(probs, 0.6))
    monkeypatch.setattr(dlp, "nucleus_mask", without_the_crossing_expert)
    assert check("dlp_wide") == 1
    assert "dlp_wide: routing:" in capsys.readouterr().out


def test_a_fault_in_scaling_is_caught(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    whole = AdapterBank.from_pool

    def first_adapters_scaling_halved(*arguments: object, **options: object) -> AdapterBank:
        bank = whole(*arguments, **options)  # type: ignore[arg-type]
        for entry in bank.modules.values():
            entry.scaling[0] *= 0.5
        return bank

    monkeypatch.setattr(AdapterBank, "from_pool", first_adapters_scaling_halved)
    assert check("oracle") == 1
    assert "oracle: logits:" in capsys.readouterr().out


def test_a_fault_in_batching_is_caught(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    bound = lm_eval_adapter.DLPLoRALM._bound
    monkeypatch.setattr(lm_eval_adapter.DLPLoRALM, "_bound", lambda self, plans: bound(self, plans[1:] + plans[:1]))
    assert check("oracle") == 1
    assert "oracle: accuracy:" in capsys.readouterr().out


def observation(**changes: object) -> dict[str, object]:
    whole = {
        "logits": {"a": [1.0, 2.0]},
        "routing": {"a/0": [[0, {"x": 0.75, "y": 0.25}]], "a/1": None},
        "right": {"a": "1111111111", "b": "0000000000"},
    }
    return {**whole, **changes}


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"logits": {"a": [1.0, 2.01]}}, "logits"),
        ({"logits": {}}, "logits"),
        ({"routing": {"a/0": [[0, {"x": 1.0}]], "a/1": None}}, "routing"),
        ({"routing": {"a/0": [[0, {"x": 0.7, "y": 0.3}]], "a/1": None}}, "routing"),
        ({"right": {"a": "1111000000", "b": "0000000000"}}, "accuracy"),
        ({"right": {"a": "11111", "b": "0000000000"}}, "answers"),
    ],
)
def test_every_kind_of_difference_is_found(changes: dict[str, object], what: str) -> None:
    findings = goldens.compare({"m": observation()}, {"m": observation(**changes)})
    assert [finding.what for finding in findings] == [what]


def test_noise_is_no_difference() -> None:
    quiet = observation(
        logits={"a": [1.0002, 2.0]}, right={"a": "1111111110", "b": "0000000001"},
        routing={"a/0": [[0, {"x": 0.7501, "y": 0.2499}]], "a/1": None},
    )  # fmt: skip
    assert goldens.compare({"m": observation()}, {"m": quiet}) == []


def test_bad_golden_files_and_names_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "check", "--out", str(tmp_path)]) == 2
    assert "report accept --reason" in capsys.readouterr().err
    golden = goldens.golden_path("nano", tmp_path)
    golden.parent.mkdir(parents=True)
    for content in ("{", json.dumps({"format": 99, "methods": {}}), "[]"):
        golden.write_text(content)
        assert main(["report", "check", "--out", str(tmp_path)]) == 2
        assert str(golden) in capsys.readouterr().err
    assert main(["report", "check", *RESULTS, "--methods", "dpl"]) == 2
    assert "Did you mean 'dlp'" in capsys.readouterr().err


def test_accept_writes_goldens_and_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changelog = tmp_path / "CHANGELOG.md"
    arguments = ["report", "accept", "--out", str(tmp_path), "--methods", "base", "--changelog", str(changelog)]
    assert main([*arguments, "--reason", "first"]) == 2
    changelog.write_text("# Changelog\n\n### Results\n\n* Older.\n")
    assert main([*arguments, "--reason", " "]) == 2
    assert not goldens.golden_path("nano", tmp_path).exists()
    assert main([*arguments, "--reason", "a new\nbackbone."]) == 0
    assert changelog.read_text() == "# Changelog\n\n### Results\n\n* a new backbone. Moved: base (golden file).\n\n* Older.\n"
    capsys.readouterr()
    assert main(["report", "check", "--out", str(tmp_path), "--methods", "base"]) == 0
