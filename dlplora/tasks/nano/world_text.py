"""Pretraining documents of the nano suite.

The documents teach the base model which words are similar, what the toy languages mean, and how to copy, order, count and rewrite. They
contain no task prompt with its answer and no task label scheme; the names of languages, sides, marks and stamps occur only in prompts
without answers and in lists of words in random order. ``§`` in a document toggles between set-up text that cannot be predicted (low loss
weight) and text that follows from what came before (full weight).
"""

from __future__ import annotations

import random
from collections.abc import Callable

from dlplora.tasks.nano import lexicon as lx

Writer = Callable[[random.Random], str]


def _category(rng: random.Random) -> str:
    category = rng.choice(list(lx.CATEGORIES))
    one, two, three = rng.sample(lx.CATEGORIES[category], 3)
    return rng.choice(
        [
            f"{lx.article(one).capitalize()} is§ {category}, like {lx.article(two)} and {lx.article(three)}.",
            f"The {one} is a kind of§ {category}.§ So is the§ {two}.",
            f"They have many§ {category}§ things:§ {one}, {two}, {three}.",
            f"The {one} and the {two} are both§ {category}.",
            f"Among {category} things is the§ {one}.",
        ]
    )


def _attributes(rng: random.Random) -> str:
    noun, other = rng.sample(lx.NOUNS, 2)
    return rng.choice(
        [
            f"The {noun} is§ {lx.COLOR_OF[noun]}.§ The {other} is§ {lx.COLOR_OF[other]}.",
            f"The {noun} lives in the§ {lx.HOME_OF[noun]}.§ The {other} lives in the§ {lx.HOME_OF[other]}.",
            f"A true {noun} is always§ {lx.COLOR_OF[noun]}§ and found in the§ {lx.HOME_OF[noun]}.",
            f"Go to the {lx.HOME_OF[noun]} for the§ {noun}.",
            f"{rng.choice(lx.NAMES)} found the {noun} in the§ {lx.HOME_OF[noun]}, {lx.COLOR_OF[noun]} as ever.",
        ]
    )


def _pick(rng: random.Random) -> str:
    categories = rng.sample(list(lx.CATEGORIES), rng.choice([3, 3, 4]))
    words = [rng.choice(lx.CATEGORIES[category]) for category in categories]
    text = f"{rng.choice(lx.NAMES)} found {lx.enumerate_words([lx.article(word) for word in words])}."
    for i in rng.sample(range(len(words)), 2):
        text += rng.choice([f" The {categories[i]} was the§ {words[i]}.§", f" The {words[i]} was the§ {categories[i]}.§"])
    return text


def _order(rng: random.Random) -> str:
    words = rng.sample(lx.NOUNS, rng.choice([3, 3, 3, 4]))
    text = f"{rng.choice(lx.NAMES)} named {lx.enumerate_words([lx.article(word) for word in words])}."
    ends = [
        f" It began with the§ {words[0]}.§",
        f" It ended with the§ {words[-1]}.§",
        f" First was the§ {words[0]}§ and last the§ {words[-1]}.§",
    ]
    return text + "".join(rng.sample(ends, 2))


def _count(rng: random.Random) -> str:
    number = rng.randrange(1, 6)
    words = rng.sample(lx.NOUNS, number)
    listed = lx.enumerate_words([lx.article(word) for word in words])
    return rng.choice(
        [f"{listed.capitalize()} make§ {lx.NUMBERS[number]}.", f"On the table were {listed}. That was§ {lx.NUMBERS[number]}§ in all."]
    )


def _copy(rng: random.Random) -> str:
    if rng.random() < 0.5:
        pool = [*lx.NAMES, *lx.NOUNS, *lx.COLORS, *lx.PLACES]
        said = " ".join(rng.choice(pool) for _ in range(rng.randrange(4, 12)))
    else:
        said = lx.simple_sentence(rng)
    return rng.choice([f"{said}. Again:§ {said}.", f"{said} |§ {said} |"])


def _lead(rng: random.Random) -> str:
    said = [lx.simple_sentence(rng) for _ in range(rng.choice([2, 3]))]
    text = ". ".join(said) + "."
    return rng.choice([f"{text} At first:§ {said[0]}.", f"{text} At the end:§ {said[-1]}."])


_REGION = {"Zargi": "north", "Tepak": "south", "Lunese": "hills", "Vodri": "coast"}


def _languages(rng: random.Random) -> str:
    language = rng.choice(lx.LANGUAGES)
    lines = [lx.translate(language, lx.toy_sentence(rng)) for _ in range(rng.choice([1, 2]))]
    return "§" + ". ".join(lines) + "."


