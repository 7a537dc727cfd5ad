"""``dlplora serve`` as a process, with the official client, and what the command refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the server's packages are not installed: pip install -e '.[serve]'")
pytest.importorskip("httpx", reason="httpx is not installed")

from dlplora.cli import serve
from dlplora.cli.main import main
from dlplora.errors import ConfigError
from dlplora.inference.loading import nano_asset
from tests.e2e.asked import GATE, ZARGI


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[str], int, Path]]:
    """A server of three of nano's adapters; ``lorauter`` needs no trained router."""
    pool = tmp_path_factory.mktemp("serve") / "pool"
    pool.mkdir()
    for name in ("translate_zargi", "gate_colors", "pick_tool"):
        shutil.copytree(nano_asset("pool") / name, pool / name)
    command = [
        sys.executable,
        "-m",
        "dlplora.cli.main",
        "serve",
        "--port",
        "0",
        "--pool",
        str(pool),
        "--method",
        "lorauter",
        "--max-batch",
        "4",
    ]
    started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert started.stderr is not None
    seen = []
    for line in started.stderr:
        seen.append(line)
        if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
            yield started, int(found[1]), pool
            break
    else:
        pytest.fail("".join(seen))
    started.send_signal(signal.SIGINT)
    assert started.wait(30) == 130
    *_, last = started.stderr
    assert last == "dlplora: the server has stopped.\n"


def test_the_official_client_and_a_reload(process: Any, alone: dict[str, str]) -> None:
    openai = pytest.importorskip("openai", reason="the openai client is not installed")
    server, port, pool = process
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    found = client.chat.completions.create(model="translate_zargi", messages=[{"role": "user", "content": ZARGI}], temperature=0)
    assert found.choices[0].message.content == alone[ZARGI]
    stream = client.chat.completions.create(
        model="translate_zargi", messages=[{"role": "user", "content": ZARGI}], temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == alone[ZARGI]
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="other", prompt="x")
    shutil.copytree(nano_asset("pool") / "bridge_colors", pool / "bridge_colors")
    server.send_signal(signal.SIGHUP)
    until = time.monotonic() + 30
    while "bridge_colors" not in {card.id for card in client.models.list().data}:
        assert time.monotonic() < until
        time.sleep(0.1)
    (pool / "broken").mkdir()
    (pool / "broken" / "adapter_config.json").write_text("{")
    server.send_signal(signal.SIGHUP)
    time.sleep(1.0)
    names = {card.id for card in client.models.list().data}
    assert "bridge_colors" in names
    assert "broken" not in names
    found = client.chat.completions.create(model="gate_colors", messages=[{"role": "user", "content": GATE}], temperature=0)
    assert found.choices[0].message.content == " no"


def test_clients_that_vanish_free_their_slots(process: Any) -> None:
    _, port, _ = process
    body = json.dumps({"model": "base", "prompt": "the cat", "max_tokens": 400, "ignore_eos": True, "stream": True}).encode()
    for cut in (body, body[: len(body) // 2]):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + cut)
            if cut is body:
                connection.recv(100)
    import httpx

    until = time.monotonic() + 20
    while httpx.get(f"http://127.0.0.1:{port}/ready").json() != {"ready": True, "running": 0, "waiting": 0}:
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "set --api-key, or pass --insecure"),
        (["--port", "70000"], "--port must be between"),
        (["--max-batch", "0"], "max_batch"),
        (["--method", "arrow_out"], "routes single tokens"),
        (["--chat-template", "missing.jinja"], "chat template not found"),
        (["--min-confidence", "2"], "min_confidence"),
    ],
)
def test_bad_options_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", "0", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("dlplora: error:")
    assert message in error


@pytest.mark.parametrize("name", ["auto", "base", "nano"])
def test_names_that_mean_something_else_are_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(nano_asset("pool") / "gate_colors", tmp_path / name)
    shutil.copytree(nano_asset("pool") / "pick_tool", tmp_path / "pick_tool")
    assert main(["serve", "--port", "0", "--method", "base", "--pool", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error == f"dlplora: error: adapter '{name}' has a name that means something else to the server; rename its folder."


def test_loading_leaves_no_thread_behind(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its OpenMP threads would slow down those of the engine."""
    seen: list[threading.Thread] = []

    def load() -> Any:
        seen.append(threading.current_thread())
        raise ConfigError("no model")

    monkeypatch.setattr(serve, "_loader", lambda arguments: load)
    assert main(["serve", "--port", "0"]) == 2
    assert capsys.readouterr().err.strip() == "dlplora: error: no model"
    assert seen[0] is not threading.main_thread()
    assert not seen[0].is_alive()


def test_a_port_in_use_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["serve", "--port", str(taken.getsockname()[1])]) == 2
    assert "Choose another --port" in capsys.readouterr().err
