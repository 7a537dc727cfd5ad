"""Malformed inputs by hand: command lines, links, permissions, encodings, sizes, and files that are something else than they seem."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

GENERATE = ("generate", "the cat sees", "--raw", "--max-new-tokens", "2")
TINY = ("--pretrained", "model", "--pool", "pool", "--method", "avg_delta")
PICKLE = b"\x80\x04\x95\x1f\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x0etouch EXECUTED\x94\x85\x94R\x94."
"""Would run ``touch EXECUTED``."""
GGUF = (*GENERATE, "--pretrained", "m.gguf", "--pool", "pool", "--method", "avg_delta")
EVAL = ("eval", "--protocol", "protocol.yaml", "--pool", "pool", "--method", "avg_delta", "--limit", "1", "--out", "out")


@dataclass(frozen=True)
class Case:
    """A command that must be refused: what it is, its arguments, and how the workplace is spoilt before."""

    name: str
    command: tuple[str, ...]
    spoil: Callable[[Path], object] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    codes: tuple[int, ...] = (2,)


def _replace(path: str, content: bytes | str) -> Callable[[Path], object]:
    raw = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content

    def spoil(root: Path) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(raw)

    return spoil


def _edit(path: str, **values: object) -> Callable[[Path], object]:
    def spoil(root: Path) -> None:
        content = json.loads((root / path).read_text())
        (root / path).write_text(json.dumps({**content, **values}))

    return spoil


def _link(path: str, target: str) -> Callable[[Path], object]:
    def spoil(root: Path) -> None:
        (root / path).unlink()
        os.symlink(target, root / path)

    return spoil


def _folder_for_file(path: str) -> Callable[[Path], object]:
    def spoil(root: Path) -> None:
        (root / path).unlink()
        (root / path).mkdir()

    return spoil


def _fifo(path: str) -> Callable[[Path], object]:
    def spoil(root: Path) -> None:
        (root / path).unlink()
        os.mkfifo(root / path)

    return spoil


def _sparse(path: str, size: int) -> Callable[[Path], object]:
    def spoil(root: Path) -> None:
        with (root / path).open("r+b") as stream:
            stream.truncate(size)

    return spoil


def _options() -> list[Case]:
    """Values of options."""
    bad_numbers = (
        "",
        " ",
        "x",
        "1.5",
        "1e3",
        "-1",
        "0",
        "9" * 30,
        "nan",
        "inf",
        "٣",
        "１",
        "0x10",
        "--",
        "None",
        "1,2",
        "\x00"[:0] + "1\n2",
    )
    cases = [
        Case(f"generate --max-new-tokens {one!r}", ("generate", "x", "--max-new-tokens", one))
        for one in bad_numbers
        if one not in {"٣", "１", "1\n2"}
    ]
    cases += [
        Case(f"eval --limit {one!r}", (*EVAL[:-4], "--limit", one, "--out", "out")) for one in bad_numbers if one not in {"٣", "１", "1\n2"}
    ]
    cases += [Case(f"eval --seed {one!r}", (*EVAL, "--seed", one)) for one in ("x", "-1", "9" * 30, "1.0", "")]
    cases += [
        Case(f"reproduce --seeds {one!r}", ("reproduce", "nano", "--dry-run", "--seeds", one))
        for one in ("", ",", "0,0", "a", "-1", "0;1", "9" * 30)
    ]
    cases += [Case(f"reproduce --limit {one!r}", ("reproduce", "nano", "--dry-run", "--limit", one)) for one in ("0", "-3", "x")]
    cases += [
        Case(f"reproduce --methods {one!r}", ("reproduce", "nano", "--dry-run", "--methods", one))
        for one in ("nope", ",", "dlp,,x", "DLP", "dlp;base", "../dlp")
    ]
    texts = (
        "",
        " ",
        "\t",
        "nope",
        "../..",
        "/dev/null",
        "/dev/zero",
        "a\nb",
        "ünïcode",
        "a" * 5_000,
        "$(touch EXECUTED)",
        "`touch EXECUTED`",
        "~nobody",
        "\udcff",
        "..",
        "/",
        "hf://",
        "hf://a/b@",
        "-x",
    )
    for one in texts:
        shown = ascii(one[:20])
        attached = "=" if one.startswith("-") else None

        def given(option: str, one: str = one, attached: str | None = attached) -> tuple[str, ...]:
            return (f"{option}={one}",) if attached else (option, one)

        cases += [
            Case(f"generate --pretrained {shown}", (*GENERATE, *given("--pretrained"), "--pool", "pool", "--method", "avg_delta")),
            Case(f"generate --pool {shown}", (*GENERATE, "--pretrained", "model", *given("--pool"), "--method", "avg_delta")),
            Case(f"generate --router {shown}", (*GENERATE, *given("--router"))),
            Case(f"generate --method {shown}", (*GENERATE, *given("--method"))),
            Case(f"generate --trained {shown}", (*GENERATE, "--method", "mole", *given("--trained"))),
            Case(f"generate --multitask {shown}", (*GENERATE, "--method", "multitask", *given("--multitask"))),
            Case(f"generate --device {shown}", (*GENERATE, *given("--device"))),
            Case(f"generate --dtype {shown}", (*GENERATE, *given("--dtype"))),
            Case(f"generate --task {shown}", (*GENERATE, "--method", "oracle", *given("--task"))),
            Case(f"eval --protocol {shown}", ("eval", *given("--protocol"))),
            Case(f"eval --suite {shown}", ("eval", *given("--suite"), "--limit", "1", "--out", "out")),
            Case(f"eval --tasks {shown}", (*EVAL, *given("--tasks"))),
            Case(f"eval --method {shown}", ("eval", *given("--method"), "--limit", "1", "--out", "out")),
            Case(f"eval --data-root {shown}", ("eval", "--suite", "local:alpha", *given("--data-root"), "--out", "out")),
            Case(f"eval --method-param {shown}", ("eval", *given("--method-param"), "--dry-run")),
            Case(f"eval --method-param p={shown}", ("eval", f"--method-param=p={one}", "--dry-run")),
            Case(f"tasks --suite local:{shown}", ("tasks", "--suite", f"local:{one}", "--data-root", "rows")),
            Case(f"pool list {shown}", ("pool", "list", "--", one)),
            Case(f"pool check {shown}", ("pool", "check", "--", one)),
            Case(f"pool inspect {shown}", ("pool", "inspect", "--", one if one not in {"..", "/", "../.."} else "nowhere")),
            Case(f"pool add {shown}", ("pool", "add", "--", "pool", one)),
            Case(f"pool add --name {shown}", ("pool", "add", "pool", "delta", f"--name={one}")),
            Case(f"report list --out {shown}", ("report", "build", *given("--out"))),
            Case(f"report --suite {shown}", ("report", "validate", "--out", "results", *given("--suite"))),
            Case(f"fit {shown}", ("fit", f"--config={one}")),
            Case(f"bench --config {shown}", ("bench", "latency", *given("--config"))),
            Case(f"bench --shape {shown}", ("bench", "latency", *given("--shape"), "--out", "out")),
            Case(f"bench --systems {shown}", ("bench", "latency", "--shape", "tiny", *given("--systems"), "--out", "out")),
            Case(f"bench --backends {shown}", ("bench", "latency", "--shape", "tiny", *given("--backends"), "--out", "out")),
            Case(f"counters --methods {shown}", ("bench", "counters", "--shape", "tiny", *given("--methods"))),
            Case(f"counters --shape {shown}", ("bench", "counters", *given("--shape"))),
            Case(f"new-method {shown}", ("new-method", "--dir", "new", "--", one)),
            Case(f"serve --chat-template {shown}", ("serve", "--port", "0", *given("--chat-template"))),
            Case(f"serve --host {shown}", ("serve", "--port", "0", *given("--host"))),
            Case(f"serve --method {shown}", ("serve", "--port", "0", *given("--method"))),
        ]
    sound = {"pool add --name 'nope'", "pool add --name '\\xfcn\\xefcode'", "new-method 'nope'"}
    cases = [case for case in cases if case.name not in sound]
    for option in ("--max-batch", "--max-queue", "--max-model-len", "--default-max-tokens", "--min-confidence", "--port"):
        cases += [
            Case(f"serve {option} {one!r}", ("serve", "--port", "0", f"{option}={one}"))
            for one in ("-1", "x", "", "nan", "9" * 30, "-inf", "1e400")
            if one[0:1] != "9" or not option.endswith(("-len", "-tokens"))  # at most the model's
        ]
    for option in ("--experts", "--kept", "--batch", "--prompt", "--reroute-every", "--new-tokens", "--repeats", "--warmup"):
        cases += [
            Case(
                f"bench {option} {one!r}",
                ("bench", "latency", "--shape", "tiny", "--systems", "base", f"{option}={one}", "--out", "out"),
            )
            for one in ("-1", "x", "", "1.5", "1,,x", "9" * 30)
        ]
    cases += [
        Case("no command", ()),
        Case("unknown command", ("generat", "x")),
        Case("unknown option", ("generate", "x", "--max-tokens", "2")),
        Case("empty prompt", ("generate", "")),
        Case("prompt that is not UTF-8", ("generate", "\udcff\udcfe")),
        Case("huge prompt with huge answer", ("generate", "the cat " * 50_000, "--max-new-tokens", "100000")),
        Case("chat without a template", (*GENERATE, *TINY, "--chat")),
        Case("fit without a configuration", ("fit",)),
        Case("fit with half an option", ("fit", "--config")),
        Case("fit of a reference", ("fit", "--config", "fit_expert.yaml", "--model.init_args.export_folder=${oc.env:DLPLORA_SECRET}")),
        Case("fit of a seed", ("fit", "--config", "fit_expert.yaml", "--seed_everything", "9" * 25)),
        Case("fit of a negative seed", ("fit", "--config", "fit_expert.yaml", "--seed_everything=-1")),
        Case("fit of another class", ("fit", "--config", "fit_expert.yaml", "--model.class_path=os.system")),
        Case("fit of a class of ours", ("fit", "--config", "fit_expert.yaml", "--model.class_path=dlplora.cli.main.main")),
        Case("fit of no epochs", ("fit", "--config", "fit_expert.yaml", "--trainer.max_epochs=-5")),
        Case("fit with a checkpoint that is not there", ("fit", "--config", "fit_expert.yaml", "--ckpt_path", "nowhere.ckpt")),
        Case("test without a checkpoint", ("test", "--config", "fit_router.yaml")),
        Case("reproduce nano with a backbone", ("reproduce", "nano", "--backbone", "model", "--dry-run")),
        Case("reproduce paper on a broken profile", ("reproduce", "paper", "--backbone", "nowhere/at/all", "--dry-run")),
        Case("eval of two methods with one parameter", ("eval", "--method", "dlp,base", "--method-param", "p=0.1", "--dry-run")),
        Case("new method twice", ("new-method", "dlp", "--dir", "new")),
        Case("new method in a file", ("new-method", "mine", "--dir", "protocol.yaml")),
        Case("serve to everybody", ("serve", "--port", "0", "--host", "0.0.0.0")),
        Case("serve with a template that is binary", ("serve", "--port", "0", "--chat-template", "model/model.safetensors")),
    ]
    return cases


def _files() -> list[Case]:
    """Files that are something else."""
    documents: dict[str, tuple[str, ...]] = {
        "pool/pool.json": ("pool", "list", "pool"),
        "pool/alpha/adapter_config.json": ("pool", "check", "pool"),
        "pool/alpha/adapter_model.safetensors": ("pool", "check", "pool"),
        "delta/adapter_config.json": ("pool", "add", "pool", "delta"),
        "delta/adapter_model.safetensors": ("pool", "add", "pool", "delta"),
        "model/config.json": (*GENERATE, *TINY),
        "model/model.safetensors": (*GENERATE, *TINY),
        "model/tokenizer.json": (*GENERATE, *TINY),
        "router/router.json": (*GENERATE, "--router", "router"),
        "router/router.safetensors": (*GENERATE, "--router", "router"),
        "mole/method.json": (*GENERATE, "--method", "mole", "--trained", "mole"),
        "mole/method.safetensors": (*GENERATE, "--method", "mole", "--trained", "mole"),
        "protocol.yaml": ("eval", "--protocol", "protocol.yaml", "--dry-run"),
        "method.yaml": (*GENERATE, "--method", "method.yaml"),
        "bench.yaml": ("bench", "latency", "--config", "bench.yaml", "--out", "out"),
        "fit_expert.yaml": ("fit", "--config", "fit_expert.yaml"),
        "rows/alpha/test.jsonl": EVAL,
        "rows/alpha/train.jsonl": ("fit", "--config", "fit_expert.yaml"),
    }
    cases = []
    for path, command in documents.items():
        spoilt: dict[str, Callable[[Path], object]] = {
            "empty": _replace(path, b""),
            "a folder": _folder_for_file(path),
            "a link to nowhere": _link(path, "nowhere"),
            "a link to itself": _link(path, Path(path).name),
            "a device": _link(path, "/dev/zero"),
            "a pipe": _fifo(path),
            "UTF-16": lambda root, path=path: (root / path).write_bytes((root / path).read_bytes().decode("latin-1").encode("utf-16")),
            "a pickle": _replace(path, PICKLE),
            "a zip": _replace(path, b"PK\x03\x04" + b"\0" * 100),
            "huge": _sparse(path, 200_000_000 if path.endswith("safetensors") else 3_000_000_000),
        }
        cases += [Case(f"{path} is {what}", command, spoil) for what, spoil in spoilt.items()]
    gguf = struct.pack("<4sIQQ", b"GGUF", 3, 2**60, 2**60)
    key = struct.pack("<Q", 20) + b"general.architecture" + struct.pack("<I", 8) + struct.pack("<Q", 2**62) + b"llama"
    cases += [
        Case("GGUF without content", GGUF, _replace("m.gguf", b"")),
        Case("GGUF of another kind", GGUF, _replace("m.gguf", b"x" * 99)),
        Case("GGUF of huge counts", GGUF, _replace("m.gguf", gguf)),
        Case("GGUF of a huge text", GGUF, _replace("m.gguf", gguf + key)),
        Case("GGUF that is a link", GGUF, lambda root: os.symlink("/dev/zero", root / "m.gguf")),
        Case(
            "a checkpoint that is a pickle", ("fit", "--config", "fit_expert.yaml", "--ckpt_path", "bad.ckpt"), _replace("bad.ckpt", PICKLE)
        ),
        Case("a checkpoint that is empty", ("fit", "--config", "fit_expert.yaml", "--ckpt_path", "bad.ckpt"), _replace("bad.ckpt", b"")),
        Case(
            "a template that calls",
            ("serve", "--port", "0", "--chat-template", "t.jinja"),
            _replace("t.jinja", "\xff{{ ''.__class__.__mro__ }}".encode("latin-1")),
        ),
        Case(
            "adapter outside of the pool",
            ("pool", "check", "pool"),
            _edit("pool/pool.json", adapters=[{"name": "alpha", "path": "../delta", "sha256": "0" * 64}]),
        ),
        Case("DLPLORA_DATA is a file", ("eval", "--suite", "local:all", "--out", "out"), None, {"DLPLORA_DATA": "protocol.yaml"}),
        Case("DLPLORA_POOLS is a file", ("pool", "list", "nano"), None, {"DLPLORA_POOLS": "protocol.yaml"}),
        Case("PL_GLOBAL_SEED is text", ("fit", "--config", "fit_expert.yaml", "--seed_everything=null"), None, {"PL_GLOBAL_SEED": "x"}),
        Case("output is a file", (*EVAL[:-1], "protocol.yaml")),
        Case("output is below a file", (*EVAL[:-1], "protocol.yaml/out")),
        Case("output is /proc", (*EVAL[:-1], "/proc/out")),
        Case("export is a file", ("fit", "--config", "fit_expert.yaml", "--model.init_args.export_folder", "protocol.yaml")),
        Case("log folder is a file", ("fit", "--config", "fit_expert.yaml", "--trainer.default_root_dir", "protocol.yaml")),
        Case("bench output is a folder that is a file", ("bench", "latency", "--config", "bench.yaml", "--out", "protocol.yaml")),
        Case("bench output below a file", ("bench", "latency", "--config", "bench.yaml", "--out", "protocol.yaml/x.json")),
        Case("export of tasks into a file", ("tasks", "--suite", "local:all", "--data-root", "rows", "--export", "protocol.yaml")),
        Case("page into a folder", ("report", "html", "--out", "results", "--page", "pool")),
        Case("accept without results", ("report", "accept", "--reason", "x", "--out", "nowhere")),
        Case("check without results", ("report", "check", "--out", "nowhere")),
        Case(
            "counters without a golden file", ("bench", "counters", "--shape", "tiny", "--methods", "base", "--check", "--out", "nowhere")
        ),
    ]
    return cases


CASES: tuple[Case, ...] = (*_options(), *_files())