def _parallel(rng: random.Random) -> str:
    language = rng.choice(lx.LANGUAGES[:3])
    sentence = lx.toy_sentence(rng)
    said = lx.translate(language, sentence)
    region = _REGION[language]
    return rng.choice(
        [
            f"{sentence} | people of the {region} |§ {said} |",
            f"{said} |§ people of the {region} | {sentence} |",
            f"{sentence}. By the {region} they say§ {said}.",
            f"{said}. They mean§ {sentence}.",
        ]
    )


def _dictionary(rng: random.Random) -> str:
    language = rng.choice(lx.LANGUAGES[:3])
    words = rng.sample(lx.TOY_WORDS, 3)
    pairs = [f" {lx.DICTIONARY[language][word]} means§ {word}.§" for word in words]
    if rng.random() < 0.5:
        pairs = [f" {word} is§ {lx.DICTIONARY[language][word]}.§" for word in words]
    return f"Words of the {_REGION[language]}:" + "".join(pairs)


def _belief(rng: random.Random) -> str:
    fact = f"the {rng.choice(lx.NOUNS)} is in the {rng.choice(lx.PLACES)}"
    name = rng.choice(lx.NAMES)
    if rng.random() < 0.5:
        return f"{name} {rng.choice(lx.FACTIVE)} that {fact}. So§ it is certain that§ {fact}."
    return f"{name} {rng.choice(lx.NON_FACTIVE)} that {fact}. So§ perhaps it is false that§ {fact}."


def _quantity(rng: random.Random) -> str:
    noun, color = rng.choice(lx.NOUNS), rng.choice(lx.COLORS)
    if rng.random() < 0.5:
        return f"{rng.choice(lx.UNIVERSAL)} {noun} was {color}, so§ none was missing and this one too is {color}."
    return f"{rng.choice(lx.PARTIAL)} {noun} was {color}, but§ there were others and this one may be different."


def _feeling(rng: random.Random) -> str:
    noun, name = rng.choice(lx.NOUNS), rng.choice(lx.NAMES)
    good = rng.random() < 0.5
    one, two = rng.sample(lx.POSITIVE if good else lx.NEGATIVE, 2)
    after = rng.choice(["smiled and was glad", "loved it"] if good else ["frowned and was sad", "hated it"])
    return rng.choice(
        [
            f"The {noun} was {one}, so {name}§ {after}.",
            f"What {lx.article(one)} {noun}, so§ {two}!§ {name}§ {after}.",
            f"The {one} {noun} made {name}§ {'glad' if good else 'sad'}.",
        ]
    )


def _style(rng: random.Random) -> str:
    statement = f"the {rng.choice(lx.NOUNS)} is in the {rng.choice(lx.PLACES)}"
    casual = rng.random() < 0.5
    one, two = rng.sample(lx.CASUAL if casual else lx.FORMAL, 2)
    who = "kid" if casual else "judge"
    return rng.choice([f"{one} {statement}§ {two}, said the {who}.", f"The {who} says:§ {one}§ {statement}§ {two}."])


def _time(rng: random.Random) -> str:
    name, verb, noun = rng.choice(lx.NAMES), rng.choice(lx.REGULAR_VERBS), rng.choice(lx.NOUNS)
    past = f"{verb}{'d' if verb.endswith('e') else 'ed'}"
    form, when = rng.choice([(past, "yesterday"), (f"{verb}s", "today"), (f"will {verb}", "tomorrow")])
    return rng.choice([f"{name} {form} near the {noun}§ {when}.", f"{when.capitalize()} {name}§ {form}§ near the {noun}."])


def _goal(rng: random.Random) -> str:
    goal = rng.choice(list(lx.GOALS))
    one, two = rng.sample(lx.GOALS[goal], 2)
    name = rng.choice(lx.NAMES)
    return rng.choice(
        [
            f"You {one} and§ {two} when you want to§ {goal}.",
            f"To {goal},§ {one}, then {two}.",
            f"{name} wanted to {goal}, so {name} had to§ {one}.",
            f"{name} had to {one} because {name} wanted to§ {goal}.",
        ]
    )


def _moral(rng: random.Random) -> str:
    moral = rng.choice(list(lx.MORALS))
    one, two = rng.sample(lx.MORALS[moral], 2)
    name = rng.choice(lx.NAMES)
    first, second = rng.choice(lx.NOUNS), rng.choice(lx.NOUNS)
    return rng.choice(
        [
            f"{name} {one} the {first}. How§ {moral}!",
            f"{name} is {moral}: {name}§ {one}§ the {first} and§ {two}§ the {second}.",
            f"{name} {one} the {first} and§ {two}§ the {second}.§ How {moral}!",
        ]
    )


