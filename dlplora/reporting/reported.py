"""Numbers reported by others, kept separate from measured ones: own file, own table, own section of the page."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal, get_args

from dlplora.documents import parse_yaml
from dlplora.errors import RecordError
from dlplora.reporting.markdown import table

Evidence = Literal["abstract", "repository", "second-hand"]
HEADING = "Reported by others, not measured here"
NOTE = (
    "Other data, other hardware, other questions: these numbers are context and not targets, and are not compared with measured ones. "
    "*Abstract* and *repository*: read there. *Second-hand*: quoted by public reviews and not checked against the paper."
)


@dataclass(frozen=True, kw_only=True)
class Reported:
    """One number reported by others."""

    source: str
    """Title of the source."""
    url: str
    evidence: Evidence
    """How we know of it."""
    method: str
    setting: str
    metric: str
    value: float
    bound: str | None = None
    """``below``, ``above`` or ``up to`` where the source gives a bound instead of a value."""

    @property
    def text(self) -> str:
        """The value as the source writes it."""
        number = f"{self.value:g}"
        return {None: number, "below": f"< {number}", "above": f"> {number}", "up to": f"≤ {number}"}[self.bound]


def parse(content: Any, where: str) -> tuple[Reported, ...]:
    """The numbers of a file's content.

    Raises:
        RecordError: If an entry lacks a field, has an unknown one, or names an unknown source or evidence.
    """
    found = []
    for number, row in enumerate(content["values"]):
        spot = f"{where}: values[{number}]"
        source = content["sources"].get(row.get("source"))
        if source is None:
            raise RecordError(f"{spot}: source '{row.get('source')}' is not one of {', '.join(content['sources'])}.")
        if source["evidence"] not in get_args(Evidence):
            raise RecordError(f"{spot}: evidence must be one of {', '.join(get_args(Evidence))}, got '{source['evidence']}'.")
        own = {key: value for key, value in row.items() if key != "source"}
        try:
            found.append(Reported(source=source["title"], url=source["url"], evidence=source["evidence"], **own))
        except TypeError as error:
            raise RecordError(f"{spot}: {error}.") from error
    return tuple(found)


@cache
def reported() -> tuple[Reported, ...]:
    """The shipped numbers."""
    file = resources.files("dlplora.reporting") / "reported.yaml"
    return parse(parse_yaml(file.read_text("utf-8"), "reported.yaml", error=RecordError), "reported.yaml")


def reported_table() -> str:
    """All of them as Markdown, every row marked."""
    rows = [[one.method, one.setting, one.metric, f"*{one.text}*", one.evidence, f"[{one.source}]({one.url})"] for one in reported()]
    return table(["method", "setting", "metric", "**reported**", "evidence", "source"], rows, left=(0, 1, 2, 4, 5))


def reported_page() -> str:
    """The content of ``results/tables/reported.md``."""
    return f"# {HEADING}\n\n{NOTE}\n\n{reported_table()}\n"
