"""Predicted minutes and memory of cells, from shapes and budgets; None if unknown."""

from __future__ import annotations

from functools import cached_property

from dlplora.config import load_yaml
from dlplora.errors import ConfigError
from dlplora.inference.loading import nano_asset
from dlplora.matrix.subject import Subject
from dlplora.reproduce import artifacts, estimate, paper, pipeline

FORWARD, TRAINING = 2, 4
"""Operations a parameter and token: a forward pass, and one with gradients through frozen weights."""


class Predictions:
    """Predictions for one profile.

    Args:
        subject: The profile.
        speed_tflops: What a worker computes in a second, 1e12 operations; None predicts no time but nano's, which was measured.
    """

    def __init__(self, subject: Subject, speed_tflops: float | None) -> None:
        self.subject, self.speed = subject, speed_tflops

    def of(self, kind: str, name: str) -> tuple[float | None, float | None]:
        """(minutes, GB) of a cell of a kind and name."""
        minutes = self._nano_minutes(kind, name) if self.subject.job is None else self._minutes(kind, name)
        memory = self._memory(kind, name)
        return None if minutes is None else round(minutes, 2), None if memory is None else round(memory / 1e9, 3)

    def _nano_minutes(self, kind: str, name: str) -> float:
        """What steps took on a core of a server CPU."""
        if kind == "evaluate":
            return pipeline.SECONDS["evaluate"] / 60
        if kind == "experts":  # two processes share the pool's time
            return 2 * pipeline.SECONDS["pool"] / 60 * (name.count(",") + 1) / len(self.subject.setting.chosen().names)
        if name == "pool":
            return 0.1
        return pipeline.SECONDS.get(name, pipeline.SECONDS_OF_ANOTHER_TRAINING) / 60

    def _minutes(self, kind: str, name: str) -> float | None:
        if kind == "artifact" and name == "pool":
            return 0.1  # files are copied
        tokens, shape = self._tokens(kind, name), self._shape
        if tokens is None or shape is None or self.speed is None:
            return None
        return (FORWARD if kind == "evaluate" else TRAINING) * shape.parameters * tokens / (self.speed * 1e12) / 60

    def _tokens(self, kind: str, name: str) -> float | None:
        rows, _ = paper.rows_at_hand(self.subject.job) if self.subject.job is not None else ([], 0)
        if not rows or kind == "backbone" or name == "router":
            return None
        mean = estimate.tokens_per_row(rows)
        if kind == "evaluate":
            items = [item for task in self.subject.setting.chosen().tasks for item in task.rows.get("test", ())[: self.subject.limit]]
            return sum(mean * max(1, len(item.choices or ())) for item in items)
        batch_size, num_steps, _ = self._budget("pool" if kind == "experts" else name)
        return batch_size * num_steps * mean * (name.count(",") + 1)

    def _budget(self, role: str) -> tuple[int, int, int]:
        """Rows per step, steps, tokens per row at most."""
        setting = self.subject.setting
        data = load_yaml(artifacts.config_path(role, setting))["data"]["init_args"]
        data = paper.overridden(data, setting.extra(role), "--data.init_args.")
        return int(data.get("batch_size", 32)), int(data.get("num_steps", 0)), int(data.get("max_length", 512))

    def _memory(self, kind: str, name: str) -> int | None:
        shape, protocol = self._shape, self.subject.protocol
        if shape is None or kind == "backbone" or name in {"pool", "router"}:
            return None
        if kind == "evaluate":
            length = protocol.max_length or 512
            dtype = protocol.dtype if protocol.dtype in estimate.BYTES else "float32"
            num = len(self.subject.setting.chosen().names)
            return estimate.evaluation_memory(shape, num_experts=num, batch_size=protocol.batch_size, length=length, dtype=dtype)
        role = "pool" if kind == "experts" else name
        batch_size, _, length = self._budget(role)
        return estimate.training_memory(shape, batch_size=batch_size, length=length, dtype="float32", size=paper.RANKS.get(role, 8) // 8)

    @cached_property
    def _shape(self) -> estimate.ModelSize | None:
        """Sizes of the base model; None if they are not available without a download."""
        job = self.subject.job
        lora = load_yaml(artifacts.config_path("pool", self.subject.setting))["model"]["init_args"]["lora"]
        source, known = (str(nano_asset("backbone")), None) if job is None else (job.profile.backbone, paper.known_shape(job))
        try:
            return estimate.shape_of(source, known, rank=lora["rank"], targets=lora["target_modules"])
        except ConfigError:
            return None
