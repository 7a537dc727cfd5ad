"""The process group ends with the command, whether it succeeded or not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from dlplora.evaluation.launch import leaving_together


def begin(folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=0, world_size=1)


def test_the_group_is_gone_after_success(tmp_path: Path) -> None:
    with leaving_together():
        begin(tmp_path)
        assert dist.is_initialized()
    assert not dist.is_initialized()


def test_the_group_is_gone_after_an_error_and_nobody_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "barrier", lambda: pytest.fail("an error must not wait for the other processes"))

    @leaving_together()
    def failing() -> None:
        begin(tmp_path)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert not dist.is_initialized()


def test_without_a_group_nothing_happens() -> None:
    with leaving_together():
        pass
    assert not dist.is_initialized()
