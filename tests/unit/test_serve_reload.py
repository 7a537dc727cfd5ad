"""Reloading a pool under a running engine: where it loads, and what stays if it fails."""

import contextvars
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the server's packages are not installed: pip install -e '.[serve]'")
pytest.importorskip("httpx", reason="httpx is not installed")
from starlette.testclient import TestClient

from dlplora.cli import serve
from dlplora.cli.main import build_parser
from dlplora.cli.serve import reloader
from dlplora.errors import ConfigError
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.inference.loading import backbones_kept, nano_asset
from dlplora.serve.app import build_app
from dlplora.serve.catalog import public_name
from dlplora.serve.engine import Engine, EngineOptions
from dlplora.serve.failures import without_paths
from dlplora.serve.server import ServerOptions


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine(FusedCausalLM.from_pretrained(method="base"), EngineOptions(max_batch=2, max_model_len=64))
    yield made
    made.close()


def test_a_reload_loads_in_a_thread_that_has_ended_afterwards(engine: Engine) -> None:
    threads: list[threading.Thread] = []
    old = engine.fused

    def load() -> FusedCausalLM:
        threads.append(threading.current_thread())
        return FusedCausalLM.from_pretrained(method="base")

    names = reloader(engine, load, contextvars.copy_context())()
    assert tuple(names) == engine.decider.names
    assert engine.fused is not old
    (thread,) = threads
    assert thread is not threading.main_thread()
    assert not thread.is_alive()


@pytest.mark.parametrize("error", [ConfigError("the pool is broken."), KeyError("the pool is broken.")])
def test_a_reload_that_fails_keeps_the_pool(error: Exception, engine: Engine) -> None:
    names = engine.decider.names

    def load() -> FusedCausalLM:
        raise error

    with pytest.raises(type(error), match="the pool is broken"):
        reloader(engine, load, contextvars.copy_context())()
    assert engine.decider.names == names
    assert engine.fused.generate_text(["Q: 1 + 1\nAnswer:"], max_new_tokens=2)


def test_what_is_refused_says_what_to_do_and_names_no_path(tmp_path: Path) -> None:
    """A router that does not know the new adapter, a name of the server's own, a broken adapter; the old pool answers on."""
    pool = tmp_path / "my pool"
    shutil.copytree(nano_asset("pool"), pool)
    (pool / "pool.json").unlink()
    arguments = build_parser().parse_args(["serve", "--pool", str(pool), "--method", "dlp"])
    with backbones_kept():
        load = serve._loader(arguments)
        engine = Engine(load(), EngineOptions(max_batch=2, max_model_len=64))
        reload = reloader(engine, load, contextvars.copy_context())
        options = ServerOptions(base_name="nano", admin_key="key", reload=reload, folders=serve._folders(arguments))
        client = TestClient(build_app(engine, options))

        def refused(name: str, config: str | None = None) -> str:
            shutil.copytree(pool / "gate_colors", pool / name)
            if config is not None:
                (pool / name / "adapter_config.json").write_text(config)
            response = client.post("/admin/reload", headers={"authorization": "Bearer key"})
            shutil.rmtree(pool / name)
            assert response.status_code == 409
            assert str(tmp_path) not in response.text
            return str(response.json()["error"]["message"])

        def answer() -> str:
            body = {"model": "gate_colors", "prompt": "Tom is at the gate with a brown glove. Does Tom pass?\nAnswer:", "temperature": 0}
            return str(client.post("/v1/completions", json=body).json()["choices"][0]["text"])

        before = answer()
        message = refused("new_one")
        assert "['new_one']" in message
        assert "router that was trained for the new pool" in message
        assert "adapter 'broken': my pool/broken/adapter_config.json: not JSON" in refused("broken", "{")
        arguments.method = "base"  # knows no adapters, so that the name is what is wrong
        assert "adapter 'auto' has a name that means something else" in refused("auto")
        assert answer() == before == " no"
        engine.close()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no pool: /srv/my models/pool. Pass", "no pool: pool. Pass"),
        ("'/home/me/x/a b.json' is damaged, or C:\\data\\pool", "'x/a b.json' is damaged, or pool"),
        ("10 tokens/s and/or pool/x, 1 / 2", "10 tokens/s and/or pool/x, 1 / 2"),
    ],
)
def test_paths_are_cut(text: str, expected: str, tmp_path: Path) -> None:
    assert without_paths(text, ["/srv/my models/pool", "/home/me/x"]) == expected
    (tmp_path / "model").mkdir()
    assert [public_name(one) for one in (None, "org/model", str(tmp_path / "model"))] == ["nano", "org/model", "model"]
