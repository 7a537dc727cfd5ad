"""The eight generation tasks of the nano suite: translation, rewriting, repair, table-to-text, dialogue, summary."""

from __future__ import annotations

import random
from collections.abc import Callable

from dlplora.tasks.nano import lexicon as lx
from dlplora.tasks.types import Draw, Task

Drawer = Callable[[random.Random, bool], Draw]


def _toy(rng: random.Random, held_out: bool) -> str:
    return lx.toy_sentence(rng, lx.half(lx.TOY_ANIMALS, held_out), lx.half(lx.TOY_THINGS, held_out))


def _into(language: str) -> Drawer:
    def draw(rng: random.Random, held_out: bool) -> Draw:
        sentence = _toy(rng, held_out)
        return Draw({"s": sentence}, lx.translate(language, sentence) + ".")

    return draw


def _from(language: str) -> Drawer:
    def draw(rng: random.Random, held_out: bool) -> Draw:
        sentence = _toy(rng, held_out)
        return Draw({"s": lx.translate(language, sentence)}, sentence + ".")

    return draw


def _repair(rng: random.Random, held_out: bool) -> Draw:
    sentence = lx.simple_sentence(rng, lx.half(lx.NAMES, held_out), lx.nouns(held_out))
    return Draw({"s": lx.disfluent(rng, sentence)}, sentence + ".")


def _table(rng: random.Random, held_out: bool) -> Draw:
    name, color, place = rng.choice(lx.half(lx.NAMES, held_out)), rng.choice(lx.COLORS), rng.choice(lx.PLACES)
    item, day = rng.choice(lx.nouns(held_out)), rng.choice(lx.DAYS)
    text = f"{name} comes to the {place} on {day}. {name} has {lx.article(color)} {item}."
    return Draw({"s": f"name {name} ; day {day} ; place {place} ; item {color} {item}"}, text)


def _order(rng: random.Random, held_out: bool) -> tuple[str, str, str, str]:
    """Recipient, colour, thing, place of an errand."""
    return rng.choice(lx.half(lx.NAMES, held_out)), rng.choice(lx.COLORS), rng.choice(lx.nouns(held_out)), rng.choice(lx.PLACES)


def _polite(rng: random.Random, held_out: bool) -> Draw:
    name, color, thing, place = _order(rng, held_out)
    errand = rng.choice([f"bring the {color} {thing} to {name}", f"take the {thing} to the {place}", f"wash the {color} {thing} of {name}"])
    return Draw({"s": errand}, f"Could you please {errand}?")


def _agree(rng: random.Random, held_out: bool) -> Draw:
    name, color, thing, _ = _order(rng, held_out)
    other = rng.choice(lx.half(lx.NAMES, held_out))
    topic = rng.choice([f"the {color} {thing}", f"the {thing} of {name}"])
    return Draw({"s": f"{other}: I like {topic}"}, f"Yes, {other}. I like {topic} too.")


def _summary(rng: random.Random, held_out: bool) -> Draw:
    names, things = lx.half(lx.NAMES, held_out), lx.nouns(held_out)
    lead, *rest = [lx.simple_sentence(rng, names, things) for _ in range(3)]
    return Draw({"s": ". ".join([lead, *rest]) + "."}, lead + ".")


def _tail(rng: random.Random, held_out: bool) -> Draw:
    names, things = lx.half(lx.NAMES, held_out), lx.nouns(held_out)
    sentences = [lx.simple_sentence(rng, names, things) for _ in range(3)]
    return Draw({"s": ". ".join(sentences) + "."}, sentences[-1] + ".")


def _task(name: str, draw: Drawer, *phrasings: str) -> Task:
    return Task(name=name, kind="gen", phrasings=tuple(f"{phrasing}\nAnswer:" for phrasing in phrasings), draw=draw)


CANDIDATES: tuple[Task, ...] = (
    _task(
        "translate_zargi",
        _into("Zargi"),
        "Translate to Zargi: {s}.",
        "Say it in Zargi: {s}.",
        "{s}. How do you say this in Zargi?",
        "In Zargi, please: {s}.",
        "Write this sentence in Zargi: {s}.",
        "Please write in Zargi: {s}.",
    ),
    _task(
        "translate_tepak",
        _into("Tepak"),
        "Translate to Tepak: {s}.",
        "Say it in Tepak: {s}.",
        "{s}. How do you say this in Tepak?",
        "In Tepak, please: {s}.",
        "Write this sentence in Tepak: {s}.",
        "Please write in Tepak: {s}.",
    ),
    _task(
        "translate_lunese",
        _from("Lunese"),
        "Translate to English: {s}.",
        "Say it in English: {s}.",
        "{s}. How do you say this in English?",
        "In English, please: {s}.",
        "Write this sentence in English: {s}.",
        "Please write in English: {s}.",
    ),
    _task(
        "disfluency_repair",
        _repair,
        "Clean up the speech: {s}.",
        "Spoken: {s}. Make it fluent.",
        "Repair this speech: {s}.",
        "Make the spoken sentence fluent: {s}.",
        "{s}. Clean this up.",
        "Repair the spoken sentence and make it clean: {s}.",
    ),
    _task(
        "table_to_text",
        _table,
        "Table: {s}. Write the text.",
        "Describe the row: {s}.",
        "Turn this table row into text: {s}.",
        "Row: {s}. Describe it.",
        "Write a text about the row: {s}.",
        "Describe this table row in a text: {s}.",
    ),
    _task(
        "polite_request",
        _polite,
        "Make it polite: {s}.",
        "Ask politely: {s}.",
        "{s}. Say this politely.",
        "A polite form of: {s}.",
        "Order: {s}. Make it polite.",
        "Say this order in a polite form: {s}.",
    ),
    _task(
        "topical_chat",
        _agree,
        "Chat. {s}. Reply as a friend.",
        "{s}. What does the friend reply?",
        "Reply to the chat: {s}.",
        "A friend said to you, {s}. Reply.",
        "The chat goes on. {s}. Your reply?",
        "Reply as a friend to the chat. {s}.",
    ),
    _task(
        "news_summary",
        _summary,
        "News: {s} Summary?",
        "Summarize the news. {s}",
        "{s} Give the summary of the news.",
        "What is the news in short? {s}",
        "Short summary of this: {s}",
        "Give the news in short. {s}",
        "In short, what is the summary? {s}",
        "Give in short the summary of the news. {s}",
    ),
    _task(
        "latest_news",
        _tail,
        "Report: {s} Latest?",
        "Tell the latest of the report. {s}",
        "{s} Give the latest of the report.",
        "What is the latest report? {s}",
        "Latest part of this: {s}",
        "Give the report in its latest part. {s}",
        "In the report, what is the latest? {s}",
        "Give in a report what is the latest. {s}",
    ),
)
