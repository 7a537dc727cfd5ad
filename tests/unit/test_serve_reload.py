"""Reloading a pool under a running engine: where it loads, and what stays if it fails."""

import contextvars
import threading
from collections.abc import Iterator

import pytest

from dlplora.cli.serve import reloader
from dlplora.errors import ConfigError
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.serve.engine import Engine, EngineOptions


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


def test_a_reload_that_fails_keeps_the_pool(engine: Engine) -> None:
    names = engine.decider.names

    def load() -> FusedCausalLM:
        raise ConfigError("the pool is broken.")

    with pytest.raises(ConfigError, match="the pool is broken"):
        reloader(engine, load, contextvars.copy_context())()
    assert engine.decider.names == names
    assert engine.fused.generate_text(["Q: 1 + 1\nAnswer:"], max_new_tokens=2)
