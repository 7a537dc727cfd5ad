"""``dlplora pool add``: what goes in, what is written down, and that a failure changes not a byte."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dlplora.adapters import add as pool_add
from dlplora.adapters.add import LOCK_NAME, add_adapter
from dlplora.adapters.files import file_sha256, read_adapter
from dlplora.adapters.hub import find_adapter, find_pool
from dlplora.adapters.pool import load_pool, pool_hash
from dlplora.cli.main import main
from dlplora.config import ASSETS_ROOT
from dlplora.errors import AdapterError, PoolError, UnsafeFileError

WEIGHTS, CONFIG, PICKLE = "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder with its checksum, empty folders too; but for the pool's lock, which stays."""
    found = (path for path in sorted(folder.rglob("*")) if path.name != LOCK_NAME)
    return {str(path.relative_to(folder)): file_sha256(path) if path.is_file() else "folder" for path in found}


@pytest.fixture
def pool(tiny_pool: Path, tmp_path: Path) -> Path:
    """A pool with two adapters and a manifest."""
    add_adapter(tmp_path / "pool", tiny_pool / "alpha")
    add_adapter(tmp_path / "pool", tiny_pool / "beta")
    return tmp_path / "pool"


@pytest.fixture
def folder(tiny_pool: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_pool / "gamma", tmp_path / "made" / "gamma"))


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def test_what_the_manifest_keeps(pool: Path, folder: Path) -> None:
    edit(folder, base_model_name_or_path="org/base")
    add_adapter(pool, folder, "third")
    manifest = json.loads((pool / "pool.json").read_text())
    assert manifest["format"] == 2
    assert manifest["adapters"][2] == {
        "name": "third",
        "path": "third",
        "source": str(folder),
        "revision": None,
        "sha256": file_sha256(folder / WEIGHTS),
        "config_sha256": file_sha256(folder / CONFIG),
        "base_model_name_or_path": "org/base",
        "rank": 2,
        "alpha": 4.0,
        "use_rslora": True,
        "target_modules": ["q_proj", "v_proj"],
    }
    assert [row["name"] for row in manifest["adapters"]] == ["alpha", "beta", "third"]
    assert manifest["adapters"][0]["source"].endswith("/alpha")  # what was written first is kept
    assert sorted(path.name for path in pool.iterdir()) == [LOCK_NAME, "alpha", "beta", "pool.json", "third"]


def test_an_edited_configuration_is_noticed_and_changes_the_checksum(pool: Path, tiny_pool: Path) -> None:
    before = pool_hash(tiny_pool)
    copy = Path(shutil.copytree(tiny_pool, pool.parent / "copy"))
    assert pool_hash(copy) == before
    edit(copy / "beta", lora_alpha=99)
    assert pool_hash(copy) != before
    edit(pool / "beta", lora_alpha=99)
    with pytest.raises(PoolError, match=r"'beta'.*adapter_config.json.*changed after it was added"):
        load_pool(pool)


def test_pools_of_format_1_are_read_and_keep_their_checksum() -> None:
    pool = ASSETS_ROOT / "nano" / "pool"
    if not pool.is_dir():
        pytest.skip("the embedded nano experts are not there yet")
    assert json.loads((pool / "pool.json").read_text())["format"] == 1
    records = (Path(__file__).parents[2] / "results" / "runs" / "nano").glob("oracle-*-s0.json")
    assert pool_hash(pool) in {json.loads(path.read_text())["pool_hash"] for path in records}


def _bad_base(folder: Path) -> None:
    edit(folder, base_model_name_or_path="org/other-1b")


def _bad_shape(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({key: torch.ones(2, 16) if "lora_A" in key else value for key, value in tensors.items()}, folder / WEIGHTS)


def _truncated(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-7])


