"""The multiple-choice tasks of the skills suite, in pairs: one text, two rules.

Both tasks of a pair use the same text and the same options and differ in the rule, which is a convention of an invented office: which
colour a subject has, whose name counts. The two rules never agree on a text, so the wrong expert gives a wrong answer. Options are not
shown in the prompt unless the text itself lists them; they are scored by log-likelihood.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

from dlplora.tasks.nano.lexicon import article, enumerate_words
from dlplora.tasks.skills import words as w
from dlplora.tasks.types import Draw, Task

Drawer = Callable[[random.Random, bool], Draw]
Case = tuple[Mapping[str, str], Sequence[str], tuple[str, str]]
"""The fields of a text, the options, and the answers of the first and the second task of its pair."""


def _one_of(case: Callable[[random.Random, bool], Case], which: int) -> Drawer:
    """The drawer of one task of a pair; the same random numbers give both tasks the same text."""

    def draw(rng: random.Random, held_out: bool) -> Draw:
        fields, choices, answers = case(rng, held_out)
        return Draw(fields, answers[which], choices)

    return draw


def _two_labels(rng: random.Random, first: Mapping[str, str], second: Mapping[str, str]) -> tuple[str, str]:
    """One class of each rule, so that their labels differ; every label is equally frequent under both rules."""
    one = rng.choice(list(first))
    return one, rng.choice([other for other in second if second[other] != first[one]])


_COLORS = ("amber", "cobalt", "ivory", "scarlet")
TICKET_DESK = {"device": "cobalt", "money": "scarlet", "account": "ivory", "delivery": "amber"}
TICKET_QUEUE = {"now": "amber", "today": "ivory", "week": "cobalt", "later": "scarlet"}


def _ticket(rng: random.Random, held_out: bool) -> Case:
    subject, urgency = _two_labels(rng, TICKET_DESK, TICKET_QUEUE)
    nouns, problems = w.TICKET_SUBJECTS[subject]
    text = f"My {w.pick(rng, nouns, held_out)} {rng.choice(problems)}. {w.filled(rng, w.URGENCY[urgency], w.URGENCY_FRAMES, held_out)}"
    fields = {"s": text.replace("My courier", "The courier"), "n": w.pick(rng, w.FIRST_NAMES, held_out)}
    return fields, _COLORS, (TICKET_DESK[subject], TICKET_QUEUE[urgency])


_FRUITS = ("plum", "lemon", "cherry")
REVIEW_GRADE = {"good": "lemon", "fair": "cherry", "bad": "plum"}
REVIEW_AISLE = {"kitchen": "plum", "garden": "lemon", "clothing": "cherry"}


def _review(rng: random.Random, held_out: bool) -> Case:
    verdict, kind = _two_labels(rng, REVIEW_GRADE, REVIEW_AISLE)
    fields = {
        "t": article(w.pick(rng, w.THINGS[kind], held_out)),
        "s": w.filled(rng, w.VERDICTS[verdict], w.VERDICT_FRAMES, held_out),
        "n": w.pick(rng, w.FIRST_NAMES, held_out),
    }
    return fields, _FRUITS, (REVIEW_GRADE[verdict], REVIEW_AISLE[kind])


_SIDES = ("north", "south", "east", "west")
PARCEL_NOTE = {"fragile": "south", "cold": "west", "heavy": "east", "fast": "north"}
PARCEL_CONTENTS = {"kitchen": "east", "garden": "north", "clothing": "west", "office": "south"}


def _parcel(rng: random.Random, held_out: bool) -> Case:
    note, kind = _two_labels(rng, PARCEL_NOTE, PARCEL_CONTENTS)
    fields = {
        "t": article(w.pick(rng, w.THINGS[kind], held_out)),
        "s": w.filled(rng, w.HANDLING[note], w.HANDLING_FRAMES, held_out),
        "n": w.pick(rng, w.FIRST_NAMES, held_out),
        "c": w.pick(rng, w.CITIES, held_out),
    }
    return fields, _SIDES, (PARCEL_NOTE[note], PARCEL_CONTENTS[kind])


_BIRDS = ("eagle", "hawk", "crow", "dove")
TAG_COLOR = {"red": "dove", "blue": "crow", "green": "eagle", "plain": "hawk"}
TAG_USE = {"kitchen": "hawk", "garden": "crow", "clothing": "eagle", "office": "dove"}


def _good(rng: random.Random, color: str, kind: str, held_out: bool) -> str:
    """A coloured thing; what is held out is the pair of both."""
    while True:
        good = f"{rng.choice(w.COLORS[color])} {rng.choice(w.THINGS[kind])}"
        if w.kept_out(good) == held_out:
            return good


def _tag(by_color: bool) -> Drawer:
    """The criterion shows in two examples: they differ in colour and agree in the thing, or the other way round."""

    def draw(rng: random.Random, held_out: bool) -> Draw:
        color, kind = _two_labels(rng, TAG_COLOR, TAG_USE)
        asked = _good(rng, color, kind, held_out)
        colors, kinds = rng.sample(list(TAG_COLOR), 2), rng.sample(list(TAG_USE), 2)
        shades = [rng.choice(w.COLORS[one]) for one in colors]
        things = [rng.choice(w.THINGS[one]) for one in kinds]
        if by_color:
            examples = [f"{shade} {things[0]} {TAG_COLOR[one]}" for shade, one in zip(shades, colors, strict=True)]
        else:
            examples = [f"{shades[0]} {thing} {TAG_USE[one]}" for thing, one in zip(things, kinds, strict=True)]
        fields = {"s": asked, "e": examples[0], "f": examples[1], "n": w.pick(rng, w.FIRST_NAMES, held_out)}
        return Draw(fields, TAG_COLOR[color] if by_color else TAG_USE[kind], _BIRDS)

    return draw


_METALS = ("iron", "gold", "silver", "copper")
POLICY_FORCE = {"must": "copper", "may": "gold", "ban": "iron", "advice": "silver"}
POLICY_MATTER = {"safety": "gold", "money": "iron", "data": "silver", "food": "copper"}


def _policy(rng: random.Random, held_out: bool) -> Case:
    force, matter = _two_labels(rng, POLICY_FORCE, POLICY_MATTER)
    text = f"{w.pick(rng, w.PEOPLE, held_out)} {rng.choice(w.FORCES[force])} {rng.choice(w.MATTERS[matter])}"
    fields = {"s": f"{text} in {w.pick(rng, w.CITIES, held_out)}."}
    return fields, _METALS, (POLICY_FORCE[force], POLICY_MATTER[matter])


_DOORS = ("hall", "yard", "tower", "garden")
VISIT_DAY = dict(zip(w.WEEKDAYS, ("yard", "hall", "garden", "tower", "hall", "yard"), strict=True))
VISIT_HOUR = {8: "tower", 9: "tower", 11: "yard", 12: "yard", 14: "hall", 15: "hall", 17: "garden", 18: "garden"}


def _visit(rng: random.Random, held_out: bool) -> Case:
    door = rng.choice(_DOORS)
    day = rng.choice([one for one in VISIT_DAY if VISIT_DAY[one] == door])
    hour = rng.choice([one for one in VISIT_HOUR if VISIT_HOUR[one] != door])
    fields = {
        "r": w.pick(rng, w.REASONS, held_out),
        "d": day,
        "h": f"{hour}:{rng.randrange(0, 60, 5):02d}",
        "n": w.pick(rng, w.FIRST_NAMES, held_out),
    }
    return fields, _DOORS, (VISIT_DAY[day], VISIT_HOUR[hour])


def _papers(rng: random.Random, held_out: bool) -> Case:
    papers = rng.sample(w.half(w.PAPERS, held_out), 3)
    fields = {"l": enumerate_words([f"the {paper}" for paper in papers]), "n": w.pick(rng, w.FIRST_NAMES, held_out)}
    return fields, papers, (papers[2], papers[0])


def _roster(rng: random.Random, held_out: bool) -> Case:
    names = rng.sample(w.half(w.FIRST_NAMES, held_out), 4)
    halls = rng.sample(w.half(w.CITIES, held_out), 2)
    asked = rng.randrange(2)
    fields = {"x": f"{halls[0]}: {names[0]}, {names[1]}", "y": f"{halls[1]}: {names[2]}, {names[3]}", "h": halls[asked]}
    return fields, names, (names[2 * asked], names[2 * asked + 1])


_VERSIONS = dict.fromkeys(
    ("ticket_desk", "ticket_queue", "review_grade", "review_aisle", "parcel_note", "parcel_contents", "tag_color", "tag_use"), 2
)


def _task(name: str, draw: Drawer, *phrasings: str) -> Task:
    return Task(
        name=name, kind="mcq", version=_VERSIONS.get(name, 1), phrasings=tuple(f"{phrasing}\nAnswer:" for phrasing in phrasings), draw=draw
    )


def _pair(case: Callable[[random.Random, bool], Case], words: Mapping[str, Sequence[str]], *phrasings: str) -> tuple[Task, ...]:
    """Two tasks over the same texts: ``words`` maps each name to its words for ``<0>``, ``<1>`` … in the shared phrasings."""
    tasks = []
    for which, (name, own) in enumerate(words.items()):
        filled = list(phrasings)
        for i, word in enumerate(own):
            filled = [phrasing.replace(f"<{i}>", word) for phrasing in filled]
        tasks.append(_task(name, _one_of(case, which), *filled))
    return tuple(tasks)


CANDIDATES: tuple[Task, ...] = (
    *_pair(
        _ticket,
        {"ticket_desk": ("desk",), "ticket_queue": ("queue",)},
        "Ticket from {n}: {s}\nWhich <0> gets it?",
        "{n} writes: {s}\nWhich <0> is this ticket for?",
        "Name the <0> for this ticket. {n}: {s}",
        "Help line, {n} is calling: {s}\nThe <0>?",
        "{n} has opened a ticket: {s}\nTo which <0> does it go?",
    ),
    *_pair(
        _review,
        {"review_grade": ("grade",), "review_aisle": ("aisle",)},
        "Review of {t} by {n}: {s}\nWhich <0> does the shop give it?",
        "{n} bought {t}. {s}\nThe shop's <0>?",
        "Name the shop's <0> for this review of {t}. {n}: {s}",
        "Customer {n} on {t}: {s}\nWhich <0> is noted?",
        "{n} has reviewed {t}: {s}\nWhat <0> does the shop write down?",
    ),
    *_pair(
        _parcel,
        {"parcel_note": ("note",), "parcel_contents": ("contents",)},
        "Parcel for {n} in {c}. Contents: {t}. Note: {s}.\nThe depot goes by the <0>. Which gate?",
        "By its <0>, this parcel leaves through one gate: {t} for {n}, {c}, marked {s}. Which?",
        "{n} in {c} gets {t}. Note: {s}.\nWhich gate, going by the <0>?",
        "Label: {n}, {c}; {t}; {s}.\nSort it by the <0>. Gate?",
        "The depot sends {t} to {n}, {c}, marked {s}.\nWhich gate does it take when sorted by the <0>?",
    ),
    *(
        _task(
            name,
            _tag(name == "tag_color"),
            "Tags: {e}, {f}.\nWhich tag has the {s}?",
            "{n} tags goods: {e}; {f}.\nNow the {s}. Which tag?",
            "{e}. {f}. {s}?",
            "Tag list of {n}.\n{e}\n{f}\nNext: {s}",
            "{n} has tagged two things: {e} and {f}.\nWhich tag does the {s} get?",
        )
        for name in ("tag_color", "tag_use")
    ),
    *_pair(
        _policy,
        {"policy_force": ("binder", "strictness"), "policy_matter": ("drawer", "subject")},
        "House rule: {s}\nWhich <0> by <1>?",
        "File this rule by <1>: {s}\nThe <0>?",
        "{s}\nIn which <0> does this rule belong?",
        "Rules are kept by <1>. Name the <0>.\n{s}",
        "New rule: {s}\nWhich <0> does it go into by its <1>?",
    ),
    *_pair(
        _visit,
        {"visit_day": ("day",), "visit_hour": ("hour",)},
        "Visit: {n}, {r}, {d} {h}.\nDoors are given by the <0>. Which door?",
        "{n} comes on {d} at {h} for: {r}.\nWhich door, by the <0>?",
        "By the <0> of the visit, name the door. {r}, {n}, {d}, {h}.",
        "{d}, {h}, {n}, {r}.\nThe <0> decides on the door. Which one?",
        "{n} has booked: {r}, {d} at {h}.\nWhich door opens for this <0>?",
    ),
    *_pair(
        _papers,
        {"tray_next": ("tray",), "folder_next": ("folder",)},
        "In the <0> are {l}.\nWhich one does {n} sign next?",
        "{n} works through a <0> with {l}.\nNext paper?",
        "{n} has a <0>: {l}.\nWhich paper comes next?",
        "Name the paper that {n} takes next from a <0> with {l}.",
        "{n} has put {l} into the <0>.\nWhich paper is read next?",
    ),
    *_pair(
        _roster,
        {"roster_day": ("day",), "roster_night": ("night",)},
        "Roster\n{x}\n{y}\nWho has the <0> shift in {h}?",
        "{x}\n{y}\nName the person on the <0> shift in {h}.",
        "Shifts. {x}. {y}.\nWho works the <0> in {h}?",
        "Who is in {h} for the <0>?\n{x}\n{y}",
        "{x}\n{y}\nWho takes over the <0> shift of {h}?",
    ),
)
CONFLICTING = tuple((CANDIDATES[i].name, CANDIDATES[i + 1].name) for i in range(0, len(CANDIDATES), 2))
"""Pairs that ask about the same texts and never agree."""
