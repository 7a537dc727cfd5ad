"""``dlplora.evaluate``: evaluate one method under one protocol in one call."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dlplora.config import config_label
from dlplora.evaluation.protocol import fitted_to_suite, load_protocol, require_rows_read
from dlplora.evaluation.runner import Artifacts, execute, prepare
from dlplora.inference.arguments import require_folders, require_mapping, require_whole
from dlplora.reporting.schema import Record


def evaluate(
    method: str = "dlp",
    *,
    pretrained: str | Path | None = None,
    pool: str | Path | None = None,
    router: str | Path | None = None,
    multitask: str | Path | None = None,
    artifacts: Mapping[str, str | Path] | None = None,
    method_params: Mapping[str, Any] | None = None,
    protocol: str = "nano",
    suite: str | None = None,
    tasks: str | Sequence[str] | None = None,
    data_root: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    dtype: str | None = None,
    device: str | None = None,
    out: str | Path | None = None,
) -> Record:
    """Evaluate a fusion method on a suite of tasks through lm-eval; what ``dlplora eval`` does for one method.

    Args:
        method: Name of a method configuration, or path of a method YAML.
        pretrained: Base model, as for ``FusedCausalLM.from_pretrained``; None takes the protocol's.
        pool, router, multitask: Folders; with the embedded nano model they default to the embedded ones.
        artifacts: Further artifact folders by role, ``trained`` for instance.
        method_params: Overrides of the method's parameters.
        protocol: Name of a protocol, or path of its YAML.
        suite: Suite of tasks (``nano``, ``local:TASK,TASK``); None takes the protocol's.
        tasks: One task of the suite, or some; None takes all that the protocol names.
        data_root: Folder of the rows of local tasks; None reads ``DLPLORA_DATA``.
        limit: Questions per task; None takes all.
        seed: Seed of methods that draw random numbers.
        dtype: Dtype of base model and adapters (``auto``, ``float32``, ``float16``, ``bfloat16``); None takes the protocol's.
        device: Where to run; None is the CPU for the embedded model, and the best device of the machine for any other.
        out: Results folder to write record and answers to; None writes nothing.

    Returns:
        The record: ``record.aggregates`` has the means, ``record.tasks`` each task's metrics, ``record.routing`` the routing statistics.

    Raises:
        DLPLoRAError: For an unknown name, a folder that does not exist or does not fit, or an impossible setting.
    """
    require_folders({"pretrained": pretrained, "pool": pool, "router": router, "multitask": multitask, "data_root": data_root, "out": out})
    require_mapping("artifacts", artifacts)
    require_mapping("method_params", method_params)
    require_folders(artifacts or {})
    require_whole("seed", seed, 0)
    if limit is not None:
        require_whole("limit", limit, 1)
    given = {"backbone": pretrained, "suite": suite, "data_root": data_root, "dtype": dtype}
    overrides: dict[str, Any] = {key: str(value) for key, value in given.items() if value is not None}
    if tasks is not None:
        overrides["tasks"] = [tasks] if isinstance(tasks, str) else list(tasks)
    settings = load_protocol(protocol, overrides)
    require_rows_read(settings.suite, overrides.get("data_root"))
    if suite is not None and tasks is None:  # the protocol's list of tasks was written for its own suite
        settings, _ = fitted_to_suite(settings)
    folders = Artifacts(
        pool=None if pool is None else Path(pool),
        router=None if router is None else Path(router),
        multitask=None if multitask is None else Path(multitask),
        others={role: Path(path) for role, path in (artifacts or {}).items()},
    )
    label = config_label(protocol)
    run = prepare(settings, label, method, seed, artifacts=folders, method_params=method_params, limit=limit, device=device)
    if out is not None:
        return execute(run, Path(out))[1]
    with tempfile.TemporaryDirectory(prefix="dlplora-") as folder:
        return execute(run, Path(folder))[1]
