"""The hub path without a hub: a cache laid out as huggingface_hub lays it out.

Processes of their own, because huggingface_hub reads its settings once, when it is imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

BASE, LORA = "b" * 40, "a" * 40


def put_into_cache(cache: Path, repo: str, commit: str, files: dict[str, Path]) -> None:
    """``models--ORG--NAME/{refs,snapshots,blobs}``: files are links to blobs that are named by their checksum."""
    home = cache / f"models--{repo.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    (home / "blobs").mkdir()
    for name, source in files.items():
        blob = home / "blobs" / hashlib.sha256(source.read_bytes()).hexdigest()
        blob.write_bytes(source.read_bytes())
        link = home / "snapshots" / commit / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))


@pytest.fixture(scope="module")
def cache(tiny_llama_folder: Path, tiny_pool: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hf")
    put_into_cache(root / "hub", "org/tiny-base", BASE, {path.name: path for path in tiny_llama_folder.iterdir()})
    put_into_cache(root / "hub", "org/tiny-lora", LORA, {path.name: path for path in (tiny_pool / "beta").iterdir()})
    return root


def run(cache: Path, cwd: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("HF_HUB_CACHE", None)
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=cwd, env=environment, check=False)


def test_adapter_and_backbone_come_from_the_cache(cache: Path, tmp_path: Path, tiny_llama_folder: Path, tiny_pool: Path) -> None:
    code = f"""
import json, sys, torch
from dlplora.cli.main import main
from dlplora.adapters.fingerprint import base_fingerprint
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.inference.loading import load_backbone
assert main(["pool", "add", "./pool", "org/tiny-lora"]) == 0
assert main(["pool", "add", "./pool", "hf://org/tiny-lora@{LORA}", "--name", "again", "--offline"]) == 0
assert main(["pool", "check", "./pool", "--pretrained", "org/tiny-base"]) == 0
model = FusedCausalLM.from_pretrained("org/tiny-base", pool="./pool", method="oracle", revision="main")
ids = torch.tensor([[1, 5, 9, 40]])
with model.routing(torch.tensor([1.0, 0.0])), torch.no_grad():
    logits = model(input_ids=ids).logits[0, -1, :4].tolist()
half, _ = load_backbone("org/tiny-base", revision="{BASE}")
same = base_fingerprint(half.to(torch.bfloat16)) == model.fingerprint()  # the rows are read from the cached file
print(json.dumps({{"logits": logits, "commit": model.model.hub_commit, "names": model.bank.names, "same": same}}))
"""
    done = run(cache, tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["commit"] == BASE
    assert said["names"] == ["tiny-lora", "again"]
    rows = json.loads((tmp_path / "pool" / "pool.json").read_text())["adapters"]
    assert [(row["source"], row["revision"]) for row in rows] == [("hf://org/tiny-lora", LORA)] * 2
    assert not any(path.is_symlink() for path in (tmp_path / "pool").rglob("*"))
    assert said["same"] is True
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama_folder), str(tiny_pool / "beta")).eval()
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[1, 5, 9, 40]])).logits[0, -1, :4]
    torch.testing.assert_close(torch.tensor(said["logits"]), expected, atol=1e-5, rtol=1e-5)


def test_what_is_not_in_the_cache_is_said_in_one_line(cache: Path, tmp_path: Path, tiny_pool: Path) -> None:
    commands = [
        ["pool", "add", "./pool", "org/absent"],
        ["pool", "add", "./pool", "org/tiny-lora", "--revision", "v9"],
        ["generate", "x", "--method", "base", "--pretrained", "org/absent", "--pool", str(tiny_pool)],
        ["pool", "check", str(tiny_pool), "--pretrained", "org/absent"],
    ]
    done = run(cache, tmp_path, "-c", f"from dlplora.cli.main import main\nprint([main(command) for command in {commands!r}])")
    assert done.stdout.splitlines()[-1] == "[2, 2, 2, 2]"
    where = f"is not in the cache {cache}/hub, and the hub is not asked (offline mode)."
    adapter = "Pass a local PEFT folder, or fetch it once with a connection: hf download org/"
    model = (
        f"dlplora: error: cannot load base model 'org/absent': there is no such folder, and hub id 'org/absent' {where} "
        "Pass a local model folder, or fetch it once with a connection: hf download org/absent."
    )
    assert [line for line in done.stderr.splitlines() if line.startswith("dlplora: ")] == [
        f"dlplora: error: adapter not found: there is no folder org/absent, and hub id 'org/absent' {where} {adapter}absent.",
        "dlplora: error: adapter not found: there is no folder org/tiny-lora, and hub id 'org/tiny-lora' (revision v9) "
        f"{where} {adapter}tiny-lora.",
        model,
        model,
    ]
    assert not list(tmp_path.iterdir())
