"""Tasks: seeded generators and local files, grouped into suites, each also an lm-eval task."""

from pathlib import Path


def lm_eval_dir() -> Path:
    """The folder of our lm-eval YAML files."""
    return Path(__file__).resolve().parent / "lm_eval"
