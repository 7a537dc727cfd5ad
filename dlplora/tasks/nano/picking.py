"""Rules that pick the answer out of the prompt, or decide by something in it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from dlplora.tasks.nano import lexicon as lx
from dlplora.tasks.types import Draw

Drawer = Callable[[random.Random, bool], Draw]


def _pick(category_index: Callable[[random.Random], tuple[str, list[str]]]) -> Drawer:
    """Three things of three categories; the rule names the category that wins."""

    def draw(rng: random.Random, held_out: bool) -> Draw:
        winner, rivals = category_index(rng)
        words = [rng.choice(lx.nouns_of(winner, held_out)), *(rng.choice(lx.nouns_of(rival, held_out)) for rival in rivals)]
        answer = words[0]
        rng.shuffle(words)
        return Draw(
            {"l": lx.enumerate_words([lx.article(word) for word in words]), "n": rng.choice(lx.half(lx.NAMES, held_out))}, answer, words
        )

    return draw


_PICK_POOL = ["animal", "tool", "food", "instrument"]


def winner(category: str) -> Drawer:
    """Three things of three categories; the one of ``category`` is the answer."""
    rivals = [other for other in _PICK_POOL if other != category]
    return _pick(lambda rng: (category, rng.sample(rivals, 2)))


def ordinal(position: int) -> Drawer:
    """Three things; the one at a fixed position is the answer."""

    def draw(rng: random.Random, held_out: bool) -> Draw:
        words = rng.sample(lx.nouns(held_out), 3)
        return Draw(
            {"l": lx.enumerate_words([lx.article(word) for word in words]), "n": rng.choice(lx.half(lx.NAMES, held_out))},
            words[position],
            words,
        )

    return draw


def count(rng: random.Random, held_out: bool) -> Draw:
    """One to four things; how many is the answer."""
    number = rng.randrange(1, 5)
    words = rng.sample(lx.nouns(held_out), number)
    fields = {"l": lx.enumerate_words([lx.article(word) for word in words]), "n": rng.choice(lx.half(lx.NAMES, held_out))}
    return Draw(fields, lx.NUMBERS[number], lx.NUMBERS[1:5])


def gate(allowed: Sequence[str]) -> Drawer:
    """A colour convention: which colours may pass."""

    def draw(rng: random.Random, held_out: bool) -> Draw:
        passes = rng.random() < 0.5
        color = rng.choice(list(allowed) if passes else [color for color in lx.COLORS if color not in allowed])
        fields = {"c": lx.article(color), "w": rng.choice(lx.nouns(held_out)), "n": rng.choice(lx.half(lx.NAMES, held_out))}
        return Draw(fields, "yes" if passes else "no", ("yes", "no"))

    return draw
