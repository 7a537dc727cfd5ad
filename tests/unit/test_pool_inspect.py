"""``dlplora pool inspect`` and ``list``: what the matrix says of folders PEFT wrote and of folders that are spoilt."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dlplora.adapters.inspect import Finding, inspect_folder
from dlplora.cli.main import main
from dlplora.modules.lora_bank import AdapterBank

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


@pytest.fixture
def zoo(make_adapter: Callable[..., Path], tmp_path: Path) -> Path:
    """One folder of every kind."""
    root = tmp_path / "zoo"
    make_adapter(root / "plain", seed=1)
    make_adapter(root / "patterns", seed=2, r=6, lora_alpha=3, use_rslora=True, rank_pattern={"q_proj": 2}, dtype=torch.bfloat16)
    make_adapter(root / "wide", seed=3, r=16, target_modules=["q_proj", "up_proj"])
    make_adapter(root / "dora", seed=4, use_dora=True)
    make_adapter(root / "run" / "checkpoint-10", seed=5)
    make_adapter(root / "untrained", seed=6)
    make_adapter(root / "elsewhere", seed=7)
    make_adapter(root / "misfit", seed=8)
    make_adapter(root / "more", seed=9)
    tensors = load_file(root / "untrained" / WEIGHTS)
    save_file({key: value * -0.0 if "lora_B" in key else value for key, value in tensors.items()}, root / "untrained" / WEIGHTS)
    edit(root / "untrained", target_modules=["q_proj", "v_proj", "gate_proj"])
    for name in ("plain", "patterns", "wide", "untrained", "misfit", "more"):
        edit(root / name, base_model_name_or_path="org/tiny-1b")
    edit(root / "elsewhere", base_model_name_or_path="org/other-2b")
    tensors = load_file(root / "misfit" / WEIGHTS)
    save_file({key: torch.ones(4, 16) if "lora_A" in key else value for key, value in tensors.items()}, root / "misfit" / WEIGHTS)
    shutil.copytree(root / "plain", root / "broken")
    (root / "broken" / WEIGHTS).write_bytes((root / "plain" / WEIGHTS).read_bytes()[:-100])
    (root / "pickled").mkdir()
    shutil.copy(root / "plain" / CONFIG, root / "pickled")
    (root / "pickled" / "adapter_model.bin").write_bytes(b"\x80\x04N.")
    (root / "bare").mkdir()
    shutil.copy(root / "plain" / WEIGHTS, root / "bare")
    shutil.copytree(root / "plain", root / ".hidden")
    (root / "notes").mkdir()
    return root


def test_the_matrix(zoo: Path) -> None:
    seen = inspect_folder(zoo)
    found: dict[str, Finding] = {finding.name: finding for finding in seen.findings}
    assert list(found) == sorted(found)
    assert set(found) == set("bare broken dora elsewhere misfit more patterns pickled plain run/checkpoint-10 untrained wide".split())
    usable = {name for name, finding in found.items() if finding.usable}
    assert usable == {"plain", "patterns", "wide", "untrained", "run/checkpoint-10", "more"}
    plain = found["plain"]
    assert (plain.rank, plain.alpha, plain.use_rslora, plain.use_dora) == ("4", 8, False, False)
    assert (plain.targets, plain.num_modules, plain.base, plain.zero_b, plain.dtype) == (
        ("q_proj", "v_proj"),
        4,
        "org/tiny-1b",
        False,
        "float32",
    )
    assert plain.hints == []
    assert plain.num_bytes == (zoo / "plain" / WEIGHTS).stat().st_size
    assert plain.bank_bytes == 4 * 4 * 2 * ((32 + 32) + (32 + 16))  # float32, rank 4, two layers of q (32 -> 32) and v (32 -> 16)
    assert (found["patterns"].rank, found["patterns"].use_rslora, found["patterns"].dtype) == ("2-6", True, "bfloat16")
    for name, part in {
        "untrained": "every B factor is zero",
        "wide": "rank 16 (median 4)",
        "dora": "'use_dora' is set",
        "elsewhere": "trained on org/other-2b, most here on org/tiny-1b",
        "misfit": "model.layers.0.self_attn.q_proj maps 16 -> 32, most here 32 -> 32",
        "broken": "damaged or truncated",
        "pickled": "--allow-pickle",
        "bare": f"{CONFIG} is missing",
    }.items():
        assert part in "; ".join(found[name].hints), name
    assert "target_modules names gate_proj" in found["untrained"].hints[1]
    assert found["untrained"].zero_b is True
    assert found["dora"].use_dora is True


def test_the_predicted_memory_is_the_banks(zoo: Path) -> None:
    seen = inspect_folder(zoo)
    usable = [finding.name for finding in seen.findings if finding.usable]
    bank = AdapterBank.from_peft({name.replace("/", "_"): zoo / name for name in usable})
    scalings = sum(entry.scaling.nbytes for entry in bank.modules.values())
    assert seen.bank_adapters == len(usable)
    assert seen.bank_bytes == bank.nbytes - scalings
    own = sum(finding.bank_bytes or 0 for finding in seen.findings if finding.usable)
    assert seen.padding_bytes == seen.bank_bytes - own > 0


def test_formats(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pool", "inspect", str(zoo), "--format", "json"]) == 0
    captured = capsys.readouterr()
    rows = {row["adapter"]: row for row in json.loads(captured.out)}
    assert rows["plain"]["bank_bytes"] == 3584
    assert rows["dora"]["usable"] is False
    assert "6 of 12 adapters fit into one bank: " in captured.err
    assert main(["pool", "inspect", str(zoo), "--format", "csv"]) == 0
    table = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["adapter"] for row in table] == list(rows)
    assert table[list(rows).index("plain")]["targets"] == "q_proj v_proj"
    assert main(["pool", "inspect", str(zoo)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| adapter | usable | rank | alpha | rsLoRA | DoRA | targets | modules | base | B all zero | dtype |")
    assert len(lines) == 2 + len(rows)


def test_a_folder_that_cannot_be_read_is_one_row(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dlplora.adapters.inspect as looking

    scan, examine = looking.os.scandir, looking.examine

    def refuse_folder(path: Any) -> Any:
        if Path(path).name == "more":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    def refuse_file(folder: Path, name: str) -> Any:
        if name in {"plain", "more"}:
            raise PermissionError(13, "Permission denied", str(folder / CONFIG))
        return examine(folder, name)

    monkeypatch.setattr(looking.os, "scandir", refuse_folder)
    monkeypatch.setattr(looking, "examine", refuse_file)
    found = {finding.name: finding for finding in inspect_folder(zoo).findings}
    assert found["more"].hints == [f"cannot be read: Permission denied: {zoo}/more/{CONFIG}"]
    assert found["plain"].usable is False
    assert found["wide"].usable is True


def test_nothing_to_look_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pool", "inspect", str(tmp_path / "no")]) == 2
    assert "folder not found" in capsys.readouterr().err
    assert main(["pool", "inspect", str(tmp_path)]) == 2
    assert "no PEFT LoRA folders" in capsys.readouterr().err


def test_inspecting_needs_no_torch(zoo: Path) -> None:
    code = (
        "import sys; from dlplora.cli.main import main; code = main(sys.argv[1:]);"
        "print([name for name in ('torch', 'transformers', 'peft') if name in sys.modules], code, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, "pool", "inspect", str(zoo)], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[] 0"


def test_listing_and_checking(tiny_pool: Path, tiny_llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("gamma", "alpha"):
        assert main(["pool", "add", str(tmp_path / "pool"), str(tiny_pool / name)]) == 0
    capsys.readouterr()
    assert main(["pool", "list", str(tmp_path / "pool"), "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["adapter"], row["rank"], row["alpha"], row["rsLoRA"]) for row in rows] == [("gamma", 2, 4, True), ("alpha", 4, 8, False)]
    assert rows[0]["source"] == str(tiny_pool / "gamma")
    assert len(rows[0]["sha256"]) == 64
    assert main(["pool", "check", str(tmp_path / "pool"), "--pretrained", str(tiny_llama_folder)]) == 0
    assert f"largest rank 4, 7 kB in float32; they fit LlamaForCausalLM ({tiny_llama_folder})" in capsys.readouterr().out


def test_an_adapter_that_does_nothing_is_pointed_out(zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pool", "add", str(tmp_path / "pool"), str(zoo / "untrained")]) == 0
    assert "note: every B factor is zero" in capsys.readouterr().err
    assert main(["pool", "check", str(tmp_path / "pool")]) == 0
    assert "note: untrained: every B factor is zero" in capsys.readouterr().err


def test_a_pool_that_does_not_fit_a_backbone(
    tiny_pool: Path, tiny_llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    config = json.loads((tiny_llama_folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 64, "head_dim": 16}))
    assert main(["pool", "check", str(tiny_pool), "--pretrained", str(folder)]) == 2
    text = capsys.readouterr().err
    assert "'model.layers.0.self_attn.q_proj' maps 64 -> 64 in the base model, the adapters (alpha, beta, gamma) expect 32 -> 32" in text
    assert str(folder) in text


# ---------------------------------------------------------------------- one error, one line


def renamed(pool: Path, name: str, other: bytes) -> None:
    import os

    try:
        os.rename(os.fsencode(pool / name), os.fsencode(pool) + b"/" + other)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")


@pytest.mark.parametrize("name", [b"\xff\xfe", b"ad\xffapter"])
@pytest.mark.parametrize("command", [["pool", "check"], ["pool", "list"], ["generate", "hi", "--pool"]])
def test_folders_that_are_not_utf8_are_one_line(command: list[str], name: bytes, tiny_pool: Path, tmp_path: Path, capsys: Any) -> None:
    pool = tmp_path / "pool"
    shutil.copytree(tiny_pool, pool)
    (pool / "pool.json").unlink(missing_ok=True)
    renamed(pool, "beta", name)
    assert main([*command, str(pool)]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "is not UTF-8" in told.err
    assert "rename" in told.err
    assert told.err.count("\n") == 1


def test_inspect_says_that_such_a_folder_is_not_usable(tiny_pool: Path, tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    shutil.copytree(tiny_pool, pool)
    renamed(pool, "beta", b"ad\xffapter")
    (finding,) = (one for one in inspect_folder(pool).findings if one.name not in ("alpha", "gamma"))
    assert not finding.usable
    assert "is not UTF-8; rename it" in finding.hints[0]


def test_check_counts_only_where_there_is_something_to_count(tiny_pool: Path, tmp_path: Path, capsys: Any) -> None:
    pool = tmp_path / "pool"
    shutil.copytree(tiny_pool, pool)
    (pool / "pool.json").unlink(missing_ok=True)
    edit(pool / "beta", use_dora=True)
    assert main(["pool", "check", str(pool)]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert [line.partition(":")[2].strip().partition(":")[0] for line in told.err.splitlines()] == ["error"]
    edit(pool / "gamma", use_dora=True)
    assert main(["pool", "check", str(pool)]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "2 of 3 adapters cannot be fused"
