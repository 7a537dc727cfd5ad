"""``dlplora pool``: list, check, inspect and add adapters."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlplora.cli.information import markdown

if TYPE_CHECKING:
    from dlplora.modules.lora_bank import AdapterBank


def _show(rows: Sequence[Mapping[str, Any]], style: str) -> None:
    if style == "json":
        print(json.dumps(list(rows), indent=2))
    elif style == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(rows[0])
        writer.writerows([_plain(value) for value in row.values()] for row in rows)
    else:
        print(markdown(rows))


def _plain(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else value


def _note(text: str) -> None:
    print(text, file=sys.stderr)


def size(num_bytes: int | None) -> str | None:
    """Bytes for people: kB, MB or GB."""
    if num_bytes is None:
        return None
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes / 1e3:.0f} kB"


def counted(number: int, noun: str) -> str:
    """A number and its noun."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def run_pool_list(arguments: argparse.Namespace) -> int:
    """Adapters of a pool, in its order; without a pool, the pools below ``DLPLORA_POOLS``."""
    from dlplora.adapters.headers import read_header
    from dlplora.adapters.pool import load_pool

    if arguments.folder is None:
        return _list_pools(arguments.format)
    pool = load_pool(arguments.folder)
    rows = []
    for name in pool.names:
        header, row = read_header(pool.folders[name], name), pool.rows.get(name, {})
        revision = row.get("revision")
        rows.append(
            {
                "adapter": name,
                "rank": header.config["r"],
                "alpha": header.config["lora_alpha"],
                "rsLoRA": bool(header.config.get("use_rslora")),
                "targets": header.targets,
                "base": header.config.get("base_model_name_or_path"),
                "source": row.get("source"),
                "revision": revision if arguments.format == "json" or not revision else revision[:12],
                "sha256": pool.sha256[name] if arguments.format == "json" else pool.sha256[name][:12],
            }
        )
    _show(rows, arguments.format)
    return 0


def _list_pools(style: str) -> int:
    from dlplora.adapters.hub import pools_root

    pools = known_pools()
    if pools:
        _show([{"pool": name, "adapters": count} for name, count in pools.items()], style)
    _note(f"{counted(len(pools), 'pool')} in {pools_root()} (DLPLORA_POOLS)")
    return 0


def known_pools() -> dict[str, int | None]:
    """Pools that can be called by name, and how many adapters each lists; None where the manifest cannot be read."""
    from dlplora.adapters.hub import pools_root
    from dlplora.adapters.pool import MANIFEST_NAME
    from dlplora.documents import read_json
    from dlplora.errors import PoolError

    found: dict[str, int | None] = {}
    for path in sorted(pools_root().glob(f"*/{MANIFEST_NAME}")):
        try:
            found[path.parent.name] = len(read_json(path, error=PoolError)["adapters"])
        except (PoolError, KeyError, TypeError):
            found[path.parent.name] = None
    return found


def run_pool_check(arguments: argparse.Namespace) -> int:
    """Read every adapter; exit 2 if one cannot be fused, after one line for each that cannot, and their number if there are several."""
    from dlplora.adapters.add import check_one_base
    from dlplora.adapters.inspect import inspect_adapter
    from dlplora.adapters.pool import load_pool, unlisted
    from dlplora.errors import DLPLoRAError, one_line
    from dlplora.modules.lora_bank import AdapterBank

    pool = load_pool(arguments.folder)
    for name in unlisted(pool):
        why = "is not listed in pool.json" if pool.rows else "does not lie directly in the pool"
        _note(f"note: {name} {why} and takes no part; add it with `dlplora pool add {arguments.folder} {pool.path / name}`")
    failed = 0
    for name in pool.names:
        try:
            AdapterBank.from_peft({name: pool.folders[name]})
        except DLPLoRAError as error:
            failed += 1
            _note(f"dlplora: error: {one_line(error)}")
    if failed > 1:
        _note(f"{failed} of {len(pool.names)} adapters cannot be fused")
    if failed:
        return 2
    check_one_base(pool)
    for name in pool.names:
        for hint in inspect_adapter(name, pool.folders[name]).hints:
            _note(f"note: {name}: {hint}")
    bank, where = _checked_bank(arguments)
    fits = ""
    if arguments.pretrained:
        from dlplora.inference.backbone_check import check_pool_fits

        fits = f"; they fit {check_pool_fits(pool, bank, arguments.pretrained, arguments.revision)}"
    print(
        f"{counted(bank.num_experts, 'adapter')} fit together: {len(bank.modules)} modules, largest rank {bank.rank}, "
        f"{size(bank.nbytes)} in {where}{fits}"
    )
    return 0


def _checked_bank(arguments: argparse.Namespace) -> tuple[AdapterBank, str]:
    """The bank as it would be loaded, and its dtype and device in words; float32 on the CPU unless others are asked for."""
    from dlplora.inference.backbones import resolve_backbone
    from dlplora.inference.devices import choose_device, dtype_name, resolve_dtype
    from dlplora.modules.lora_bank import AdapterBank

    device = choose_device(arguments.device or "cpu")
    source = resolve_backbone(arguments.pretrained) if arguments.pretrained else None
    dtype = resolve_dtype(arguments.dtype or "float32", device, source)
    bank = AdapterBank.from_pool(arguments.folder, dtype=dtype, device=device)
    return bank, dtype_name(dtype) + ("" if device.type == "cpu" else f" on {device}")


