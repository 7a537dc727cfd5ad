"""Malformed JSON that every reader must refuse in one line."""

from __future__ import annotations

DEEP, DIGITS = "[" * 100_000, "9" * 5_000
BROKEN = {
    "cut": '{"a": ',
    "list": "[1]",
    "null": "null",
    "text": '"x"',
    "deep": '{"a": ' + DEEP,
    "balanced": '{"format": 2, "a": ' + "[" * 500 + "]" * 500 + "}",
    "digits": '{"format": ' + DIGITS + "}",
    "NaN": '{"format": NaN}',
    "infinite": '{"format": 1e999}',
    "NUL": '{"format": "\\u0000"}',
    "surrogate": '{"format": "\\ud800"}',
    "empty": "",
    "object": "{}",
    "wrong": '{"format": {"x": [1]}, "method": 5, "params": [], "experts": "a", "adapters": 3, "r": {}, "peft_type": []}',
}


def one_line(error: BaseException, *parts: str) -> None:
    text = str(error)
    assert "\n" not in text
    assert len(text) < 600
    for part in parts:
        assert part in text
