"""Options that say which model, adapters and method a command uses, and the model that they describe."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlplora.config import short
from dlplora.documents import parse_yaml, refuse_resolvers
from dlplora.errors import ConfigError

if TYPE_CHECKING:
    from dlplora.inference.fused_model import FusedCausalLM
    from dlplora.tasks.registry import TrainingItems


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Base model, adapters and trained parts."""
    parser.add_argument(
        "--pretrained",
        metavar="MODEL",
        help="base model: folder, FILE.gguf, smollm2-135m or hub id (default: the embedded nano model)",
    )
    parser.add_argument("--pool", metavar="DIR", help="folder of PEFT LoRA folders")
    parser.add_argument("--router", metavar="DIR", help="folder of a trained router")
    parser.add_argument("--multitask", metavar="DIR", help="folder of the adapter trained on all tasks")
    parser.add_argument("--trained", metavar="DIR", help="folder of the method's own trained gates")


def add_method_options(parser: argparse.ArgumentParser, suite: str) -> None:
    """Parameters of the method, and the rows that it may need.

    Args:
        parser: Of a command.
        suite: Help text of ``--suite``.
    """
    parser.add_argument("--method-param", action="append", default=[], metavar="KEY=VALUE", help="override one parameter of the method")
    parser.add_argument("--artifact", action="append", default=[], metavar="ROLE=DIR", help="folder of another trained part of the method")
    parser.add_argument("--suite", metavar="NAME", help=suite)
    parser.add_argument("--data-root", metavar="DIR", help="rows of local tasks (or DLPLORA_DATA)")


FOR_EXAMPLES = "suite of training rows, for methods that need them: nano, skills, local:TASK,TASK (default: nano, or those of --data-root)"


def parse_parameter(text: str) -> tuple[str, Any]:
    """``KEY=VALUE`` with the value read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--method-param must be KEY=VALUE, got '{text}'.")
    refuse_resolvers(value, f"--method-param {key}")
    return key, parse_yaml(value, f"--method-param {key}: {short(value)}")


def other_artifacts(arguments: argparse.Namespace) -> dict[str, Path]:
    """Folders by role, from ``--artifact`` and ``--trained``."""
    found: dict[str, Path] = {}
    for text in arguments.artifact:
        role, equals, folder = text.partition("=")
        if not equals or not role or not folder:
            raise ConfigError(f"--artifact must be ROLE=DIR, got '{text}'.")
        found[role] = Path(folder)
    return found | ({"trained": Path(arguments.trained)} if arguments.trained else {})


def chosen_training_items(arguments: argparse.Namespace) -> TrainingItems | None:
    """Training items of a task, for methods that need them: of ``--suite``, else of the local rows, else of nano for its own adapters.

    None where none of these is given. A suite's name and the folder of the rows are checked at once.
    """
    from dlplora.tasks.registry import get_suite, local_training_items, training_items

    root = arguments.data_root
    if arguments.suite is not None:
        get_suite(arguments.suite, root)
        return training_items(arguments.suite, root)
    if arguments.pretrained is None and arguments.pool is None and root is None:
        return training_items("nano")
    return local_training_items(root)


def open_model(arguments: argparse.Namespace) -> FusedCausalLM:
    """The fused model of a command that has all of these options."""
    from dlplora.inference.fused_model import FusedCausalLM

    return FusedCausalLM.from_pretrained(
        arguments.pretrained,
        pool=arguments.pool,
        router=arguments.router,
        multitask=arguments.multitask,
        method=arguments.method,
        method_params=dict(map(parse_parameter, arguments.method_param)),
        artifacts=other_artifacts(arguments),
        few_shot=chosen_training_items(arguments),
        device=arguments.device,
        dtype=arguments.dtype or "auto",
    )
