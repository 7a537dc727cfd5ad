"""The names that ``dlplora`` exports: lazy, complete, typed for callers; ``evaluate`` in one call."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dlplora
from dlplora import (
    AdapterBank,
    FusedAdapter,
    FusedCausalLM,
    FusionMethod,
    PromptBatch,
    Router,
    export_gguf,
    export_merged,
    export_peft,
    load_pool,
)
from dlplora.config import ASSETS_ROOT, configs_root
from dlplora.errors import ConfigError, DLPLoRAError, MethodError, PoolError
from dlplora.methods.base import Metadata
from dlplora.methods.registry import method_class

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


class Unregistered(FusionMethod):
    """A method that no registry knows."""

    name = "unregistered_for_test"
    metadata = Metadata(title="Half of each", granularity="prompt", needs=("inputs",))

    def route(self, prompts: PromptBatch) -> Any:
        return torch.full((len(prompts), len(self.expert_names)), 0.5)


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


@pytest.fixture(scope="module")
def average(tiny_llama_folder: Path, uniform_pool: Path) -> FusedCausalLM:
    return FusedCausalLM.from_pretrained(tiny_llama_folder, pool=uniform_pool, method="avg_delta")


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"metod": "dlp"}, TypeError, "FusedCausalLM.from_pretrained() got an unexpected keyword argument 'metod'. Did you mean 'method'?"),
        (
            {"torch_dtype": "float32"},
            TypeError,
            "unexpected keyword argument 'torch_dtype'. Did you mean 'dtype'?",
        ),
        ({"load_in_4bits": True}, TypeError, "Did you mean 'load_in_4bit'?"),
        ({"method": 3}, MethodError, "method must be the name of a method, the path of its YAML file, or a FusionMethod; got int."),
        ({"method": Unregistered, "method_params": {"a": 1}}, MethodError, "pass Unregistered(config) in place of method_params"),
        ({"method_params": "top_p=1"}, ConfigError, "method_params must be a mapping, got str."),
        ({"artifacts": "folder"}, ConfigError, "artifacts must be a mapping, got str."),
        ({"router": 5}, ConfigError, "router must be the name or path of a folder, got int."),
        ({"pretrained": 5}, ConfigError, "pretrained must be the name or path of a folder, got int. FusedCausalLM(model, "),
        ({"pool": ["a"]}, PoolError, "a pool is given as a folder or by its name, got list."),
        ({"device": 1.5}, ConfigError, "unknown device '1.5'"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_loaded(given: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        FusedCausalLM.from_pretrained(**given)


def test_what_from_pretrained_takes_besides_names(tiny_llama_folder: Path, uniform_pool: Path) -> None:
    opened = load_pool(uniform_pool)
    for method in (method_class("avg_delta"), configs_root() / "method" / "avg_delta.yaml", Unregistered):
        fused = FusedCausalLM.from_pretrained(tiny_llama_folder, pool=opened, method=method, names="beta")
        assert type(fused.method) is (Unregistered if method is Unregistered else method_class("avg_delta"))
        assert fused.pool.names == ("beta",)
        fused.close()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda fused: fused.compile(mod=1), "FusedCausalLM.compile() got an unexpected keyword argument 'mod'. Did you mean 'mode'?"),
        (
            lambda fused: fused.generate("the cat", max_new_token=1),
            "the option max_new_token. Did you mean 'max_new_tokens'?",
        ),
        (
            lambda fused: fused.generate_text("the cat", task_names=5),
            "task_names must be the name of a task, or one for each",
        ),
        (lambda fused: fused.generate_text("the cat", trace=True), "trace must be a list"),
        (lambda fused: fused.route(5), "prompts must be text, a conversation or a list of either, got int."),
        (lambda fused: fused.route([]), "need at least one prompt"),
        (lambda fused: fused.route({"input_ids": 1}), "dict is a mapping"),
        (lambda fused: FusedCausalLM(fused.model, fused.tokenizer, fused.pool, "dlp"), "method must be FusionMethod, got str"),
        (lambda fused: AdapterBank.from_peft("folder"), "a mapping of names to PEFT folders, got str"),
        (lambda fused: AdapterBank.from_peft({"a": "folder"}), "folder not found"),
        (lambda fused: AdapterBank.from_pool(next(iter(fused.pool.specs.values())).path.parent, dtype="floaty"), "unknown dtype 'floaty'"),
        (lambda fused: Router("abc"), "class names must be a list, got the text 'abc'"),
        (lambda fused: Router(["a"], {"variant": "table"}), "config must be a RouterConfig, got dict"),
        (lambda fused: FusedAdapter.from_prompt(fused, ["the cat"]), "the prompt must be one text, got list"),
        (lambda fused: FusedAdapter.from_bank(fused.pool, ["a"]), "weights must map names of adapters to numbers"),
        (lambda fused: export_peft(fused, "out"), "an export takes a FusedAdapter"),
        (lambda fused: export_merged(fused, "out"), "an export takes a FusedAdapter"),
        (lambda fused: export_gguf(fused, "out.gguf"), "an export takes a FusedAdapter"),
    ],
)
def test_other_misuse_is_one_line(average: FusedCausalLM, call: Any, text: str) -> None:
    with pytest.raises((DLPLoRAError, TypeError), match=re.escape(text)) as caught:
        call(average)
    assert isinstance(caught.value, TypeError if "keyword" in text else DLPLoRAError)


@pytest.mark.skipif(not (ASSETS_ROOT / "nano" / "pool").is_dir(), reason="the embedded nano experts are not there yet")
def test_prompts_of_every_form_are_routed_alike() -> None:
    fused = FusedCausalLM.from_pretrained(device="cpu")
    text = "Please write in Zargi: the cat sees the hat.\nAnswer:"
    ids = fused.tokenizer(text, return_tensors="pt")["input_ids"]
    batch = PromptBatch.from_texts(text, fused.tokenizer)
    assert batch.texts == (text,)
    for given in (text, [text], ids, batch, [{"role": "user", "content": text}]):
        state = fused.route(given)
        assert state is not None
        assert state.weights.tolist() == [[float(name == "translate_zargi") for name in fused.bank.names]]
        state.release()
    assert FusedAdapter.from_prompt(fused, text).weights == {"translate_zargi": 1.0}
    fused.close()


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
    assert evaluate("oracle", tasks="shelf_sorting", limit=3).tasks == record.tasks
    with pytest.raises(DLPLoRAError, match="unknown device 'gpuu'"):
        evaluate("oracle", limit=1, device="gpuu")
    with pytest.raises(DLPLoRAError, match="unknown dtype 'float8'"):
        evaluate("oracle", limit=1, dtype="float8")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"limit": "x"}, "limit must be a whole number, got 'x'"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"seed": "x"}, "seed must be a whole number, got 'x'"),
        ({"seed": True}, "seed must be a whole number, got True"),
        ({"pool": 3}, "pool must be the name or path of a folder, got int"),
        ({"artifacts": ["a"]}, "artifacts must be a mapping, got list"),
        ({"artifacts": {"trained": 1}}, "trained must be the name or path of a folder, got int"),
        ({"method_params": "x"}, "method_params must be a mapping, got str"),
    ],
)
def test_evaluate_names_the_argument_that_does_not_fit(given: dict[str, Any], message: str) -> None:
    from dlplora import evaluate

    with pytest.raises(DLPLoRAError, match=message):
        evaluate("oracle", **given)


@pytest.mark.parametrize(
    ("folder", "message"), [(None, "got None"), ("", "got an empty text"), (3, "folder must be the name or path of a folder, got int")]
)
def test_saving_needs_a_folder(folder: Any, message: str, tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    from dlplora import AdapterBank, FusedCausalLM
    from dlplora.methods.registry import build_method

    fused = FusedCausalLM(tiny_llama, tiny_tokenizer, AdapterBank.from_pool(tiny_pool), build_method("avg_delta"))
    with pytest.raises(DLPLoRAError, match=message):
        fused.save_pretrained(folder)
