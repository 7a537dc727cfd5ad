"""Malformed inputs at every door: one clear line, exit code 2, nothing written, nothing executed, no hang."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml

from dlplora.cli.main import main
from tests.campaign import hand_made, mutations
from tests.campaign.workplace import SECRET, complaint, make_workplace, restore, run

SEED = 20261126
TINY = ("--pretrained", "model", "--pool", "pool", "--method", "avg_delta", "--max-new-tokens", "2")
GENERATE = ("generate", "the cat sees", "--raw")
NANO = ("generate", "the cat sees", "--max-new-tokens", "2")
EVAL = ("eval", "--protocol", "protocol.yaml", "--pool", "pool", "--method", "avg_delta", "--out", "out")
REPORTS = tuple(("report", action, "--out", "results", "--suite", "toy") for action in ("list", "validate", "build"))


@dataclass(frozen=True)
class Door:
    """A document and the commands that read it."""

    path: str
    kind: str
    """``json`` (YAML as well), ``jsonl`` or ``safetensors``."""
    commands: tuple[tuple[str, ...], ...]
    number: int
    """Mutations in the campaign."""


DOORS = (
    Door(
        "pool/pool.json",
        "json",
        (("pool", "list", "pool"), ("pool", "check", "pool"), ("pool", "add", "pool", "delta"), (*GENERATE, *TINY)),
        40,
    ),
    Door(
        "pool/alpha/adapter_config.json",
        "json",
        (("pool", "list", "pool"), ("pool", "check", "pool", "--pretrained", "model"), ("pool", "inspect", "pool")),
        40,
    ),
    Door(
        "pool/alpha/adapter_model.safetensors",
        "safetensors",
        (("pool", "check", "pool"), ("pool", "inspect", "pool"), (*GENERATE, *TINY)),
        40,
    ),
    Door("delta/adapter_config.json", "json", (("pool", "add", "pool", "delta"),), 40),
    Door("delta/adapter_model.safetensors", "safetensors", (("pool", "add", "pool", "delta"), ("pool", "inspect", "delta")), 40),
    Door("model/config.json", "json", ((*GENERATE, *TINY), ("pool", "check", "pool", "--pretrained", "model")), 60),
    Door("model/generation_config.json", "json", ((*GENERATE, *TINY),), 30),
    Door("model/tokenizer_config.json", "json", ((*GENERATE, *TINY),), 30),
    Door("model/tokenizer.json", "json", ((*GENERATE, *TINY),), 30),
    Door("model/model.safetensors", "safetensors", ((*GENERATE, *TINY),), 30),
    Door("router/router.json", "json", ((*NANO, "--router", "router"),), 40),
    Door("router/router.safetensors", "safetensors", ((*NANO, "--router", "router"),), 30),
    Door("mole/method.json", "json", ((*NANO, "--method", "mole", "--trained", "mole"),), 30),
    Door("mole/method.safetensors", "safetensors", ((*NANO, "--method", "mole", "--trained", "mole"),), 30),
    Door("method.yaml", "json", ((*NANO, "--method", "method.yaml"), ("eval", "--method", "method.yaml", "--dry-run")), 40),
    Door("protocol.yaml", "json", ((*EVAL, "--dry-run"), (*EVAL, "--limit", "1")), 40),
    Door("rows/alpha/test.jsonl", "jsonl", (("tasks", "--suite", "local:all", "--data-root", "rows"), EVAL), 40),
    Door("bench.yaml", "json", (("bench", "latency", "--config", "bench.yaml", "--out", "out"),), 15),
    Door("fit_expert.yaml", "json", (("fit", "--config", "fit_expert.yaml"),), 40),
    Door("fit_router.yaml", "json", (("fit", "--config", "fit_router.yaml"),), 40),
    Door("results/runs/toy/dlp-dlp0-s0.json", "json", REPORTS, 60),
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workplace that stays as it is."""
    return make_workplace(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def place(sound: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy to spoil, with a secret in the environment."""
    with mock.patch.dict(os.environ, {"DLPLORA_SECRET": SECRET, "HF_HUB_OFFLINE": "1"}):
        yield Path(shutil.copytree(sound, tmp_path / "place"))


def mutated(door: Door, content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """The door's document with one thing wrong, or one thing that is unusual and right."""
    if rng.random() < 0.15:
        return mutations.spoilt_bytes(content, rng)
    if door.kind == "safetensors":
        return mutations.safetensors(content, rng)
    if door.kind == "jsonl":
        lines = content.decode().splitlines()
        number = rng.randrange(len(lines))
        lines[number], what = mutations.document(json.loads(lines[number]), rng)
        return "\n".join(lines).encode("utf-8", "surrogatepass"), f"line {number + 1}: {what}"
    value = yaml.safe_load(content) if door.path.endswith("yaml") else json.loads(content)
    text, what = mutations.document(value, rng)
    return text.encode("utf-8", "surrogatepass"), what


def check_door(door: Door, number: int, sound: Path, place: Path) -> None:
    """Sound as it is, and refused or accepted in order after every mutation."""
    for command in door.commands:
        outcome = run(main, command, place)
        assert outcome.code == 0, (command, outcome.err)
        restore(place, sound, outcome.written)
    content, found, refused = (sound / door.path).read_bytes(), [], 0
    for index in range(number):
        rng = random.Random(f"{SEED}{door.path}{index}")
        (new, what), command = mutated(door, content, rng), rng.choice(door.commands)
        (place / door.path).write_bytes(new)
        outcome = run(main, command, place)
        (place / door.path).write_bytes(content)
        restore(place, sound, outcome.written)
        reports = command[0] == "report"
        wrong = complaint(outcome, must_fail=False, may_write=reports, codes=(1, 2) if reports else (2,))
        refused += outcome.code != 0
        if wrong:
            found.append(f"{what}: {' '.join(command[:3])} {wrong}\n{outcome.err[-1500:]}")
    assert not found, f"{len(found)} of {number}:\n" + "\n".join(found[:5])
    assert refused or number < 10


def check_case(case: hand_made.Case, sound: Path, place: Path) -> str | None:
    """What is wrong with how a hand-made case is answered."""
    if case.spoil is not None:
        case.spoil(place)
    with mock.patch.dict(os.environ, dict(case.environment)), mock.patch("uvicorn.Server.run", return_value=None):
        outcome = run(main, case.command, place)
    if case.spoil is not None:
        shutil.rmtree(place)
        shutil.copytree(sound, place)
    else:
        restore(place, sound, outcome.written)
    wrong = complaint(outcome, must_fail=True, codes=case.codes)
    return None if wrong is None else f"{case.name}: {wrong}\n{outcome.err[-800:]}"


@pytest.mark.campaign
@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.path)
def test_mutations(door: Door, sound: Path, place: Path) -> None:
    check_door(door, door.number, sound, place)


@pytest.mark.campaign
@pytest.mark.parametrize("part", range(8))
def test_hand_made(part: int, sound: Path, place: Path) -> None:
    pytest.importorskip("uvicorn")
    found = [wrong for case in hand_made.CASES[part::8] if (wrong := check_case(case, sound, place))]
    assert not found, f"{len(found)}:\n" + "\n".join(found[:10])


@pytest.mark.campaign
def test_as_processes(place: Path) -> None:
    """A sample through the interpreter: the exit code and the line are those of the command."""
    for case in random.Random(SEED).sample(
        [one for one in hand_made.CASES if one.spoil is None and "\udcff" not in "".join(one.command)], 8
    ):
        done = subprocess.run(
            [sys.executable, "-m", "dlplora.cli.main", *case.command], cwd=place, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode in case.codes, (case.name, done.stderr)
        assert done.stderr.strip().splitlines()[-1].count("error: ") == 1
        assert "Traceback" not in done.stderr


def test_a_short_sample(sound: Path, place: Path) -> None:
    """Two mutations of each document, and one of sixty hand-made cases."""
    for door in DOORS:
        if not door.path.startswith(("bench", "fit", "mole", "protocol")):
            check_door(Door(door.path, door.kind, door.commands[:1], 2), 2, sound, place)
    cheap = [case for case in hand_made.CASES if case.command[:1] != ("bench",)]
    found = [wrong for case in random.Random(SEED).sample(cheap, 10) if (wrong := check_case(case, sound, place))]
    assert not found, "\n".join(found)


def test_the_campaign_is_large() -> None:
    assert sum(door.number for door in DOORS) + len(hand_made.CASES) >= 300
    names = {command[0] for case in hand_made.CASES for command in [case.command] if command} | {
        command[0] for door in DOORS for command in door.commands
    }
    assert names >= {"generate", "eval", "fit", "pool", "report", "reproduce", "serve", "bench", "new-method", "tasks"}


def test_every_kind_of_mutation_is_made() -> None:
    """The mutations of a small document reach all of its places and all kinds."""
    value: dict[str, Any] = {"a": 1, "b": {"c": [1, "x"]}}
    made = [mutations.document(value, random.Random(index)) for index in range(400)]
    assert len({text for text, _ in made}) > 200
    for part in ("root =", "b.c.1 =", "removed", "rename", "add", "twice", "cut at"):
        assert any(part in what for _, what in made), part
