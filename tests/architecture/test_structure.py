"""The house rules that a reader cannot check by eye: sizes, names, import directions, loadable configurations."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dlplora.config import configs_root, list_configs
from dlplora.evaluation.protocol import load_protocol
from dlplora.methods.registry import build_method, load_method_spec, method_class
from dlplora.training.config_check import check_command_line

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(path for room in ("dlplora", "baselines", "benchmarks") for path in (ROOT / room).rglob("*.py"))
MAX_MODULE_LINES, MAX_FUNCTION_LINES = 400, 60


def test_there_is_something_to_check() -> None:
    assert len(MODULES) > 50


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_and_functions_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_MODULE_LINES
    assert path.name not in {"utils.py", "helpers.py", "misc.py", "common.py"}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            docstring = ast.get_docstring(node, clean=False)
            body = lines - (len(docstring.splitlines()) if docstring else 0)
            assert body <= MAX_FUNCTION_LINES, f"{node.name} has {body} lines"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_public_names_are_documented(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if path.name != "__init__.py":
        assert ast.get_docstring(tree), "the module has no docstring"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"
            for inner in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_") and not _overrides(inner):
                    assert ast.get_docstring(inner), f"{node.name}.{inner.name} has no docstring"


def _overrides(node: ast.FunctionDef) -> bool:
    """Setters and overloads repeat a documented name."""
    return any("setter" in ast.unparse(decorator) or "overload" in ast.unparse(decorator) for decorator in node.decorator_list)


def test_imports_point_one_way() -> None:
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


def imports_of(path: Path, known: set[str]) -> set[str]:
    """Modules of this project that a module imports anywhere, lazily or for types only included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & known


def test_no_two_modules_import_each_other_by_any_way() -> None:
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in MODULES if path.name != "__init__.py"}
    graph = {name: imports_of(path, set(names)) for name, path in names.items()}
    while leaves := {name for name, targets in graph.items() if not targets}:
        graph = {name: targets - leaves for name, targets in graph.items() if name not in leaves}
    assert not graph, f"in or behind a circle: {', '.join(sorted(graph))}"


@pytest.mark.parametrize("name", list_configs("method"))
def test_every_method_file_builds(name: str) -> None:
    assert build_method(load_method_spec(name)).name


@pytest.mark.parametrize("name", list_configs("protocol"))
def test_every_protocol_loads(name: str) -> None:
    assert load_protocol(name).hash()


@pytest.mark.parametrize("name", list_configs("train"))
def test_every_training_file_names_known_classes_and_keys(name: str) -> None:
    classes = check_command_line(["--config", str(configs_root() / "train" / f"{name}.yaml")])
    assert set(classes) == {"model", "data"}


COLUMNS = ["preset", "file", "paper", "section", "upstream commit", "deviations, with reasons", "equivalence test"]
FIDELITY = (ROOT / "baselines" / "README.md").read_text(encoding="utf-8")


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]


def fidelity_faults(text: str, name: str) -> list[str]:
    """What is wrong with one method's row of a fidelity table."""
    lines = text.splitlines()
    header = next((cells_of(line) for line in lines if line.startswith("| preset")), [])
    if header != COLUMNS:
        return [f"columns are {header}"]
    rows = [cells_of(line) for line in lines if line.startswith("| `")]
    mine = [row for row in rows if f"`{name}`" in row[0]]
    if len(mine) != 1:
        return [f"{len(mine)} rows for '{name}'"]
    (row,) = mine
    if len(row) != len(COLUMNS):
        return [f"{len(row)} cells"]
    faults = [f"'{column}' is empty" for column, cell in zip(COLUMNS, row, strict=True) if not cell]
    spec = load_method_spec(name)
    cls = method_class(spec.method)
    paper = cls.metadata.paper
    if paper is not None and f"arXiv:{paper.rsplit('/', 1)[-1]}" not in row[2]:
        faults.append(f"the class cites {paper}, the row {row[2]}")
    file = row[1].strip("`")
    if cls.__module__.replace(".", "/") + ".py" not in {file, f"dlplora/baselines/{file}"}:
        faults.append(f"the class is in {cls.__module__}, the row says {file}")
    if not re.search(r"[\w.-]+/[\w.-]+@[0-9a-f]{7}\b|PEFT \d|\bnone\b|not public|not looked up|not recorded", row[4]):
        faults.append(f"no commit: {row[4]}")
    tests = re.findall(r"`(tests/\S+\.py)`", row[6])
    if not tests or not all((ROOT / test).is_file() for test in tests):
        faults.append(f"no such test: {row[6]}")
    return faults


@pytest.mark.parametrize("name", list_configs("method"))
def test_every_method_has_a_row_in_the_fidelity_table(name: str) -> None:
    assert not fidelity_faults(FIDELITY, name)


def test_a_gap_in_the_fidelity_table_is_seen() -> None:
    (line,) = [line for line in FIDELITY.splitlines() if line.startswith("| `spectr`")]
    assert fidelity_faults(FIDELITY.replace(line, ""), "spectr") == ["0 rows for 'spectr'"]
    assert fidelity_faults(FIDELITY.replace("| section ", "| "), "spectr")[0].startswith("columns are")
    for place, column in enumerate(COLUMNS[1:], start=1):
        cells = cells_of(line)
        cells[place] = " "
        assert f"'{column}' is empty" in fidelity_faults(FIDELITY.replace(line, "| " + " | ".join(cells) + " |"), "spectr")
    assert "the class cites" in fidelity_faults(FIDELITY.replace("arXiv:2504.03454", "arXiv:2504.00000"), "spectr")[0]
    assert "no such test" in fidelity_faults(FIDELITY.replace("test_training_free.py", "test_gone.py"), "spectr")[0]
