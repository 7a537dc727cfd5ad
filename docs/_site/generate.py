"""Pages made while the site is built: one a method from its metadata, the record's fields, the tables, and the API reference."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
import textwrap
from itertools import pairwise
from pathlib import Path

import mkdocs_gen_files

sys.path.insert(0, str(Path(__file__).parent))
from hooks import COPIES, ROOT, rewritten

from dlplora.methods.registry import available_methods, available_presets, load_method_spec, resolved_params
from dlplora.reporting import schema
from dlplora.reporting.markdown import table

ROOMS = (
    "inference", "methods", "modules", "adapters", "kernels", "lm_eval", "evaluation", "tuning", "reproduce", "bench", "serve", "export",
    "testing",
    "tasks", "data", "training", "reporting",
)  # fmt: skip
LEFT_OUT = {"index.md", "record.md"}


def write(page: str, text: str) -> None:
    """Put a generated page on the site."""
    with mkdocs_gen_files.open(page, "w") as stream:
        stream.write(text)


def copied_pages() -> None:
    """Pages that lie elsewhere in the repository, and every table and figure of the results."""
    pages = {ROOT / source: page for source, page in COPIES.items() if source.endswith(".md") and page not in LEFT_OUT}
    pages |= {path: f"tables/{path.name}" for path in sorted((ROOT / "results" / "tables").glob("*.md"))}
    for path, page in pages.items():
        text = rewritten(path.read_text(encoding="utf-8"), page, path.parent)
        suite = path.stem
        figures = sorted((ROOT / "results" / "figures").glob(f"{suite}_*.svg")) if path.parent.name == "tables" else []
        if figures:
            text += "\n## Figures\n\n"
        for figure in figures:
            title = figure.stem.removeprefix(f"{suite}_").replace("_", " ")
            text += f"![{title}](../figures/{figure.name})\n\n"
        write(page, text)
    for figure in sorted((ROOT / "results" / "figures").glob("*.svg")):
        write(f"figures/{figure.name}", figure.read_text(encoding="utf-8"))


def docstrings_of_fields(cls: type) -> dict[str, str]:
    """Field -> the string below it in the source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    found = {}
    for one, after in pairwise(body):
        if isinstance(one, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            found[ast.unparse(one.target)] = " ".join(str(after.value.value).split())
    return found


def fields_table(cls: type) -> str:
    """Name, type, default and meaning of a dataclass's fields."""
    meaning = docstrings_of_fields(cls)
    rows = []
    for one in dataclasses.fields(cls):
        default = "" if one.default is dataclasses.MISSING else f"`{one.default!r}`"
        rows.append([f"`{one.name}`", f"`{one.type}`", default, meaning.get(one.name, "")])
    return table(["field", "type", "default", "meaning"], rows, left=4)


def method_pages() -> None:
    """One page a method class with its metadata, parameters and presets."""
    presets = [load_method_spec(name) for name in available_presets()]
    for name, cls in available_methods().items():
        facts = cls.metadata
        paper = f"[{facts.paper}]({facts.paper})" if facts.paper else "none: a reference of our own"
        rows = [
            ("paper", paper),
            ("weights may change", {"none": "never", "task": "with the task"}.get(facts.granularity, f"with every {facts.granularity}")),
            ("decided for", f"the whole {facts.depth}" if facts.depth == "model" else f"every {facts.depth}"),
            ("fuses", "deltas, `Σ w s B A`" if facts.combine == "delta" else "factors, `(Σ w s B)(Σ w A)`"),
            ("needs beyond the prompt", ", ".join(f"`{need}`" for need in facts.needs if need != "inputs") or "nothing"),
            ("trained", "yes" if facts.trainable else "no"),
            ("lines of conformance it breaks by definition", ", ".join(facts.exempt) or "none"),
        ]
        text = f"# {facts.title}\n\n" + "\n".join(f"* **{key}:** {value}" for key, value in rows)
        text += f"\n\nClass `{cls.__module__}.{cls.__qualname__}`; presets and what was measured: [results](../tables/nano.md).\n"
        if dataclasses.fields(cls.Config):
            text += f"\n## Parameters\n\n{fields_table(cls.Config)}\n"
        for spec in (one for one in presets if one.method == name):
            params = "".join(f"\n  {key}: {value!r}" for key, value in resolved_params(spec).items()) or " {}"
            text += f"\n## Preset `{spec.name}`\n\n```yaml\nmethod: {name}\nparams:{params}\n```\n"
        module = inspect.getdoc(sys.modules[cls.__module__]) or ""
        text += f"\n## Source and departures\n\n```text\n{module}\n```\n"
        write(f"method/{name}.md", text)


def record_page() -> None:
    """The schema of a results record in words."""
    text = "# The results record\n\nOne JSON file a run; `dlplora report schema` prints its JSON Schema, which is generated from the same "
    text += f"dataclasses as this page. Version {schema.SCHEMA_VERSION}; versions {', '.join(map(str, schema.READABLE))} are read. "
    text += "Fractions are 0 to 1, BLEU is 0 to 100, a measurement that was not made is null.\n\n"
    text += f"## Record\n\n{fields_table(schema.Record)}\n\n## One task\n\n{fields_table(schema.TaskResult)}\n\n"
    rows = [[f"`{name}`", kind, f"`{metric}`"] for name, (kind, metric) in schema.AGGREGATES.items()]
    text += "## Aggregates\n\n" + table(["aggregate", "mean over tasks of kind", "of metric"], rows, left=3)
    write("record.md", text + "\n")


def reference_pages() -> None:
    """One page a room, every public module of it."""
    for room in ROOMS:
        modules = sorted(path.stem for path in (ROOT / "dlplora" / room).glob("*.py") if not path.stem.startswith("_"))
        parts = [f"# dlplora.{room}", *(f"::: dlplora.{room}.{module}" for module in modules)]
        write(f"reference/{room}.md", "\n\n".join(parts) + "\n")


copied_pages()
method_pages()
record_page()
reference_pages()
