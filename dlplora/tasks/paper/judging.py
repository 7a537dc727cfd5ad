"""Whether a generated answer of one of the paper's tasks is correct."""

from __future__ import annotations

import re

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def last_number(text: str) -> str | None:
    """The last number of a text without thousands separators, or None.

    >>> last_number("so 1,200 + 34 = 1,234.0")
    '1234'
    """
    found = NUMBER.findall(text.replace(",", ""))
    if not found:
        return None
    value = float(found[-1])
    return str(int(value)) if value.is_integer() else str(value)


def _yes_or_no(text: str) -> str | None:
    first = re.match(r"\W*(yes|no)\b", text.lower())
    return first.group(1) if first else None


def judged(judge: str, reference: str, answer: str) -> bool:
    """Whether an answer is right.

    Args:
        judge: ``exact`` (the stripped text), ``number`` (the last number, as usual for GSM8K), or ``yes_no`` (what each begins with).
        reference: The right answer.
        answer: What was generated.

    Raises:
        ValueError: If the judge is unknown.
    """
    if judge == "exact":
        return answer.strip() == reference.strip()
    if judge not in {"number", "yes_no"}:
        raise ValueError(f"unknown judge '{judge}'; known: exact, number, yes_no.")
    read = last_number if judge == "number" else _yes_or_no
    wanted = read(reference)
    return wanted is not None and read(answer) == wanted