def _repair(rng: random.Random) -> str:
    sentence = lx.simple_sentence(rng)
    return f"{rng.choice(lx.NAMES)} muttered, {lx.disfluent(rng, sentence)}, that is§ {sentence}."


def _record(rng: random.Random) -> str:
    name, color, place, day, item = (
        rng.choice(lx.NAMES),
        rng.choice(lx.COLORS),
        rng.choice(lx.PLACES),
        rng.choice(lx.DAYS),
        rng.choice(lx.NOUNS),
    )
    fields = [f"day {day}", f"place {place}", f"item {color} {item}"]
    rng.shuffle(fields)
    return rng.choice(
        [
            f"Card of {name}: {', '.join(fields)}. {name}§ comes on {day} to the {place} with {lx.article(color)} {item}.",
            f"Card of {name}: {', '.join(fields)}. At the§ {place}§ on§ {day}§ {name} has§ {lx.article(color)} {item}.",
        ]
    )


def _manners(rng: random.Random) -> str:
    thing = f"{rng.choice(['bring', 'take', 'wash', 'paint', 'find'])} the {rng.choice(lx.COLORS)} {rng.choice(lx.NOUNS)}"
    thing += rng.choice([f" to {rng.choice(lx.NAMES)}", f" to the {rng.choice(lx.PLACES)}", f" of {rng.choice(lx.NAMES)}", ""])
    one, two = rng.sample(lx.NAMES, 2)
    liked = rng.choice([f"the {rng.choice(lx.COLORS)} {rng.choice(lx.NOUNS)}", f"the {rng.choice(lx.NOUNS)} of {rng.choice(lx.NAMES)}"])
    return rng.choice(
        [
            f"{one} told {two}: {thing}. {two} said: could you please§ {thing} instead?",
            f"{one} likes {liked}. {two} likes§ {liked} too.",
            f"Yes, I like {liked}, said {one}. And {two} also said: I like§ {liked}.",
        ]
    )


def _daily(rng: random.Random) -> str:
    one, two = rng.sample(lx.NAMES, 2)
    color, noun, place, day, number = (
        rng.choice(lx.COLORS),
        rng.choice(lx.NOUNS),
        rng.choice(lx.PLACES),
        rng.choice(lx.DAYS),
        rng.choice(lx.NUMBERS[1:]),
    )
    return rng.choice(
        [
            f"{one} came to the {place} on {day}. {one} saw {lx.article(color)} {noun} there.",
            f"On {day} there were {number} people in the {place}, {one} and {two} among them.",
            f"{one} and {two} met on {day} by the {rng.choice(lx.HOMES)} of the {place}.",
            f"{lx.toy_sentence(rng).capitalize()}. {one} {rng.choice(lx.VERBS)} it.",
            f"{one} has {lx.enumerate_words([lx.article(rng.choice(lx.NOUNS)) for _ in range(rng.randrange(2, 5))])}.",
        ]
    )


def _question(rng: random.Random) -> str:
    """Questions about the world, so that the base model answers what it is asked; no task asks any of these."""
    noun, name = rng.choice(lx.NOUNS), rng.choice(lx.NAMES)
    category = lx.CATEGORY_OF[noun]
    kind = rng.randrange(10)
    if kind < 2:
        asked = [
            f"What kind is the {noun}?",
            f"{name} asks what kind {lx.article(noun)} is.",
            f"Tell the kind of {lx.article(noun)} to {name}.",
        ]
        answer = category
    elif kind == 2:
        asked = [f"What color is the true {noun}?", f"{name} paints {lx.article(noun)} as it is. What color?", f"The {noun}: what color?"]
        answer = lx.COLOR_OF[noun]
    elif kind == 3:
        asked = [f"Where does the {noun} live?", f"{name} wants the {noun}. Where is it found?", f"In what place is {lx.article(noun)}?"]
        answer = lx.HOME_OF[noun]
    elif kind < 6:
        rivals = rng.sample([other for other in lx.CATEGORIES if other != category], 2)
        words = [noun, *(rng.choice(lx.CATEGORIES[rival]) for rival in rivals)]
        rng.shuffle(words)
        listed = lx.enumerate_words([lx.article(word) for word in words])
        asked = [
            f"{name} has {listed}. What is the {category}?",
            f"Find the {category} in {listed}.",
            f"What {category} is there: {listed}?",
        ]
        answer = noun
    elif kind == 6:
        language = rng.choice(lx.LANGUAGES)
        said = lx.translate(language, lx.toy_sentence(rng))
        asked = [f"{said}. Where do they say this?", f"Where does {name} hear: {said}?", f"People said: {said}. Where?"]
        answer = _REGION[language]
    elif kind == 7:
        color, place, day = rng.choice(lx.COLORS), rng.choice(lx.PLACES), rng.choice(lx.DAYS)
        card = f"Card of {name}: day {day}, place {place}, item {color} {noun}."
        which, answer = rng.choice([("day", day), ("place", place), ("item", f"{color} {noun}")])
        asked = [f"{card} What is the {which}?", f"What {which} is on it? {card}"]
    else:
        asked, answer = _judgement(rng, name, noun)
    return f"{rng.choice(asked)}\nAnswer:§ {answer}"


