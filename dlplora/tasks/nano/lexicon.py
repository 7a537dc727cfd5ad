"""The vocabulary of the nano suite and the facts about it.

Everything is a pure function of this file: category members, each noun's colour and home, four toy languages, verbs by class. Entities are
split 60/40 into a training and a held-out half. Both halves occur in the base model's pretraining text, only the training half in the
experts' data.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

NAMES = (
    "Mia Leo Ann Tom Sam Eva Max Zoe Ben Kim Ivy Dan Amy Joe Sue Ned Ray Liv Gus Fay "
    "Roy Meg Hal Ada Ian Uma Ted Lou Kit Jan Eli Nia Bob Pam Rex Tia Vic Wes Yan Abe"
).split()
COLORS = "red blue green black white pink gray brown gold purple orange yellow".split()
PLACES = "park shop school farm river garden market kitchen station harbor".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
NUMBERS = "zero one two three four five six seven eight nine ten".split()

CATEGORIES: dict[str, list[str]] = {
    "animal": (
        "dog cat cow pig hen fox bear wolf goat duck frog mouse horse sheep lion tiger deer rabbit camel monkey snake turtle owl crow"
    ).split(),
    "fruit": (
        "plum apple pear lemon grape peach mango lime fig melon kiwi berry cherry banana papaya apricot olive coconut "
        "guava quince lychee pomelo damson tangerine"
    ).split(),
    "tool": (
        "hammer drill rake shovel axe wrench chisel trowel ladder crowbar mallet screwdriver clamp spanner hoe pickaxe "
        "sickle scythe anvil lever pulley winch sander hatchet"
    ).split(),
    "furniture": (
        "chair table bed lamp sofa desk stool bench clock mirror rug cabinet wardrobe dresser bookcase cradle hammock "
        "armchair couch cupboard sideboard bunk ottoman mattress"
    ).split(),
    "clothing": (
        "hat coat shirt scarf glove sock shoe boot belt dress skirt sweater jacket vest cap apron robe sandal mitten blouse tie cloak "
        "tunic bonnet"
    ).split(),
    "vehicle": (
        "car truck bus train boat ship bicycle plane wagon tractor tram ferry sled canoe scooter van taxi yacht rocket kayak cart barge "
        "jeep glider"
    ).split(),
    "instrument": (
        "guitar piano violin drum flute harp trumpet cello banjo organ tuba lute fiddle bugle oboe clarinet cymbal ukulele "
        "mandolin trombone accordion harmonica xylophone bagpipe"
    ).split(),
    "food": (
        "soup bread cheese cake pie stew pasta rice pancake omelet sandwich pizza noodle muffin cookie waffle porridge salad "
        "pudding dumpling biscuit curry pretzel bagel"
    ).split(),
}
NOUNS = [noun for members in CATEGORIES.values() for noun in members]
CATEGORY_OF = {noun: category for category, members in CATEGORIES.items() for noun in members}
HOMES = "cellar attic garage tent tower cabin".split()

_attributes = random.Random(20)
COLOR_OF = {noun: COLORS[i % 8] for i, noun in enumerate(_attributes.sample(NOUNS, len(NOUNS)))}
HOME_OF = {noun: HOMES[i % len(HOMES)] for i, noun in enumerate(_attributes.sample(NOUNS, len(NOUNS)))}

FACTIVE = "knows learned remembers saw noticed realized discovered proved confirmed recalls".split()
NON_FACTIVE = "thinks believes assumes hopes suspects guesses imagines doubts claims supposes".split()
POSITIVE = "great lovely splendid charming superb delightful wonderful brilliant pleasant excellent perfect joyful".split()
NEGATIVE = "awful nasty horrid dreadful terrible gloomy ugly bitter rotten cruel harsh filthy".split()
CASUAL = "hey,dude,yeah,nope,gonna,wanna,buddy,kinda,yo,cool,dunno,gotta".split(",")
FORMAL = "kindly,hereby,regarding,sincerely,furthermore,madam,sir,shall,respectfully,therefore,moreover,pursuant".split(",")
UNIVERSAL = "all every each any".split()
PARTIAL = "some many several few most".split()
VERBS = "sees likes wants finds takes holds drops paints".split()
REGULAR_VERBS = "walk jump look wait turn talk work call play climb shout smile".split()

GOALS: dict[str, list[str]] = {
    "make tea": ["boil water", "warm the pot", "add the leaves", "fetch the kettle", "pour the milk"],
    "wash a car": ["fill a bucket", "rub the soap", "rinse the wheels", "polish the hood", "dry the windows"],
    "plant a tree": ["dig a hole", "place the roots", "water the soil", "choose a seed", "tie the stem"],
    "paint a wall": ["open the can", "tape the edges", "roll the color", "mix the paint", "cover the floor"],
    "catch a fish": ["tie a hook", "find a worm", "cast the line", "row the boat", "hold the net"],
    "mail a letter": ["write the address", "seal the envelope", "stick a stamp", "fold the page", "drop it in the box"],
    "build a fire": ["gather wood", "stack the logs", "strike a match", "clear the ashes", "blow on the sparks"],
    "sew a shirt": ["cut the cloth", "thread a needle", "iron the seam", "measure the sleeve", "pin the collar"],
    "play a song": ["tune the strings", "read the notes", "press the keys", "count the beat", "lift the bow"],
    "win a race": ["run each morning", "lace the shoes", "listen for the start", "stretch the legs", "keep the pace"],
    "take a photo": ["clean the lens", "check the light", "push the button", "set the focus", "smile and stand"],
    "feed a baby": ["wash the bottle", "test the milk", "hold the head", "wipe the chin", "sit and rock"],
}
MORALS: dict[str, list[str]] = {
    "generous": ["gave away", "shared", "donated", "lent", "handed out", "offered"],
    "greedy": ["grabbed", "hoarded", "kept hidden", "snatched", "locked up", "refused to share"],
    "careless": ["broke", "spilled", "lost", "tripped over", "forgot", "scratched"],
    "patient": ["slowly built", "repaired", "polished", "practised with", "carefully made", "waited for"],
}

_SYLLABLES = {
    "Zargi": ("z g r k".split(), "a o u".split()),
    "Tepak": ("t p k".split(), "a e i".split()),
    "Lunese": ("l n m s".split(), "i e u".split()),
    "Vodri": ("v d r b".split(), "o i a".split()),
}
LANGUAGES = list(_SYLLABLES)
TOY_ANIMALS = CATEGORIES["animal"][:14]
TOY_THINGS = CATEGORIES["clothing"][:7] + CATEGORIES["fruit"][:7]
TOY_COLORS = COLORS[:8]
TOY_PLACES = PLACES[:5]
TOY_WORDS = [*TOY_ANIMALS, *TOY_THINGS, *TOY_COLORS, *VERBS, *TOY_PLACES, "the", "in"]


def _coin_words() -> dict[str, dict[str, str]]:
    """One pronounceable, unused word for each English word in each toy language."""
    rng = random.Random(1234)
    lexicons: dict[str, dict[str, str]] = {}
    used: set[str] = set()
    for language, (consonants, vowels) in _SYLLABLES.items():
        words: dict[str, str] = {}
        for english in TOY_WORDS:
            syllables = 1 if english in ("the", "in") else 2
            while True:
                word = "".join(rng.choice(consonants) + rng.choice(vowels) for _ in range(syllables))
                word += rng.choice(consonants) if syllables == 2 and rng.random() < 0.5 else ""
                if word not in used:
                    break
            used.add(word)
            words[english] = word
        lexicons[language] = words
    return lexicons


DICTIONARY = _coin_words()


def half(words: Sequence[str], held_out: bool) -> list[str]:
    """The 60 % of entities used in training, or the 40 % that are not; the cut depends on the words alone."""
    shuffled = list(words)
    random.Random(7).shuffle(shuffled)
    cut = round(len(shuffled) * 0.6)
    return shuffled[cut:] if held_out else shuffled[:cut]


def nouns_of(category: str, held_out: bool) -> list[str]:
    """Members of one category in one half."""
    return half(CATEGORIES[category], held_out)


def nouns(held_out: bool) -> list[str]:
    """All nouns of one half."""
    return [noun for category in CATEGORIES for noun in nouns_of(category, held_out)]


def article(word: str) -> str:
    """The word with ``a`` or ``an``."""
    return ("an " if word[0] in "aeiou" else "a ") + word


def enumerate_words(words: Sequence[str]) -> str:
    """``x``, ``x and y``, ``x, y and z``."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def toy_sentence(rng: random.Random, animals: Sequence[str] = TOY_ANIMALS, things: Sequence[str] = TOY_THINGS) -> str:
    """An English sentence that every toy language can say word by word."""
    subject = (rng.choice(TOY_COLORS) + " " if rng.random() < 0.5 else "") + rng.choice(animals)
    obj = (rng.choice(TOY_COLORS) + " " if rng.random() < 0.3 else "") + rng.choice(things)
    place = f" in the {rng.choice(TOY_PLACES)}" if rng.random() < 0.3 else ""
    return f"the {subject} {rng.choice(VERBS)} the {obj}{place}"