def _not_a_number(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    sorted(tensors.items())[0][1][0, 0] = float("nan")
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("spoil", "options", "parts"),
    [
        (_bad_base, [], ["'gamma' was trained on 'org/other-1b'", "'alpha' of pool", "'org/base-1b'", "--allow-other-base"]),
        (_bad_shape, [], ["maps 16 -> 32 at 'model.layers.0.self_attn.q_proj'", "maps 32 -> 32", "org/base-1b"]),
        (_bad_shape, ["--allow-other-base"], ["maps 16 -> 32"]),
        (_truncated, [], ["'gamma'", f"made/gamma/{WEIGHTS}", "damaged or truncated"]),
        (_not_a_number, [], ["'gamma'", "NaN or infinite", f"made/gamma/{WEIGHTS}"]),
        (lambda folder: edit(folder, use_dora=True), [], ["'gamma'", "use_dora", CONFIG]),
        (lambda folder: (folder / CONFIG).unlink(), [], ["'gamma'", f"{CONFIG} is missing"]),
        (lambda folder: (folder / WEIGHTS).unlink(), [], ["'gamma'", f"{WEIGHTS} is missing"]),
        (lambda folder: (folder / WEIGHTS).rename(folder / PICKLE), [], ["pickled weights only", "--allow-pickle"]),
        (lambda folder: (folder / WEIGHTS).rename(folder / PICKLE), ["--allow-pickle"], ["not a plain file of tensors", PICKLE]),
        (lambda folder: None, ["--name", "alpha"], ["already has an adapter 'alpha'", "--name"]),
        (lambda folder: None, ["--name", "../out"], ["cannot name an adapter"]),
        (lambda folder: None, ["--name", ".hidden"], ["cannot name an adapter"]),
        (lambda folder: None, ["--revision", "main"], ["is a local folder", "hf://"]),
    ],
)
def test_a_refusal_leaves_the_pool_as_it_was(
    pool: Path, folder: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], None], options: list[str], parts: list[str]
) -> None:
    for name in ("alpha", "beta"):
        edit(pool / name, base_model_name_or_path="org/base-1b")
    (pool / "pool.json").unlink()
    from dlplora.adapters.pool import write_manifest

    write_manifest(pool, ["alpha", "beta"], None)
    edit(folder, base_model_name_or_path="org/base-1b")
    spoil(folder)
    before = contents(pool.parent)
    assert main(["pool", "add", str(pool), str(folder), *options]) == 2
    text = capsys.readouterr().err.strip()
    assert "\n" not in text
    for part in parts:
        assert part in text
    assert contents(pool.parent) == before
    if "--allow-other-base" not in options and "--name" not in options and "--revision" not in options:
        new = pool.parent / "new" / "pool"
        if spoil not in (_bad_base, _bad_shape):
            assert main(["pool", "add", str(new), str(folder), *options]) == 2
            assert not new.parent.exists()


def test_another_name_of_one_backbone_is_let_in_on_demand(pool: Path, folder: Path) -> None:
    edit(folder, base_model_name_or_path="org/other-1b")
    for name in ("alpha", "beta"):
        edit(pool / name, base_model_name_or_path="org/base-1b")
    (pool / "pool.json").unlink()
    added = add_adapter(pool, folder, allow_other_base=True)
    assert added.rows["gamma"]["other_base_allowed"] is True
    assert pool_add.adapters_for_other_bases(added, "org/base-1b") == {}
    assert pool_add.adapters_for_other_bases(added, "org/third") == {"alpha": "org/base-1b", "beta": "org/base-1b"}
    edit(folder, base_model_name_or_path="org/base-1b")
    assert "delta" in add_adapter(pool, folder, "delta").names  # compared with those of the pool's base model


@pytest.mark.parametrize("step", ["copyfile", "save_rows", "replace"])
def test_a_full_disk_leaves_nothing(
    pool: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], step: str
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(arguments[1] if step == "copyfile" else arguments[0]))

    target = {"copyfile": (pool_add.shutil, "copyfile"), "save_rows": (pool_add, "save_rows"), "replace": (pool_add.os, "replace")}[step]
    before = contents(pool.parent)
    with monkeypatch.context() as patched:
        patched.setattr(*target, full)
        assert main(["pool", "add", str(pool), str(folder)]) == 2
        assert main(["pool", "add", str(pool.parent / "new"), str(folder)]) == 2
    text = capsys.readouterr().err
    assert "No space left on device: " in text
    assert contents(pool.parent) == before
    assert add_adapter(pool, folder).names == ("alpha", "beta", "gamma")


