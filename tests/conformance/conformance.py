"""Cases for the conformance checklist: every preset found, on the tiny model and the tiny pool.

The checks themselves are in ``dlplora.testing.conformance``, so that third parties can run them on their own methods.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dlplora.config import list_configs
from dlplora.methods.base import FusionMethod
from dlplora.methods.registry import available_methods, build_stand_in, load_method_spec
from dlplora.testing.conformance import Case


def discovered() -> list[str]:
    """Names of all presets, then of methods without a preset."""
    presets = list_configs("method")
    covered = {load_method_spec(preset).method for preset in presets}
    return presets + [name for name in available_methods() if name not in covered]


def make_case(
    build: str | Callable[[], FusionMethod], *, model: Any, tokenizer: Any, pool: Path, uniform_pool: Path, multitask: Path, workdir: Path
) -> Case:
    """A case for a preset name or for any callable that makes a method; one that sums factors gets adapters of one rank."""
    builder = (lambda: build_stand_in(build)) if isinstance(build, str) else build
    return Case(
        build=builder,
        make_model=lambda: copy.deepcopy(model),
        tokenizer=tokenizer,
        pool=uniform_pool if builder().metadata.combine == "factor" else pool,
        workdir=workdir,
        artifacts=dict.fromkeys(("multitask", "multitask_r64", "multitask_r208"), multitask),
    )
