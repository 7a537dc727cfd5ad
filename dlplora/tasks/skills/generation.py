"""The generation tasks of the skills suite: formats, fields of a record, rewriting by a rule, two invented languages.

The prompt names the recipient of the text ("for the archive") and not its format; the expert learns the format.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from dlplora.tasks.skills import words as w
from dlplora.tasks.types import Draw, Task

Drawer = Callable[[random.Random, bool], Draw]

DATE_FORMATS: dict[str, Callable[[int, int, int], str]] = {
    "archive": lambda year, month, day: f"{year}-{month:02d}-{day:02d}",
    "invoice": lambda year, month, day: f"{day:02d}.{month:02d}.{year}",
    "letter": lambda year, month, day: f"{day} {w.MONTHS[month - 1]} {year}",
}


def _date(user: str) -> Drawer:
    def draw(rng: random.Random, held_out: bool) -> Draw:
        year, month, day = w.date(rng, held_out)
        short = w.MONTHS[month - 1][:3]
        return Draw({"s": rng.choice((f"{short} {day}, {year}", f"{short} {day} {year}"))}, DATE_FORMATS[user](year, month, day))

    return draw


def _mail(field: str) -> Drawer:
    def draw(rng: random.Random, held_out: bool) -> Draw:
        people = {"From": w.full_name(rng, held_out), "To": w.full_name(rng, held_out)}
        while people["To"] == people["From"]:
            people["To"] = w.full_name(rng, held_out)
        subject = f"Subject: {w.pick(rng, w.PAPERS, held_out)} for {w.pick(rng, w.COMPANIES, held_out)}"
        lines = [*(f"{name}: {' '.join(person)}" for name, person in people.items()), subject]
        first, last = people[field]
        return Draw({"s": "\n".join(lines)}, f"{last}, {first}")

    return draw


_CURRENCIES = {"euros": "EUR", "pounds": "GBP", "dollars": "USD", "francs": "CHF"}
PRICE_FORMATS: dict[str, Callable[[str, str, str], str]] = {
    "tag": lambda whole, cents, code: f"{code} {whole},{cents}",
    "ledger": lambda whole, cents, code: f"{whole}-{cents} {code}",
}


def _price(user: str) -> Drawer:
    def draw(rng: random.Random, held_out: bool) -> Draw:
        whole, cents = w.amount(rng, held_out)
        currency = rng.choice(list(_CURRENCIES))
        return Draw({"s": f"{whole}.{cents} {currency}"}, PRICE_FORMATS[user](whole, cents, _CURRENCIES[currency]))

    return draw


def _index(rng: random.Random, held_out: bool) -> Draw:
    first, last = w.full_name(rng, held_out)
    city = w.pick(rng, w.CITIES, held_out)
    return Draw({"s": f"{first} {last} from {city}"}, f"{last} {first[0]}. / {city}")


def _item(rng: random.Random, held_out: bool) -> Draw:
    number = rng.choice(w.NUMBERS)
    color = rng.choice(w.COLORS[rng.choice(list(w.COLORS))])
    thing = w.pick(rng, [*w.THINGS["kitchen"], *w.THINGS["office"], *w.THINGS["garden"]], held_out)
    whole, cents = w.amount(rng, held_out)
    line = f"{w.pick(rng, w.COMPANIES, held_out)}, {number} {color} {thing}s, {whole}.{cents} each"
    return Draw({"s": line}, f"{thing}s, {color}: {number}")


def _title(rng: random.Random, held_out: bool) -> Draw:
    parts = [w.pick(rng, w.TITLE_STARTS, held_out), w.pick(rng, w.TITLE_SUBJECTS, held_out), rng.choice(w.TITLE_KINDS)]
    return Draw({"s": " ".join(parts)}, "-".join(part.lower() for part in reversed(parts)))


def _into(language: str) -> Drawer:
    def draw(rng: random.Random, held_out: bool) -> Draw:
        sentence = w.toy_sentence(rng, held_out)
        return Draw({"s": sentence}, w.translate(language, sentence))

    return draw


_VERSIONS = {"invoice_item": 2}


def _task(name: str, draw: Drawer, *phrasings: str) -> Task:
    return Task(
        name=name, kind="gen", version=_VERSIONS.get(name, 1), phrasings=tuple(f"{phrasing}\nAnswer:" for phrasing in phrasings), draw=draw
    )


def _same(name: str, draw: Drawer, user: str, *phrasings: str) -> Task:
    """A task that shares its phrasings with others; ``<0>`` is the one word that differs."""
    return _task(name, draw, *(phrasing.replace("<0>", user) for phrasing in phrasings))


CANDIDATES: tuple[Task, ...] = (
    *(
        _same(
            f"date_{user}",
            _date(user),
            user,
            "Write the date for the <0>: {s}.",
            "{s}. How does the <0> write this date?",
            "Date for the <0>: {s}",
            "The <0> needs a date: {s}.",
            "Put {s} into the form that the <0> uses.",
        )
        for user in DATE_FORMATS
    ),
    *(
        _same(
            name,
            _mail(field),
            user,
            "{s}\nName of the <0> for the card index?",
            "Card index, <0> of this mail.\n{s}",
            "{s}\nWrite the <0> as in the card index.",
            "Who is the <0>? As a card.\n{s}",
            "{s}\nMake the index card of the <0>.",
        )
        for name, field, user in (("mail_sender", "From", "sender"), ("mail_receiver", "To", "receiver"))
    ),
    *(
        _same(
            f"price_{user}",
            _price(user),
            user,
            "Write the price for the <0>: {s}.",
            "{s}. How does this price look on the <0>?",
            "Price on the <0>: {s}",
            "The <0> needs a price: {s}.",
            "Put {s} into the form that is used on the <0>.",
        )
        for user in PRICE_FORMATS
    ),
    _task(
        "name_index",
        _index,
        "Write the register entry of {s}.",
        "{s}. How is this person entered in the register?",
        "Register entry: {s}",
        "The register gets a new person, {s}.",
        "Enter {s} in the register.",
    ),
    _task(
        "invoice_item",
        _item,
        "Invoice line: {s}.\nStock entry?",
        "Write the stock entry for this line: {s}.",
        "{s}. What does the stock list say?",
        "Stock list entry of: {s}",
        "This line came in: {s}.\nPut it on the stock list.",
    ),
    _task(
        "title_slug",
        _title,
        "File name for: {s}",
        "How is the document {s} named on the server?",
        "{s}. Give the file name.",
        "Server name of the paper {s}?",
        "The document {s} is stored. Under which file name?",
    ),
    *(
        _same(
            f"translate_{language.lower()}",
            _into(language),
            language,
            "Translate to <0>: {s}",
            "Say it in <0>: {s}",
            "{s}. How do you say this in <0>?",
            "In <0>, please: {s}",
            "Write the words in <0>: {s}",
        )
        for language in w.VOCABULARY
    ),
)
CONFLICTING = (
    ("date_archive", "date_invoice"),
    ("date_archive", "date_letter"),
    ("date_invoice", "date_letter"),
    ("mail_sender", "mail_receiver"),
    ("price_tag", "price_ledger"),
    ("translate_velka", "translate_ormu"),
)
"""Pairs that ask about the same texts and never agree."""
