"""``dlplora scope``: choose, on validation prompts, the router score below which a prompt is out of scope."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any


def add_scope(commands: Any) -> argparse.ArgumentParser:
    """Declare ``scope``; returns its parser."""
    text = "choose a router's out-of-scope threshold on validation prompts and write it beside the router"
    parser: argparse.ArgumentParser = commands.add_parser("scope", help=text)
    parser.add_argument("--router", metavar="DIR", required=True, help="folder of a trained router; scope.json is written there")
    parser.add_argument("--pretrained", metavar="MODEL", help="base model of the router (default: the embedded nano model)")
    parser.add_argument("--suite", default="nano", help="suite with the router's tasks (default: nano)")
    parser.add_argument("--out-of-scope", action="append", default=[], metavar="SUITE", help="suite of other tasks; repeat for several")
    parser.add_argument("--data-root", metavar="DIR", help="rows of local tasks (or DLPLORA_DATA)")
    parser.add_argument(
        "--score",
        choices=["max_probability", "energy"],
        default="max_probability",
        help="router score to compare with the threshold (default: max_probability)",
    )
    parser.add_argument(
        "--criterion",
        choices=["keep", "balanced_accuracy"],
        default="keep",
        help="keep: the largest threshold that keeps --keep of the in-scope prompts (default); balanced_accuracy needs --out-of-scope",
    )
    parser.add_argument("--keep", type=float, default=0.95, metavar="SHARE", help="share of in-scope prompts to keep (default: 0.95)")
    parser.add_argument("--limit", type=int, default=100, metavar="N", help="validation prompts per task (default: 100)")
    parser.add_argument("--dry-run", action="store_true", help="print the threshold and write nothing")
    return parser


def run_scope(arguments: argparse.Namespace) -> int:
    """Choose, print, and write."""
    from dlplora.evaluation.scope_threshold import ScopeCalibration
    from dlplora.modules.scope import write_scope

    calibration = ScopeCalibration(arguments.router, arguments.pretrained, data_root=arguments.data_root, limit=arguments.limit)
    scope = calibration.choose(
        arguments.suite,
        arguments.out_of_scope,
        score=arguments.score,
        criterion=arguments.criterion,
        keep=arguments.keep,
    )
    if not arguments.dry_run:
        write_scope(arguments.router, scope)
    print(json.dumps(asdict(scope), indent=2))
    return 0
