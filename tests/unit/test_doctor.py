"""``dlplora doctor`` tells what is there, and the hub cannot make it wait."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path

import pytest

from dlplora.adapters.add import add_adapter
from dlplora.cli import doctor
from dlplora.cli.main import main


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example:444")


def test_data_and_pools(tmp_path: Path, tiny_pool: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    task = tmp_path / "rows" / "toy"
    task.mkdir(parents=True)
    for split in ("train", "test"):
        (task / f"{split}.jsonl").write_text('{"question": "Is 7 prime?", "choices": ["yes", "no"], "answer": 0}\n' * 12)
    add_adapter(tmp_path / "pools" / "mine", tiny_pool / "alpha")
    (tmp_path / "pools" / "bad").mkdir()
    (tmp_path / "pools" / "bad" / "pool.json").write_text("{")
    monkeypatch.setenv("DLPLORA_DATA", str(tmp_path / "rows"))
    monkeypatch.setenv("DLPLORA_POOLS", str(tmp_path / "pools"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["data"] == {"root": str(tmp_path / "rows"), "tasks": ["toy"], "problem": None}
    assert facts["pools"] == {"root": str(tmp_path / "pools"), "found": {"bad": None, "mine": 1}}
    assert facts["hub"]["state"] == "not asked (HF_HUB_OFFLINE is set)"
    assert set(facts["optional"]) == set(doctor.OPTIONAL_PACKAGES)
    assert facts["hardware"]["memory_bytes"] > 0
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"data root: {tmp_path}/rows, 1 task: toy" in lines
    assert f"pools: {tmp_path}/pools, bad (damaged), mine (1)" in lines
    assert all(": " in line for line in lines)


def test_no_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DLPLORA_DATA", raising=False)
    assert "not set; DLPLORA_DATA or --data-root" in doctor.data_state()["problem"]
    monkeypatch.setenv("DLPLORA_DATA", str(tmp_path / "no"))
    assert doctor.data_state() == {"root": str(tmp_path / "no"), "tasks": [], "problem": "not found"}


@pytest.mark.usefixtures("online")
def test_a_hub_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    def hang(*_: object, **__: object) -> socket.socket:
        release.wait(30)
        raise OSError("released")

    monkeypatch.setattr(doctor, "HUB_TIMEOUT_S", 0.0)
    monkeypatch.setattr(socket, "create_connection", hang)
    assert doctor.hub_state() == "hub.example does not answer within 0 s"  # name resolution has no timeout of its own to set
    release.set()


@pytest.mark.usefixtures("online")
def test_a_hub_that_refuses_and_one_that_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def refuse(address: object, timeout: float) -> socket.socket:
        asked.append((address, timeout))
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(socket, "create_connection", refuse)
    assert doctor.hub_state() == "hub.example does not answer ([Errno 111] Connection refused)"
    assert asked == [(("hub.example", 444), 3.0)]
    left, right = socket.socketpair()
    monkeypatch.setattr(socket, "create_connection", lambda address, timeout: left)
    assert doctor.hub_state() == "hub.example answers"
    right.close()
