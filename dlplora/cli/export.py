"""``dlplora export``: write weighted adapters, or the routing of a prompt, for other software."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlplora.cli.model_options import FOR_EXAMPLES, add_method_options
from dlplora.errors import ConfigError

if TYPE_CHECKING:
    from dlplora.adapters.pool import Pool
    from dlplora.export.fused_adapter import FusedAdapter


def add_export(commands: Any) -> argparse.ArgumentParser:
    """Declare ``export``; returns its parser."""
    text = "write weighted adapters as one PEFT adapter, a merged checkpoint, or GGUF LoRA files"
    parser: argparse.ArgumentParser = commands.add_parser("export", help=text)
    kinds = "peft: one PEFT adapter; merged: a checkpoint with the adapters added to the weights; gguf: LoRA files for llama.cpp"
    parser.add_argument("kind", choices=["peft", "merged", "gguf"], help=kinds)
    parser.add_argument("target", metavar="OUT", help="new folder; for gguf a FILE.gguf, or with --each a folder")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--weight", action="append", metavar="NAME=W", help="an adapter and its weight; repeat for several")
    what.add_argument("--prompt", metavar="TEXT", help="the weights that --method decides for this prompt")
    what.add_argument("--each", action="store_true", help="export every adapter of the pool separately, as OUT/NAME (peft, gguf)")
    parser.add_argument("--method", default="dlp", help="method that routes --prompt (default: dlp)")
    add_method_options(parser, FOR_EXAMPLES)
    parser.add_argument("--base-name", metavar="NAME", help="peft: the base model that adapter_config.json names (default: the adapters')")
    parser.add_argument("--save-dtype", default="float32", metavar="NAME", help="dtype of the written files (default: float32)")
    parser.add_argument("--force", action="store_true", help="replace an existing export")
    return parser


def parse_weight(text: str) -> tuple[str, float]:
    """``NAME=W``; the name may contain '='.

    Raises:
        ConfigError: If it has another form.
    """
    name, equals, value = text.rpartition("=")
    try:
        if not (equals and name):
            raise ValueError(text)
        return name, float(value)
    except ValueError as error:
        raise ConfigError(f"--weight expects NAME=NUMBER, got '{text}'.") from error


def _weights(texts: list[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, weight in map(parse_weight, texts):
        if name in found:
            raise ConfigError(f"--weight names adapter '{name}' twice.")
        found[name] = weight
    return found


def _pool(arguments: argparse.Namespace) -> Pool:
    from dlplora.adapters.pool import load_pool
    from dlplora.inference.backbones import nano_asset

    if arguments.pool is None and arguments.pretrained is not None:
        raise ConfigError("--pool is missing: give the folder of the adapters.")
    return load_pool(arguments.pool or nano_asset("pool"))


def _routed(arguments: argparse.Namespace, pool: Pool) -> FusedAdapter:
    from dlplora.cli.generate import prompt_text
    from dlplora.cli.model_options import open_model
    from dlplora.export.fused_adapter import FusedAdapter

    arguments.chat = arguments.raw = False
    fused = open_model(arguments)
    return FusedAdapter.from_prompt(fused, prompt_text(arguments), pool=pool)


def run_export(arguments: argparse.Namespace) -> int:
    """Write the export and say what is in it."""
    from dlplora.cli.terminal import quiet_loading
    from dlplora.export.fused_adapter import FusedAdapter
    from dlplora.export.target import require_dtype

    require_dtype(arguments.save_dtype)
    quiet_loading(arguments.pretrained)
    pool = _pool(arguments)
    if arguments.each:
        adapters = {name: FusedAdapter.from_pool(pool, {name: 1.0}) for name in pool.names}
        written = _write_each(arguments, adapters)
        print(f"wrote {len(adapters)} adapters of {pool.path} to {written}")
        return 0
    if arguments.prompt is not None:
        adapter = _routed(arguments, pool)
    else:
        adapter = FusedAdapter.from_pool(pool, _weights(arguments.weight))
    written = _write(arguments, adapter)
    shown = ", ".join(f"{name} {weight:.4g}" for name, weight in adapter.weights.items())
    print(f"wrote {written}: {shown}; rank {adapter.rank}, {len(adapter.modules)} modules")
    if arguments.prompt is not None:
        print("note: these are the routing weights of the prompt; later sentences would be routed again", file=sys.stderr)
    return 0


def _write(arguments: argparse.Namespace, adapter: FusedAdapter) -> Path:
    options: dict[str, Any] = {"dtype": arguments.save_dtype, "force": arguments.force}
    if arguments.kind == "peft":
        from dlplora.export.peft_folder import export_peft

        return export_peft(adapter, arguments.target, base_model=arguments.base_name, **options)
    if arguments.kind == "merged":
        from dlplora.export.merged_checkpoint import export_merged

        return export_merged(adapter, arguments.target, pretrained=arguments.pretrained, **options)
    from dlplora.export.gguf_file import export_gguf

    return export_gguf(adapter, arguments.target, pretrained=arguments.pretrained, **options)


def _write_each(arguments: argparse.Namespace, adapters: Mapping[str, FusedAdapter]) -> Path:
    options: dict[str, Any] = {"dtype": arguments.save_dtype, "force": arguments.force}
    if arguments.kind == "merged":
        raise ConfigError("--each writes adapters, as peft or gguf; merge one set of weights at a time.")
    if arguments.kind == "peft":
        from dlplora.export.peft_folder import export_peft_pool

        return export_peft_pool(adapters, arguments.target, base_model=arguments.base_name, **options)
    from dlplora.export.gguf_file import export_gguf_pool

    return export_gguf_pool(adapters, arguments.target, pretrained=arguments.pretrained, **options)
