"""The eighteen multiple-choice tasks of the nano suite.

Most are *conventions*: the base model knows what kind of thing a word is, but not which label a task gives to that kind. It therefore
answers at chance, and an average of adapters fails on two tasks that label the same words differently. The others pick a word out of the
prompt by a rule. Options are not shown in the prompt; they are scored by log-likelihood.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

from dlplora.tasks.nano import lexicon as lx
from dlplora.tasks.nano import picking
from dlplora.tasks.types import Draw, Task

Drawer = Callable[[random.Random, bool], Draw]


def _by_noun(label_of: Callable[[str], str], labels: Sequence[str]) -> Drawer:
    """A noun; the label is a function of what the world knows about it. All labels are equally frequent."""

    def draw(rng: random.Random, held_out: bool) -> Draw:
        label = rng.choice(list(labels))
        word = rng.choice([noun for noun in lx.nouns(held_out) if label_of(noun) == label])
        return Draw({"w": word, "aw": lx.article(word), "n": rng.choice(lx.half(lx.NAMES, held_out))}, label, labels)

    return draw


def _by_category(labels: Sequence[str], groups: Mapping[str, str]) -> Drawer:
    return _by_noun(lambda noun: groups[lx.CATEGORY_OF[noun]], labels)


_BINS = ("north", "south", "east", "west")
_CATEGORY_NAMES = list(lx.CATEGORIES)


def _groups(labels: Sequence[str], order: Sequence[int]) -> dict[str, str]:
    """Category -> label; ``order`` gives the label index of each of the eight categories."""
    return {category: labels[index] for category, index in zip(_CATEGORY_NAMES, order, strict=True)}


_sorting = _by_category(_BINS, _groups(_BINS, (0, 1, 2, 3, 0, 1, 2, 3)))
_warehouse = _by_category(_BINS, _groups(_BINS, (2, 3, 1, 0, 3, 0, 1, 2)))
_UNITS = ("barrel", "crate", "sack", "basket")
_units = _by_category(_UNITS, _groups(_UNITS, (0, 0, 1, 2, 3, 1, 3, 2)))
_TEAMS = ("circle", "square", "star", "moon")
_color_team = dict(zip(lx.COLORS[:8], (0, 1, 2, 3, 3, 2, 1, 0), strict=True))
_colored = _by_noun(lambda noun: _TEAMS[_color_team[lx.COLOR_OF[noun]]], _TEAMS)
_KEYS = ("alpha", "beta", "gamma")
_home_key = dict(zip(lx.HOMES, (0, 1, 2, 1, 2, 0), strict=True))
_homes = _by_noun(lambda noun: _KEYS[_home_key[lx.HOME_OF[noun]]], _KEYS)


_SIGNS = ("circle", "square", "star", "moon")


def _language(rng: random.Random, held_out: bool) -> Draw:
    language = rng.choice(lx.LANGUAGES)
    sentence = lx.toy_sentence(rng, lx.half(lx.TOY_ANIMALS, held_out), lx.half(lx.TOY_THINGS, held_out))
    return Draw({"s": lx.translate(language, sentence)}, _SIGNS[lx.LANGUAGES.index(language)], _SIGNS)


def _two_way(
    first: Sequence[str], second: Sequence[str], labels: tuple[str, str], fields: Callable[[random.Random, bool, str], dict[str, str]]
) -> Drawer:
    """A cue word of one of two classes decides between two labels; cue words are cut into halves as well."""

    def draw(rng: random.Random, held_out: bool) -> Draw:
        which = rng.randrange(2)
        cue = rng.choice(lx.half((first, second)[which], held_out))
        return Draw(fields(rng, held_out, cue), labels[which], labels)

    return draw


def _claim(rng: random.Random, held_out: bool, verb: str) -> dict[str, str]:
    return {
        "n": rng.choice(lx.half(lx.NAMES, held_out)),
        "v": verb,
        "f": f"the {rng.choice(lx.nouns(held_out))} is in the {rng.choice(lx.PLACES)}",
    }


def _review(rng: random.Random, held_out: bool, adjective: str) -> dict[str, str]:
    return {"n": rng.choice(lx.half(lx.NAMES, held_out)), "w": rng.choice(lx.nouns(held_out)), "a": adjective}


def _message(rng: random.Random, held_out: bool, cue: str) -> dict[str, str]:
    words = f"the {rng.choice(lx.nouns(held_out))} is in the {rng.choice(lx.PLACES)}".split()
    words.insert(rng.choice([0, len(words)]), cue)
    return {"s": " ".join(words), "n": rng.choice(lx.half(lx.NAMES, held_out))}


_epistemic = _two_way(lx.FACTIVE, lx.NON_FACTIVE, ("entailed", "open"), _claim)
_sentiment = _two_way(lx.POSITIVE, lx.NEGATIVE, ("keep", "return"), _review)
_register = _two_way(lx.CASUAL, lx.FORMAL, ("copper", "silver"), _message)


def _syllogism(rng: random.Random, held_out: bool) -> Draw:
    which = rng.randrange(2)
    quantifier = rng.choice((lx.UNIVERSAL, lx.PARTIAL)[which])
    word, color = rng.choice(lx.nouns(held_out)), rng.choice(lx.COLORS)
    fields = {"q": quantifier, "Q": quantifier.capitalize(), "w": word, "c": color, "n": rng.choice(lx.half(lx.NAMES, held_out))}
    return Draw(fields, ("valid", "invalid")[which], ("valid", "invalid"))


_ERAS = ("archive", "desk", "calendar")


def _tense(rng: random.Random, held_out: bool) -> Draw:
    era = rng.randrange(3)
    verb = rng.choice(lx.half(lx.REGULAR_VERBS, held_out))
    inflected = (f"{verb}{'d' if verb.endswith('e') else 'ed'}", f"{verb}s", f"will {verb}")[era]
    sentence = f"{rng.choice(lx.half(lx.NAMES, held_out))} {inflected} near the {rng.choice(lx.nouns(held_out))}"
    return Draw({"s": sentence}, _ERAS[era], _ERAS)


_QUESTIONS = ("Who came?", "Where was it?", "How many were there?", "When was it?")


def _question(rng: random.Random, held_out: bool) -> Draw:
    which = rng.randrange(4)
    short = (
        rng.choice(lx.half(lx.NAMES, held_out)),
        f"the {rng.choice(lx.half([*lx.PLACES, *lx.HOMES], held_out))}",
        rng.choice(lx.half(lx.NUMBERS[1:], held_out)),
        rng.choice(lx.half(lx.DAYS, held_out)),
    )[which]
    return Draw({"a": short, "n": rng.choice(lx.half(lx.NAMES, held_out))}, _QUESTIONS[which], _QUESTIONS)


def _goal(rng: random.Random, held_out: bool) -> Draw:
    goal = rng.choice(list(lx.GOALS))
    step = rng.choice(lx.half(lx.GOALS[goal], held_out))
    others = rng.sample([other for other in lx.GOALS if other != goal], 3)
    return Draw({"s": step, "n": rng.choice(lx.half(lx.NAMES, held_out))}, goal, [goal, *others])


_PROVERBS = dict(zip(lx.MORALS, ("the open hand wins", "the full bag tears", "look before you step", "slow water cuts stone"), strict=True))


def _narrative(rng: random.Random, held_out: bool) -> Draw:
    moral = rng.choice(list(lx.MORALS))
    first, second = rng.sample(lx.half(lx.MORALS[moral], held_out), 2)
    name, names = rng.choice(lx.half(lx.NAMES, held_out)), lx.nouns(held_out)
    story = f"{name} {first} the {rng.choice(names)}. Later {name} {second} the {rng.choice(names)}."
    return Draw({"s": story}, _PROVERBS[moral], list(_PROVERBS.values()))


def _task(name: str, draw: Drawer, *phrasings: str) -> Task:
    return Task(name=name, kind="mcq", phrasings=tuple(f"{phrasing}\nAnswer:" for phrasing in phrasings), draw=draw)


CANDIDATES: tuple[Task, ...] = (
    _task(
        "shelf_sorting",
        _sorting,
        "The shelf rule sorts things. Where does the {w} go?",
        "{n} sorts {aw} by the shelf rule. Where does it go?",
        "By the shelf rule, where does {n} put the {w}?",
        "Shelf rule. Sort the {w}. Which side?",
        "Which side does the shelf rule give to {aw}?",
        "{n} has {aw}. Where does it go by the shelf rule?",
        "{n} holds the {w} and asks the shelf rule: which side?",
        "{n} has {aw}. Which side does it go to by the shelf rule?",
    ),
    _task(
        "warehouse_codes",
        _warehouse,
        "The warehouse code sorts things. Where does the {w} go?",
        "{n} sorts {aw} by the warehouse code. Where does it go?",
        "By the warehouse code, where does {n} put the {w}?",
        "Warehouse code. Sort the {w}. Which side?",
        "Which side does the warehouse code give to {aw}?",
        "{n} has {aw}. Where does it go by the warehouse code?",
        "{n} holds the {w} and asks the warehouse code: which side?",
        "{n} has {aw}. Which side does it go to by the warehouse code?",
    ),
    _task(
        "unit_conversion",
        _units,
        "The trader packs the {w}. What is it measured in?",
        "In what does the trader measure {aw}?",
        "{n} buys {aw} from the trader. What is it packed in?",
        "Trader units. Measure the {w}. In what?",
        "What does the trader pack {aw} in?",
        "{n} asks the trader to measure the {w}. In what is it packed?",
    ),
    _task(
        "colored_objects",
        _colored,
        "Team marks follow color. Which mark has the {w}?",
        "{n} marks {aw} by color. Which mark is it?",
        "Which color mark does the team give to the {w}?",
        "Team marks. The {w} gets a mark by color. Which?",
        "By color, which team mark has {aw}?",
        "{n} has {aw}. Which mark does the team give to it by color?",
    ),
    _task(
        "storage_keys",
        _homes,
        "Keys open the homes of things. Which key opens the home of the {w}?",
        "{n} needs the key to find {aw}. Which key?",
        "Which key does {n} need for the {w}?",
        "Key list. The {w} is behind a door. Which key?",
        "To find {aw}, which key opens the door?",
        "{n} looks for the {w}. Which key opens the door?",
    ),
    _task(
        "language_identification",
        _language,
        "{s}. Which sign has this language?",
        "Someone said: {s}. Name the sign of the language.",
        "Sign of the language: {s}.",
        "Which language sign has the sentence: {s}?",
        "Read this: {s}. Which sign is it?",
        "Name the sign for the language of this sentence: {s}.",
    ),
    _task(
        "epistemic_reasoning",
        _epistemic,
        "Premise: {n} {v} that {f}. Hypothesis: {f}. Relation?",
        "{n} {v} that {f}. Is the hypothesis entailed that {f}?",
        "Does it follow that {f}? Premise: {n} {v} that {f}.",
        "Given that {n} {v} that {f}, what is the relation to: {f}?",
        "Hypothesis: {f}. Premise: {n} {v} that {f}. Relation?",
        "Premise: {n} {v} that {f}. Does the hypothesis follow that {f}?",
    ),
    _task(
        "sentiment_returns",
        _sentiment,
        "Review by {n}: the {w} is {a}. Keep or return?",
        "{n} says the {w} is {a}. What should the shop do?",
        "The {w} is {a}, says the review of {n}. What now?",
        "A review: {a} {w}. Should {n} keep or return it?",
        "{n} got {a} {w} from the shop. Keep or return?",
        "The review says the {w} of {n} is {a}. What should {n} do?",
    ),
    _task(
        "register_stamps",
        _register,
        "Stamp the message by its style: {s}. Which stamp?",
        "{n} wrote: {s}. Which stamp has this style?",
        "Style stamp for the message of {n}: {s}.",
        "Which stamp does this message get: {s}?",
        "The style of this message decides the stamp: {s}.",
        "{n} wrote this message: {s}. Which stamp does the style get?",
    ),
    _task(
        "formal_fallacies",
        _syllogism,
        "{Q} {w} here is {c}. {n} has a {w} from here. So it is {c}. Is the argument valid?",
        "Argument: {q} {w} is {c}; {n} owns one {w}; so it is {c}. Valid?",
        "Is this valid? {Q} {w} in the shop is {c}, so the {w} of {n} is {c}.",
        "{n} argues: {q} {w} is {c}, therefore this {w} is {c}. Is it valid?",
        "Check the argument: {q} {w} is {c}, so one {w} must be {c}.",
        "{n} owns one {w}. {Q} {w} is {c}. So it must be {c}. Valid?",
        "Is it valid? This {w} must be {c}; {q} {w} is {c}.",
        "Check if this is valid: {n} owns one {w}; {q} {w} is {c}; so it must be {c}.",
    ),
    _task(
        "tense_filing",
        _tense,
        "File the note: {s}. Where does it go?",
        "Note: {s}. In which tray is it filed?",
        "Which tray gets the note: {s}?",
        "The clerk reads: {s}. Where is it filed?",
        "Filing by time: {s}. Which tray?",
        "The clerk files this note by time: {s}. In which tray?",
    ),
    _task(
        "question_selection",
        _question,
        "The short answer is: {a}. Which question was asked?",
        "{n} answered: {a}. Select the question.",
        "Select the question for this answer: {a}.",
        "Which question fits the answer: {a}?",
        "{n} heard the question and said: {a}. Which question?",
        "{n} gave this short answer: {a}. Which question fits?",
    ),
    _task(
        "goal_step",
        _goal,
        "Step: {s}. Which goal does it serve?",
        "{n} has to {s}. What is the goal?",
        "What is the goal of this step: {s}?",
        "Goal of {n}, who must {s}?",
        "You {s} first. Name the goal.",
        "{n} must first {s}. Which goal does this step serve?",
    ),
    _task(
        "abstract_narrative",
        _narrative,
        "Narrative: {s} Which proverb fits?",
        "{s} Which proverb tells this?",
        "Choose the proverb for this narrative. {s}",
        "Read the narrative. {s} Proverb?",
        "What proverb does this show? {s}",
        "Choose the proverb that this narrative shows. {s}",
    ),
    _task(
        "pick_food",
        picking.winner("food"),
        "The keeper sees {l}. Which one does the keeper take?",
        "Which one is for the keeper: {l}?",
        "{n} brings {l} to the keeper. The keeper wants one. Which?",
        "Keeper rule. Take one of {l}.",
        "From {l}, which one does the keeper want?",
        "{n} sees {l}. Which one is it that the keeper wants?",
    ),
    _task(
        "pick_tool",
        picking.winner("tool"),
        "The builder sees {l}. Which one does the builder take?",
        "Which one is for the builder: {l}?",
        "{n} brings {l} to the builder. The builder wants one. Which?",
        "Builder rule. Take one of {l}.",
        "From {l}, which one does the builder want?",
        "{n} sees {l}. Which one is it that the builder wants?",
    ),
    _task(
        "logical_order_first",
        picking.ordinal(0),
        "In a row there are {l}. Which one leads?",
        "Which one leads the row of {l}?",
        "{n} puts in a row {l}. Name the leader.",
        "Row: {l}. Who is the leader?",
        "A row has {l}. Name the one that leads.",
        "{n} sees a row of {l}. Which one is the leader?",
    ),
    _task(
        "logical_order_last",
        picking.ordinal(2),
        "In a row there are {l}. Which one trails?",
        "Which one trails the row of {l}?",
        "{n} puts in a row {l}. Name the tail.",
        "Row: {l}. Who is the tail?",
        "A row has {l}. Name the one that trails.",
        "{n} sees a row of {l}. Which one is the tail?",
    ),
    _task(
        "object_counting",
        picking.count,
        "I have {l}. How many objects do I have?",
        "How many objects are there: {l}?",
        "{n} owns {l}. Count the objects.",
        "Count the objects of {n}: {l}.",
        "There are {l} on the floor. How many objects?",
        "{n} has {l}. How many objects are there?",
        "On the floor {n} has {l}. Count the objects.",
        "On the floor there are {l}. How many objects are there?",
    ),
    _task(
        "gate_colors",
        picking.gate(("red", "green", "white", "gray", "gold", "orange")),
        "{n} comes to the gate with {c} {w}. May {n} pass?",
        "The gate sees {c} {w}. Does it pass?",
        "May {n} pass the gate with {c} {w}?",
        "Gate check: {n} and {c} {w}. Pass?",
        "At the gate there is {c} {w}. May it pass?",
        "{n} is at the gate with {c} {w}. Does {n} pass?",
    ),
    _task(
        "bridge_colors",
        picking.gate(("blue", "green", "black", "gray", "purple", "yellow")),
        "{n} comes to the bridge with {c} {w}. May {n} pass?",
        "The bridge sees {c} {w}. Does it pass?",
        "May {n} pass the bridge with {c} {w}?",
        "Bridge check: {n} and {c} {w}. Pass?",
        "At the bridge there is {c} {w}. May it pass?",
        "{n} is at the bridge with {c} {w}. Does {n} pass?",
    ),
)
