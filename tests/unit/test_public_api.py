"""The names that ``dlplora`` exports: lazy, complete, typed for callers; ``evaluate`` in one call."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dlplora
from dlplora.config import ASSETS_ROOT
from dlplora.errors import DLPLoRAError

README = Path(__file__).resolve().parents[2] / "README.md"
SNIPPET = """
from pathlib import Path
from typing import Any

import dlplora
from dlplora import AdapterBank, FusedCausalLM, FusionMethod, PromptBatch, Record, Router, RouterConfig, evaluate, load_pool

model = FusedCausalLM.from_pretrained("folder", pool=Path("pool"), method="dlp", dtype="auto", device=None)
one: str = model.generate_text("text", max_new_tokens=4, do_sample=False)
chat: str = model.generate_text([{"role": "user", "content": "text"}])
several: list[str] = model.generate_text(["text", "more"], task_names=["alpha", None])
record: Record = evaluate("dlp", pretrained="folder", pool="pool", tasks=["alpha"], limit=3, method_params={"top_p": 0.9})
scores: dict[str, float] = dict(record.tasks["alpha"].metrics)
bank: AdapterBank = model.bank
names: tuple[str, ...] = bank.names
order: tuple[str, ...] = tuple(load_pool("pool").names)
router: Router = Router(names, RouterConfig(variant="table"))


class Mine(FusionMethod):
    name = "mine"

    def route(self, prompts: PromptBatch) -> Any:
        return None


version: str = dlplora.__version__
"""


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_import_is_light() -> None:
    code = """
import sys, time
started = time.process_time()
import dlplora
spent = time.process_time() - started
print(spent, [name for name in ("torch", "transformers", "numpy", "lm_eval", "lightning") if name in sys.modules])
"""
    seconds, loaded = zip(*(run(code).split(" ", 1) for _ in range(3)), strict=True)
    assert set(loaded) == {"[]"}
    assert min(map(float, seconds)) < 0.05


def test_every_name_is_there_under_its_own_name() -> None:
    assert set(dlplora.__all__) <= set(dir(dlplora))
    assert set(dlplora._HOMES) == set(dlplora.__all__)
    for name in dlplora.__all__:
        value = getattr(dlplora, name)
        assert value.__name__ == name or (name, value.__name__) == ("Router", "MiniMLPRouter")
        assert value.__module__.startswith("dlplora.")
    assert issubclass(DLPLoRAError, Exception)
    assert dlplora.DLPLoRAError is DLPLoRAError


def test_an_unknown_name_suggests_the_near_one() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'FusedCausalLm'\. Did you mean 'FusedCausalLM'\?"):
        _ = dlplora.FusedCausalLm  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match=r"no attribute 'xyzzy'\.$"):
        _ = dlplora.xyzzy  # type: ignore[attr-defined]
    with pytest.raises(ImportError, match="FusionMethods"):
        from dlplora import FusionMethods  # type: ignore[attr-defined]  # noqa: F401
    assert not hasattr(dlplora, "__wrapped__")  # what inspect and doctest ask for is no typing error


def test_callers_type_check_strictly(tmp_path: Path) -> None:
    """From another folder, with mypy's strictest settings; and a file with two mistakes, so that ``Any`` everywhere would show.

    Other packages are not followed: it is our names that are checked, and torch alone takes half a minute.
    """
    pytest.importorskip("mypy", reason="mypy is not installed")
    assert (Path(dlplora.__file__).parent / "py.typed").is_file()
    (tmp_path / "right.py").write_text(SNIPPET)
    (tmp_path / "readme.py").write_text("\n".join(re.findall(r"```python\n(.*?)```", README.read_text(), re.S)))
    (tmp_path / "wrong.py").write_text(SNIPPET + 'wrong: int = model.generate_text("text")\nevaluate(methd="dlp")\n')
    others = ",".join(f"{name}.*" for name in ("torch", "transformers", "lightning", "peft", "lm_eval", "datasets", "numpy", "scipy"))
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nstrict = True\n[mypy-{others}]\nfollow_imports = skip\n")
    command = [sys.executable, "-m", "mypy", "--cache-dir", os.devnull, "right.py", "readme.py", "wrong.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    first, second, *summary = done.stdout.splitlines()
    assert 'expression has type "str", variable has type "int"' in first
    assert '"methd"' in second
    assert all(line.startswith("wrong.py:") for line in (first, second))
    assert summary[-1].startswith("Found 2 errors in 1 file"), done.stdout


@pytest.mark.skipif(not (ASSETS_ROOT / "nano" / "pool").is_dir(), reason="the embedded nano experts are not there yet")
def test_evaluate_returns_the_record_and_writes_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dlplora import evaluate
    from dlplora.reporting.schema import read_record

    monkeypatch.chdir(tmp_path)
    before = set(Path(os.environ.get("TMPDIR", "/tmp")).glob("dlplora-*"))
    record = evaluate("oracle", tasks=["shelf_sorting"], limit=3)
    assert (record.status, record.method_name, record.seed, record.limit) == ("ok", "oracle", 0, 3)
    assert record.tasks["shelf_sorting"].num == 3
    assert record.protocol["dtype"] == "float32"
    assert not list(tmp_path.iterdir())
    assert set(Path(os.environ.get("TMPDIR", "/tmp")).glob("dlplora-*")) <= before
    kept = evaluate("oracle", tasks=["shelf_sorting"], limit=3, out="mine", dtype="auto")
    (file,) = (tmp_path / "mine").rglob("*.json")
    assert read_record(file).cell == kept.cell == record.cell
    assert read_record(file).tasks == record.tasks
    with pytest.raises(DLPLoRAError, match="unknown device 'gpuu'"):
        evaluate("oracle", limit=1, device="gpuu")
    with pytest.raises(DLPLoRAError, match="unknown dtype 'float8'"):
        evaluate("oracle", limit=1, dtype="float8")
