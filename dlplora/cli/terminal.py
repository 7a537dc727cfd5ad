"""Silence the output of other packages while a model loads."""

from __future__ import annotations

import sys
import warnings


def quiet_loading(pretrained: str | None) -> None:
    """Switch off transformers' loading bars where they are useless (for the embedded base model, and without a terminal), and a warning.

    Args:
        pretrained: The base model asked for; None is the embedded one.
    """
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)  # PEFT reads it, not the user
    if pretrained is None or not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()


def split_names(text: str) -> list[str]:
    """Names separated by commas, without blanks."""
    return [name.strip() for name in text.split(",") if name.strip()]