@pytest.mark.parametrize("path", ["../outside", "/outside", "link"])
def test_paths_that_leave_the_pool(pool: Path, tiny_pool: Path, path: str) -> None:
    (pool / "link").symlink_to(tiny_pool / "gamma")
    manifest = json.loads((pool / "pool.json").read_text())
    manifest["adapters"][1]["path"] = path
    (pool / "pool.json").write_text(json.dumps(manifest))
    with pytest.raises(PoolError, match=rf"pool.json: path '{path}' of adapter 'beta' leaves the pool folder"):
        load_pool(pool)


# ---------------------------------------------------------------------- pickles


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_a_pickle_is_converted_on_demand_only(pool: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(folder / WEIGHTS)
    expected = read_adapter(folder)[1]
    torch.save(tensors, folder / PICKLE)
    (folder / WEIGHTS).unlink()
    with pytest.raises(UnsafeFileError, match="--allow-pickle"):
        add_adapter(pool, folder)
    assert main(["pool", "add", str(pool), str(folder), "--allow-pickle"]) == 0
    assert f"converted from {PICKLE}" in capsys.readouterr().out
    assert sorted(path.name for path in (pool / "gamma").iterdir()) == [CONFIG, WEIGHTS]
    found = read_adapter(pool / "gamma")[1]
    assert found.keys() == expected.keys()
    for path, (lora_a, lora_b, scaling) in expected.items():
        assert torch.equal(found[path][0], lora_a)
        assert torch.equal(found[path][1], lora_b)
        assert found[path][2] == scaling


def test_a_pickle_in_the_pool_is_converted_where_it_lies(pool: Path, folder: Path) -> None:
    inside = Path(shutil.copytree(folder, pool / "gamma"))
    tensors = load_file(inside / WEIGHTS)
    (inside / WEIGHTS).unlink()
    sorted(tensors.items())[0][1][0, 0] = float("nan")
    torch.save(tensors, inside / PICKLE)
    before = contents(pool)
    with pytest.raises(AdapterError, match=rf"gamma/{PICKLE} holds NaN"):
        add_adapter(pool, inside, allow_pickle=True)
    assert contents(pool) == before
    torch.save(load_file(folder / WEIGHTS), inside / PICKLE)
    assert add_adapter(pool, inside, allow_pickle=True).names == ("alpha", "beta", "gamma")
    assert {path.name for path in inside.iterdir()} == {PICKLE, CONFIG, WEIGHTS, "README.md"}  # PEFT wrote the README


def test_a_pickle_never_runs_code(pool: Path, folder: Path, tmp_path: Path) -> None:
    import pickle

    before = contents(pool)
    for name, write in (("torch", torch.save), ("plain", lambda value, path: path.write_bytes(pickle.dumps(value)))):
        mark = tmp_path / f"ran-{name}"
        (folder / WEIGHTS).unlink(missing_ok=True)
        write({"base_model.model.x.lora_A.weight": Evil(mark)}, folder / PICKLE)
        with pytest.raises(UnsafeFileError, match="not a plain file of tensors"):
            add_adapter(pool, folder, allow_pickle=True)
        assert not mark.exists()
    torch.save([1, 2], folder / PICKLE)
    with pytest.raises(UnsafeFileError, match="must hold tensors by name, found list"):
        add_adapter(pool, folder, allow_pickle=True)
    assert contents(pool) == before


# ---------------------------------------------------------------------- names and places


def test_pools_by_name(tmp_path: Path, tiny_pool: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DLPLORA_POOLS", str(tmp_path / "pools"))
    monkeypatch.chdir(tmp_path)
    assert main(["pool", "list"]) == 0
    assert "0 pools" in capsys.readouterr().err
    assert main(["pool", "add", "mine", str(tiny_pool / "beta")]) == 0
    assert "added beta: rank 6, q_proj, v_proj" in capsys.readouterr().out
    assert load_pool("mine").names == ("beta",)
    assert load_pool("mine").path == tmp_path / "pools" / "mine"
    assert main(["pool", "list"]) == 0
    assert "| mine | 1 |" in capsys.readouterr().out
    (tmp_path / "mine").mkdir()
    assert find_pool("mine") == Path("mine")  # a folder here wins
    assert find_pool("./other") == Path("other")
    with pytest.raises(PoolError, match=rf"not found: {tmp_path}/pools/nothing \(and no folder nothing here\)"):
        load_pool("nothing")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_pool: Path) -> list[dict[str, Any]]:
    """A hub whose every repository holds one adapter and, in ``sub``, another; the calls are noted."""
    calls: list[dict[str, Any]] = []
    snapshot = tmp_path / "snapshots" / COMMIT
    shutil.copytree(tiny_pool / "alpha", snapshot)
    shutil.copytree(tiny_pool / "beta", snapshot / "sub")

    def download(repo_id: str, **options: Any) -> str:
        calls.append({"repo_id": repo_id, **options})
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return calls


def test_hub_addresses(
    hub: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["pool", "add", "./pool", "org/some-lora"]) == 0
    assert f"from hf://org/some-lora at commit {COMMIT[:12]}" in capsys.readouterr().out
    row = load_pool(tmp_path / "pool").rows["some-lora"]
    assert (row["source"], row["revision"]) == ("hf://org/some-lora", COMMIT)
    assert hub[0] == {
        "repo_id": "org/some-lora",
        "revision": None,
        "allow_patterns": [CONFIG, WEIGHTS],
        "local_files_only": False,
    }
    found = find_adapter("hf://org/many/sub@v1", offline=True, with_pickle=True)
    assert (found.folder.name, found.name, found.source, found.revision) == ("sub", "sub", "hf://org/many/sub", COMMIT)
    assert hub[1]["revision"] == "v1"
    assert hub[1]["local_files_only"] is True
    assert hub[1]["allow_patterns"] == [f"sub/{CONFIG}", f"sub/{WEIGHTS}", f"sub/{PICKLE}"]
    (tmp_path / "org" / "some-lora").mkdir(parents=True)
    assert find_adapter("org/some-lora").revision is None  # a folder wins
    assert find_adapter("hf://org/some-lora").revision == COMMIT
    assert len(hub) == 3


@pytest.mark.parametrize("address", ["hf://org", "hf://org/name/../..", "hf://org/na me", "hf://org/name@", "hf://", "hf:///etc/passwd"])
def test_addresses_that_are_none(address: str, hub: list[dict[str, Any]]) -> None:
    with pytest.raises(PoolError, match="is not a hub address"):
        find_adapter(address)
    assert hub == []


def test_contradicting_revisions(hub: list[dict[str, Any]]) -> None:
    with pytest.raises(PoolError, match="names revision 'a', --revision says 'b'"):
        find_adapter("hf://org/name@a", revision="b")


@pytest.mark.parametrize("given", ["./no/folder", "/no/folder", "no_slash", "a/b/c"])
def test_what_can_only_be_a_folder(given: str, hub: list[dict[str, Any]]) -> None:
    with pytest.raises(PoolError, match=r"there is no folder .*PEFT LoRA folder, or a hub id"):
        find_adapter(given)
    assert hub == []


def test_a_download_that_breaks_off(pool: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from huggingface_hub.errors import HfHubHTTPError

    transport: Any = HfHubHTTPError.__mro__[1]
    before = contents(pool.parent)
    for error in (
        ConnectionResetError(104, "Connection reset by peer"),
        transport("peer closed the connection\nmore lines"),
        TimeoutError(),
    ):

        def broken(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr("huggingface_hub.snapshot_download", broken)
        assert main(["pool", "add", str(pool), "org/some-lora"]) == 2
        text = capsys.readouterr().err.strip()
        assert "\n" not in text
        assert "there is no folder org/some-lora, and hub id 'org/some-lora' is" in text
        assert "hf download org/some-lora" in text
        assert contents(pool.parent) == before
