"""What a record says of its method: settings, and a hash of the source that made the numbers."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlplora.config import config_hash
from dlplora.methods.base import FusionMethod
from dlplora.methods.registry import MethodSpec, load_method_spec, method_class, resolved_params

_CODES: dict[type[FusionMethod], str | None] = {}


@dataclass(frozen=True)
class _Scope:
    """Modules that belong to a method: our baselines among themselves, any other package as a whole, or files side by side."""

    prefix: str
    folder: Path

    def file(self, name: str) -> Path | None:
        """The file of a module by its full name; None if it is not in scope."""
        inside = name.removeprefix(self.prefix).removeprefix(".") if self.prefix else name
        if self.prefix and name != self.prefix and not name.startswith(f"{self.prefix}."):
            return None
        base = self.folder.joinpath(*inside.split(".")) if inside else self.folder
        found = [base.with_name(f"{base.name}.py"), *([base / "__init__.py"] if self.prefix else [])]
        return next((path for path in found if path.is_file()), None)


def _scope_of(name: str, path: Path) -> _Scope:
    parts = name.split(".")
    if path.name == "__init__.py":
        parts.append("__init__")
    if parts[0] == "dlplora":  # the rest of this package has versions and commits of its own
        return _Scope(".".join(parts[:-1]), path.parent)
    return _Scope(parts[0] if len(parts) > 1 else "", path.parents[max(len(parts) - 2, 0)])


def method_files(method: type[FusionMethod]) -> dict[str, Path]:
    """Module name -> file of a method's class, of its bases between it and ``FusionMethod``, and of what they import from their package."""
    found: dict[str, Path] = {}
    for cls in method.__mro__:
        module = sys.modules.get(cls.__module__)
        path = getattr(module, "__file__", None)
        if issubclass(cls, FusionMethod) and cls is not FusionMethod and path and path.endswith(".py"):
            _follow(cls.__module__, Path(path), _scope_of(cls.__module__, Path(path)), found)
    return found


def _follow(name: str, path: Path, scope: _Scope, found: dict[str, Path]) -> None:
    if name in found or name == FusionMethod.__module__ or not path.is_file():
        return
    found[name] = path
    for imported in _imports(ast.parse(path.read_bytes()), name if path.name == "__init__.py" else name.rpartition(".")[0]):
        file = scope.file(imported)
        if file is not None:
            _follow(imported, file, scope, found)


def _imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Full names of what a module imports anywhere; ``from a import b`` may name a module or something in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (package or not node.level):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            yield from (base, *(f"{base}.{alias.name}" for alias in node.names))


def method_code(method: type[FusionMethod]) -> str | None:
    """Hash of a method's files without comments, docstrings and layout; None where there is no file, for example in a notebook.

    A process hashes a class once, since it runs the code that it loaded.
    """
    if method not in _CODES:
        files = method_files(method)
        named = [[name, _code(path)] for name, path in sorted(files.items())]
        _CODES[method] = config_hash(named) if method.__module__ in files else None
    return _CODES[method]


def _code(path: Path) -> str:
    tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            node.body = [one for one in node.body if not (isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant))]
    return ast.unparse(tree)


def described_method(spec: MethodSpec) -> dict[str, Any]:
    """Class, what it needs, and parameters; under ``changed`` those that are not the preset's (none in a row with its own name)."""
    params, own = resolved_params(spec), None
    if spec.name == (spec.path.stem if spec.path else spec.method):
        own = resolved_params(load_method_spec(str(spec.path or spec.name)))
    changed = {key: value for key, value in params.items() if own is not None and own.get(key) != value}
    needs = list(method_class(spec.method).metadata.needs)
    return {"method": spec.method, "params": params, "needs": needs, **({"changed": changed} if changed else {})}