def run_pool_inspect(arguments: argparse.Namespace) -> int:
    """A matrix of every adapter below a folder, with a hint for each problem; always exits 0 if there is something to show."""
    from dlplora.adapters.hub import find_pool
    from dlplora.adapters.inspect import inspect_folder

    seen = inspect_folder(find_pool(arguments.folder))
    plain = arguments.format == "md"
    rows = [
        {
            "adapter": finding.name,
            "usable": finding.usable,
            "rank": finding.rank,
            "alpha": finding.alpha,
            "rsLoRA": finding.use_rslora,
            "DoRA": finding.use_dora,
            "targets": finding.targets,
            "modules": finding.num_modules,
            "base": finding.base,
            "B all zero": finding.zero_b,
            "dtype": finding.dtype,
            "file" if plain else "file_bytes": size(finding.num_bytes) if plain else finding.num_bytes,
            "in the bank" if plain else "bank_bytes": size(finding.bank_bytes) if plain else finding.bank_bytes,
            "hints": "; ".join(finding.hints),
        }
        for finding in seen.findings
    ]
    _show(rows, arguments.format)
    together = f"{seen.bank_adapters} of {len(rows)} adapters fit into one bank"
    if seen.bank_adapters:
        together += (
            f": {size(seen.bank_bytes)} in float32, {size(seen.bank_bytes // 2)} in a 16-bit type, "
            f"{100 * seen.padding_bytes / seen.bank_bytes:.0f} % of it padding to the largest rank"
        )
    _note(together)
    return 0


def run_pool_add(arguments: argparse.Namespace) -> int:
    """Add one adapter to a pool."""
    from dlplora.adapters.add import place_adapter
    from dlplora.adapters.inspect import inspect_adapter

    added = place_adapter(
        arguments.folder,
        arguments.adapter,
        arguments.name,
        revision=arguments.revision,
        allow_pickle=arguments.allow_pickle,
        offline=arguments.offline,
        allow_other_base=arguments.allow_other_base,
        description=arguments.description,
    )
    pool, row = added.pool, added.pool.rows[added.name]
    for hint in inspect_adapter(added.name, pool.folders[added.name]).hints:
        _note(f"note: {hint}")
    commit = f" at commit {row['revision'][:12]}" if row.get("revision") else ""
    note = f", converted from {row['converted_from']}" if "converted_from" in row else ""
    done = "already there, with the same files:" if added.was_there else "added"
    print(f"{done} {added.name}: rank {row['rank']}, {', '.join(row['target_modules'])}, from {row['source']}{commit}{note}")
    print(f"{Path(pool.path)} now has {counted(len(pool.names), 'adapter')}")
    return 0


def add_device_options(parser: Any, device: str = "the best of this machine", dtype: str = "auto") -> None:
    """``--device`` and ``--dtype``, with what their defaults are in words."""
    parser.add_argument("--device", metavar="NAME", help=f"auto, cpu, cuda, cuda:N or mps (default: {device})")
    parser.add_argument(
        "--dtype", metavar="NAME", help=f"float32, float16, bfloat16, or auto: the checkpoint's if it is fast here (default: {dtype})"
    )


def add_parser(commands: Any, lazy: Any) -> None:
    """Declare ``dlplora pool``; ``lazy(module, function)`` makes the command that imports when it runs."""
    pool = commands.add_parser("pool", help="list, check and inspect adapters, or add one to a pool")
    inner = pool.add_subparsers(dest="action", required=True, metavar="{list,check,inspect,add}")
    where = "folder of the pool, or the name of one below DLPLORA_POOLS"
    formats = {"choices": ["md", "json", "csv"], "default": "md", "help": "Markdown table, JSON or CSV (default: md)"}

    parser = inner.add_parser("list", help="list names, ranks, targets and sources of a pool; without POOL, list the named pools")
    parser.add_argument("folder", nargs="?", metavar="POOL", help=where)
    parser.add_argument("--format", **formats)
    parser.set_defaults(run=lazy("pool", "run_pool_list"))

    parser = inner.add_parser("check", help="read every adapter and report what does not fit")
    parser.add_argument("folder", metavar="POOL", help=where)
    parser.add_argument("--pretrained", metavar="MODEL", help="also compare with this base model, by its config.json")
    parser.add_argument("--revision", help="revision of the base model on the hub")
    add_device_options(parser, "cpu", "float32")
    parser.set_defaults(run=lazy("pool", "run_pool_check"))

    parser = inner.add_parser("inspect", help="list all adapters below a folder, from their headers, with a hint for each problem")
    parser.add_argument("folder", metavar="DIR", help="folder with adapter folders, at most three levels deep")
    parser.add_argument("--format", **formats)
    parser.set_defaults(run=lazy("pool", "run_pool_inspect"))

    parser = inner.add_parser("add", help="check a PEFT LoRA adapter, copy it into the pool and list it in pool.json")
    parser.add_argument("folder", metavar="POOL", help=f"{where}; created if it does not exist")
    parser.add_argument("adapter", metavar="PATH_OR_HUB_ID", help="PEFT folder, ORG/NAME, or hf://ORG/NAME[/FOLDER][@REVISION]")
    parser.add_argument("--name", help="name of the expert, which is the name of its task (default: the folder's)")
    parser.add_argument("--description", help="what the adapter is for, in a few words; methods may read it")
    parser.add_argument("--revision", help="branch, tag or commit on the hub; the commit is written into pool.json")
    parser.add_argument("--offline", action="store_true", help="look in the hub cache only, as with HF_HUB_OFFLINE=1")
    parser.add_argument("--allow-pickle", action="store_true", help="convert adapter_model.bin, read with weights_only=True")
    parser.add_argument("--allow-other-base", action="store_true", help="accept an adapter that names another base model, if its sizes fit")
    parser.set_defaults(run=lazy("pool", "run_pool_add"))