def _judgement(rng: random.Random, name: str, noun: str) -> tuple[list[str], str]:
    """Questions with an answer that depends on one word: feeling, certainty, time, character, manner, number."""
    which = rng.randrange(2)
    kind = rng.randrange(6)
    if kind == 0:
        word = rng.choice((lx.POSITIVE, lx.NEGATIVE)[which])
        return [f"The {noun} was {word}. How did {name} feel?", f"How does {lx.article(word)} {noun} make {name}?"], ("glad", "sad")[which]
    if kind == 1:
        word = rng.choice((lx.FACTIVE, lx.NON_FACTIVE)[which])
        fact = f"the {noun} is in the {rng.choice(lx.PLACES)}"
        return [f"{name} {word} that {fact}. Certain?", f"How sure is it? {name} {word} that {fact}."], ("certain", "perhaps")[which]
    if kind == 2:
        verb, when = rng.choice(lx.REGULAR_VERBS), rng.choice(["yesterday", "today", "tomorrow"])
        form = {"yesterday": f"{verb}{'d' if verb.endswith('e') else 'ed'}", "today": f"{verb}s", "tomorrow": f"will {verb}"}[when]
        return [f"{name} {form} near the {noun}. When was that?", f"When? {name} {form} near the {noun}."], when
    if kind == 3:
        moral = rng.choice(list(lx.MORALS))
        act = rng.choice(lx.MORALS[moral])
        return [f"{name} {act} the {noun}. How is {name}?", f"How is one who {act} the {noun}?"], moral
    if kind == 4:
        word = rng.choice((lx.CASUAL, lx.FORMAL)[which])
        statement = f"the {noun} is in the {rng.choice(lx.PLACES)}"
        return [f"{word} {statement}. Who said so?", f"Who said: {statement} {word}?"], ("kid", "judge")[which]
    word, color = rng.choice((lx.UNIVERSAL, lx.PARTIAL)[which]), rng.choice(lx.COLORS)
    return [f"{word} {noun} was {color}. Are there others?", f"Are there others, if {word} {noun} is {color}?"], ("none", "others")[which]


def _vocabulary(rng: random.Random) -> str:
    """Task words in random order, so that every token has been seen; no relation between them is shown."""
    return " ".join(rng.choice(task_words()) for _ in range(rng.randrange(5, 12)))


def _bare_prompt(rng: random.Random) -> str:
    """A training-phrasing prompt without its answer, so that question forms are not foreign."""
    from dlplora.tasks.nano import nano_candidates

    task = rng.choice(nano_candidates())
    assert task.draw is not None
    return rng.choice(task.phrasings[:-1]).format(**task.draw(rng, False).fields)


_words: list[str] = []


def task_words() -> list[str]:
    """All words in prompts and options of the suite, sorted; computed once."""
    import re

    from dlplora.tasks.nano import nano_candidates

    if not _words:
        found: set[str] = set()
        for task in nano_candidates():
            for item in task.items("train", 120, seed=99):
                found.update(re.findall(r"[A-Za-z:;?]+", " ".join([item.prompt, item.answer, *(item.choices or ())])))
            for template in task.phrasings:
                found.update(re.findall(r"[A-Za-z]+", re.sub(r"\{\w+\}", " ", template)))
        _words.extend(sorted(found))
    return _words


MIX: tuple[tuple[Writer, int], ...] = (
    (_category, 4), (_attributes, 5), (_pick, 4), (_order, 3), (_count, 2), (_copy, 3), (_lead, 3), (_languages, 2),
    (_parallel, 4), (_dictionary, 1), (_belief, 1), (_quantity, 1), (_feeling, 2), (_style, 2), (_time, 2), (_goal, 2),
    (_moral, 2), (_repair, 3), (_record, 2), (_manners, 2), (_daily, 3), (_vocabulary, 2), (_bare_prompt, 4), (_question, 10),
)  # fmt: skip


def documents(num: int, seed: int) -> list[str]:
    """``num`` documents with ``§`` marks, a pure function of the arguments."""
    rng = random.Random(f"nano-world/{seed}")
    writers = [writer for writer, weight in MIX for _ in range(weight)]
    return [rng.choice(writers)(rng) for _ in range(num)]
