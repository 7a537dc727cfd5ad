"""Counts against numbers worked out by hand, what the paper claims about them, and the accepted counts of every method."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dlplora.bench import op_cases as cases
from dlplora.bench.op_counter import Counts, count, stored_bytes
from dlplora.cli.main import main
from dlplora.errors import ConfigError, RecordError
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.methods.references import Oracle
from dlplora.methods.registry import available_presets
from dlplora.modules.lora_bank import AdapterBank
from dlplora.reporting.goldens import golden_path

A, B = torch.ones(3, 4), torch.ones(4, 5)
OPERATIONS = {
    "product": (lambda: A @ B, Counts(1, 2 * 3 * 4 * 5, 4 * (12 + 20 + 15))),
    "transposed product": (lambda: A.T.T @ B, Counts(1, 2 * 3 * 4 * 5, 4 * (12 + 20 + 15))),
    "linear with bias": (lambda: torch.nn.functional.linear(A, B.T, torch.ones(5)), Counts(2, 120, 4 * (5 + 5 + 12 + 20 + 15))),
    "batched product": (lambda: torch.bmm(A[None], B[None]), Counts(1, 120, 4 * (12 + 20 + 15))),
    "views": (lambda: A.view(12).view(4, 3).T[1:].unsqueeze(0).expand(7, 2, 4), Counts()),
    "sum of two": (lambda: A + A.clone(), Counts(2, 0, 4 * (12 + 12) + 4 * (12 + 12 + 12))),
    "sum with itself": (lambda: A + A, Counts(1, 0, 4 * (12 + 12))),
    "in place": (lambda: torch.empty(3, 4).add_(A), Counts(2, 0, 4 * (12 + 12 + 12))),
    "copy": (lambda: torch.empty(3, 4).copy_(A), Counts(2, 0, 4 * (12 + 12))),
    "expanded": (lambda: A[:1].expand(3, 4) + A, Counts(1, 0, 4 * (4 + 12 + 12))),
    "embedding": (lambda: torch.nn.functional.embedding(torch.tensor([0, 2]), torch.ones(100, 6)), None),
    "read by the host": (lambda: bool(A.sum() > 0), Counts(2, 0, 4 * (12 + 1) + 4 + 1, 1)),
    "read as a list": (lambda: A.sum(0).tolist(), Counts(1, 0, 4 * (12 + 4), 1)),
    "half precision": (lambda: A.half() @ B.half(), Counts(3, 120, 6 * 12 + 6 * 20 + 2 * (12 + 20 + 15))),
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in OPERATIONS if OPERATIONS[name][1] is not None])
def test_operations_by_hand(name: str) -> None:
    call, expected = OPERATIONS[name]
    assert count(call)[0] == expected


def test_a_lookup_reads_what_it_looks_up() -> None:
    table, ids = torch.ones(100, 6), torch.tensor([0, 2])
    assert count(lambda: torch.nn.functional.embedding(ids, table))[0] == Counts(1, 0, 16 + 2 * 4 * 12)
    assert count(lambda: table[ids])[0] == Counts(1, 0, 16 + 2 * 4 * 12)
    assert stored_bytes(torch.ones(1, 6).expand(100, 6)) == 24


def counted(name: str, experts: int | None = None, shape: str = "tiny", **params: Any) -> cases.Cells:
    return cases.count_method(name, cases.find_case(shape, experts), params or None)


def test_folded_decoding_costs_the_same_whatever_the_number_of_experts() -> None:
    """The point of folding: 2, 26 or 200 experts in the bank, one decode step is the same work; so is a prefill."""
    for params in ({"selector": "argmax"}, {"selector": "topk", "top_k": 2}):
        cells = {experts: counted("dlp", experts, **params) for experts in (2, 26, 200)}
        for phase in ("decode", "prefill"):
            assert cells[2]["dlp/folded"][phase] == cells[26]["dlp/folded"][phase] == cells[200]["dlp/folded"][phase]
        assert cells[26]["dlp/dense"]["decode"]["bytes"] > cells[2]["dlp/dense"]["decode"]["bytes"]
    # The default keeps at most five and pays for those it keeps.
    five = counted("dlp", 26, selector="topk", top_k=5)["dlp/folded"]["decode"]
    for experts in (5, 26):
        assert all(number <= five[key] for key, number in counted("dlp", experts)["dlp/folded"]["decode"].items())


def test_folded_dlp_costs_one_lora_of_the_width_of_its_plan() -> None:
    """By hand: 2 layers, q (32 -> 32) and v (32 -> 16), rank 4, one expert kept; two products and one sum a module."""
    base, top1 = counted("base")["base/reference"], counted("dlp", selector="argmax")["dlp/folded"]
    oracle = counted("oracle")["oracle/folded"]
    for phase, tokens in (("decode", 1), ("prefill", cases.PROMPT_TOKENS)):
        assert top1[phase] == oracle[phase]
        assert top1[phase]["launches"] - base[phase]["launches"] == 3 * 4
        assert top1[phase]["flops"] - base[phase]["flops"] == 2 * 2 * tokens * 4 * ((32 + 32) + (32 + 16))
        assert top1[phase]["host_reads"] == 0
    per_module = [4 * (4 * (i + o) + i + 4 + 4 + o + 3 * o) for i, o in ((32, 32), (32, 16))]
    assert top1["decode"]["bytes"] - base["decode"]["bytes"] == 2 * sum(per_module)


def test_one_peft_adapter_takes_the_same_products_and_one_operator_a_module_more(
    tiny_llama: Any, tiny_tokenizer: Any, make_adapter: Any, tmp_path: Path
) -> None:
    from peft import PeftModel

    folder = make_adapter(tmp_path / "one", seed=1)
    ids, step = torch.tensor([[1, 5, 9, 40]]), torch.tensor([[7]])
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(copy.deepcopy(tiny_llama), str(folder), autocast_adapter_dtype=False).eval()
        cache = adapted(input_ids=ids, use_cache=True).past_key_values
        peft, expected = count(lambda: adapted(input_ids=step, past_key_values=cache, use_cache=True).logits)
        names = [f"copy{index}" for index in range(26)]
        bank = AdapterBank.from_peft(dict.fromkeys(names, folder))
        fused = FusedCausalLM(tiny_llama, tiny_tokenizer, bank, Oracle(), backend="folded")
        with fused.routing(torch.nn.functional.one_hot(torch.tensor([3]), 26).float()):
            cache = fused(input_ids=ids, use_cache=True).past_key_values
            ours, got = count(lambda: fused(input_ids=step, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert ours.flops == peft.flops
    assert peft.launches - ours.launches == len(bank.modules)
    assert ours.bytes < peft.bytes


def test_a_merged_plan_costs_nothing_at_a_step() -> None:
    base, merged = counted("base")["base/reference"], counted("dlp")["dlp/merged"]
    assert (merged["decode"], merged["prefill"]) == (base["decode"], base["prefill"])
    assert merged["plan"]["bytes"] > counted("dlp")["dlp/folded"]["plan"]["bytes"]


def test_token_level_gates_cost_more_launches_than_a_folded_plan() -> None:
    folded = counted("dlp")["dlp/folded"]["decode"]["launches"]
    for name in ("meteora_gate", "arrow_out", "mole", "xlora"):
        (gated,) = counted(name).values()
        assert gated["decode"]["launches"] > folded


def test_every_method_costs_what_was_accepted() -> None:
    """All presets on the tiny shape; a difference that is meant is accepted with ``dlplora bench counters --shape tiny --accept``."""
    golden = cases.read_golden(golden_path(cases.GOLDEN))
    if golden["versions"] != cases.versions():
        pytest.skip(f"accepted with {golden['versions']}, installed is {cases.versions()}: other versions run other operators")
    cells: cases.Cells = {}
    for name in available_presets():
        cells.update(counted(name))
    assert cases.differences(golden, "tiny", cells, whole=True) == []
    nano = {cell.partition("/")[0] for cell in golden["shapes"]["nano"]}
    assert nano == set(available_presets())


def test_differences_are_readable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "golden").mkdir()
    path = golden_path(cases.GOLDEN, tmp_path)
    command = ["bench", "counters", "--shape", "tiny", "--methods", "base,oracle", "--out", str(tmp_path)]
    assert main([*command, "--check"]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert main([*command, "--accept"]) == 0
    assert main([*command, "--check"]) == 0
    golden = json.loads(path.read_text())
    launches = golden["shapes"]["tiny"]["oracle/folded"]["decode"]["launches"]
    golden["shapes"]["tiny"]["oracle/folded"]["decode"]["launches"] -= 7
    del golden["shapes"]["tiny"]["base/reference"]
    path.write_text(json.dumps(golden))
    capsys.readouterr()
    assert main([*command, "--check"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert f"oracle/folded: decode: launches {launches - 7} became {launches}" in said
    assert "base/reference: not in the golden file" in said
    cells = {"oracle/folded": golden["shapes"]["tiny"]["oracle/folded"]}
    assert any("not counted now" in line for line in cases.differences(golden, "tiny", cells, whole=True))
    old = {**golden, "versions": {"torch": "1.0"}}
    assert "other versions run other operators" in cases.differences(old, "tiny", {"new/dense": {}}, whole=False)[-1]
    # Accepting some methods leaves the others and the other shapes alone.
    assert main(["bench", "counters", "--shape", "tiny", "--methods", "base", "--out", str(tmp_path), "--accept"]) == 0
    assert set(json.loads(path.read_text())["shapes"]["tiny"]) >= {"base/reference", "oracle/folded"}
    path.write_text("{")
    with pytest.raises(RecordError, match="not JSON"):
        cases.read_golden(path)
    path.write_text('{"format": 9}')
    with pytest.raises(RecordError, match="format 1 with 'shapes'"):
        cases.read_golden(path)


def test_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"unknown shape 'nanoo'. Did you mean 'nano'"):
        cases.find_case("nanoo")
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        cases.find_case("tiny", 0)
    assert main(["bench", "counters", "--shape", "tiny", "--experts", "3", "--check"]) == 2
    assert "leave --experts out" in capsys.readouterr().err
    assert main(["bench", "counters", "--shape", "tiny", "--methods", "dpl"]) == 2
    assert "Did you mean" in capsys.readouterr().err


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "counters", "--shape", "tiny", "--methods", "oracle"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| method | backend | decode: launches |")
    assert [line.split("|")[2].strip() for line in lines[2:]] == ["reference", "dense", "folded", "merged"]


def test_the_counts_in_the_documentation_are_the_accepted_ones() -> None:
    golden = cases.read_golden(golden_path(cases.GOLDEN))["shapes"]["nano"]
    text = (Path(__file__).parents[2] / "docs" / "backends.md").read_text(encoding="utf-8")
    rows = [row.strip("| ").split("|") for row in text.partition("| method, backend |")[2].splitlines()[2:11]]
    for name, *cells in rows:
        method, _, backend = name.partition("(")[0].replace("`", "").strip().partition(", ")
        decode = next(phases["decode"] for cell, phases in golden.items() if cell.startswith(f"{method}/{backend}"))
        shown = [str(decode["launches"]), f"{decode['flops'] / 1e6:.3f}", f"{decode['bytes'] / 1e6:.3f}", str(decode["host_reads"])]
        assert [cell.strip() for cell in cells] == shown
