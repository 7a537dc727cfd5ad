"""``dlplora new-method``: write the three files of a new method, which run as they are."""

from __future__ import annotations

import argparse
import keyword
import re
import sys
from pathlib import Path
from typing import Any

from dlplora.atomic import write_together
from dlplora.config import PACKAGE_ROOT
from dlplora.errors import ConfigError, MethodError

METHOD = '''"""{title}. Shapes: B rows, E experts.

Source: paper, section, equation; upstream repository@commit. Deviations: none yet.

Replace the rule below, which gives every prompt all adapters with equal weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dlplora.methods.base import FusionMethod, Metadata
from dlplora.types import PromptBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class {cls}Config:
    """Settings of the method; an unknown key in a YAML file is an error."""

    scale: float = 1.0
    """Sum of the routing weights of a prompt."""


class {cls}(FusionMethod):
    """{title}."""

    name = "{name}"
    metadata = Metadata(title="{title}", granularity="prompt", weight_sum="any")
    Config = {cls}Config

    def route(self, prompts: PromptBatch) -> Tensor:
        """Routing weights (B, E), float32, from the prompts alone."""
        num_experts = len(self.expert_names)
        return torch.full((len(prompts), num_experts), self.config.scale / num_experts, device=prompts.input_ids.device)
'''
PRESET = """# {title}: what this preset is, and where its values come from.
method: {name}
params:
  scale: 1.0
"""
TEST = '''"""{title} against numbers worked out by hand, and the conformance checklist."""

from __future__ import annotations

import torch

from dlplora.testing import conformance
from dlplora.types import PromptBatch
from {module} import {cls}, {cls}Config


def test_weights_by_hand() -> None:
    method = {cls}({cls}Config(scale=0.5))
    method.expert_names = ("a", "b")
    ids = torch.ones(3, 4, dtype=torch.long)
    weights = method.route(PromptBatch(ids, ids, ("x", "y", "z")))
    assert weights.tolist() == [[0.25, 0.25]] * 3


def test_conformance() -> None:
    conformance.check({cls})
'''
ENTRY_POINT = """[project.entry-points."dlplora.methods"]
{name} = "{package}.{name}:{cls}"
"""


def add_new_method(commands: Any) -> argparse.ArgumentParser:
    """Declare ``new-method``; returns its parser."""
    parser: argparse.ArgumentParser = commands.add_parser("new-method", help="write the files of a new method: class, preset, test")
    parser.add_argument("name", help="name of the method, a Python identifier in lower case")
    parser.add_argument("--dir", metavar="DIR", help="folder of your own package (default, in a clone: its baselines, configs and tests)")
    return parser


def files_of(name: str, folder: Path | None) -> dict[Path, str]:
    """Path -> content of the new files.

    Args:
        name: Name of the method.
        folder: A package of one's own; None is the clone.

    Raises:
        ConfigError: If no folder is given outside a clone, or the name is not an identifier.
        MethodError: If a method or preset of that name exists.
    """
    from dlplora.config import list_configs
    from dlplora.methods.registry import available_methods

    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise ConfigError(f"'{name}' cannot name a method: use lower-case letters, digits and underscores.")
    if name in available_methods() or name in list_configs("method"):
        raise MethodError(f"a method or preset '{name}' exists already; choose another name.")
    words = {"name": name, "cls": "".join(part.capitalize() for part in name.split("_")), "title": name.replace("_", " ").capitalize()}
    clone = PACKAGE_ROOT.parent
    if folder is not None:
        return {
            folder / f"{name}.py": METHOD.format(**words),
            folder / f"{name}.yaml": PRESET.format(**words),
            folder / f"test_{name}.py": TEST.format(module=name, **words),
        }
    if not (clone / "baselines").is_dir():
        raise ConfigError("dlplora is not installed from a clone; pass --dir with a folder of your own package.")
    if clone.resolve() not in (here := Path.cwd().resolve(), *here.parents):
        raise ConfigError(f"pass --dir with a folder of your own package, or run this in the clone ({clone}) to add to its baselines.")
    return {
        clone / "baselines" / f"{name}.py": METHOD.format(**words),
        clone / "configs" / "method" / f"{name}.yaml": PRESET.format(**words),
        clone / "tests" / "equivalence" / f"test_{name}.py": TEST.format(module=f"dlplora.baselines.{name}", **words),
    }


def run_new_method(arguments: argparse.Namespace) -> int:
    """Write the files, none of them over another, and say what comes next."""
    folder = None if arguments.dir is None else Path(arguments.dir)
    files = files_of(arguments.name, folder)
    for path in files:
        if path.exists():
            raise ConfigError(f"{path} exists already; nothing was written.")
    write_together(files)
    print(*files, sep="\n")
    if folder is not None:
        cls = "".join(part.capitalize() for part in arguments.name.split("_"))
        entry = ENTRY_POINT.format(name=arguments.name, cls=cls, package=folder.resolve().name)
        print(f"\nAdd this to your pyproject.toml and install the package (pip install -e .):\n\n{entry}", file=sys.stderr)
    else:
        print("\nNext: write the rule, the test, and a row in baselines/README.md (docs/adding_a_baseline.md).", file=sys.stderr)
    print(f"Test: python -m pytest {path}", file=sys.stderr)
    return 0