def translate(language: str, sentence: str) -> str:
    """Word-by-word translation of a toy sentence."""
    return " ".join(DICTIONARY[language][word] for word in sentence.split())


def simple_sentence(rng: random.Random, names: Sequence[str] = NAMES, things: Sequence[str] = NOUNS) -> str:
    """A short statement without a full stop."""
    name, thing, color, place = rng.choice(names), rng.choice(things), rng.choice(COLORS), rng.choice(PLACES)
    return rng.choice(
        [
            f"{name} {rng.choice(VERBS)} the {color} {thing} in the {place}",
            f"the {thing} in the {place} is {color}",
            f"{name} went to the {place} with the {color} {thing}",
        ]
    )


FILLERS = ["um", "uh", "er", "hmm"]


def disfluent(rng: random.Random, sentence: str) -> str:
    """The sentence with one or two fillers, repetitions or self-corrections."""
    words = sentence.split()
    places = rng.sample(range(1, len(words)), min(rng.choice([1, 2]), len(words) - 1))
    out: list[str] = []
    for i, word in enumerate(words):
        if i in places:
            kind = rng.random()
            if kind < 0.5:
                out.append(rng.choice(FILLERS))
            elif kind < 0.75 or (word not in COLORS and word not in CATEGORY_OF):
                out.append(word)
            else:
                out += [rng.choice(COLORS if word in COLORS else NOUNS), "no", "wait"]
        out.append(word)
    return " ".join(out)
