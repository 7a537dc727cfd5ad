"""The vocabulary of the skills suite: entities and cue phrases, each split into a training and a held-out half.

Lists of entities are split 60/40 (``half``); the split depends on the words alone. Dates, prices, invented sentences and cue phrases (a
word in a frame) are split by ``kept_out``: their parts occur in training, the combination does not.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

from dlplora.tasks.nano.lexicon import half

FIRST_NAMES = (
    "Nora Omar Lena Hugo Alice Marco Ruth Felix Clara Peter Sofia Jonas Helen Victor Emma Oscar Laura Simon Julia Martin "
    "Grace Daniel Anna Robert Maria Thomas Rosa Edgar Diana Walter Sarah Philip Nina George Carla Henry Olga Frank Paula Arthur"
).split()
SURNAMES = (
    "Lind Vance Moreno Parker Weber Hill Rossi Novak Bell Carter Jensen Stone Costa Meyer Ward Fischer Lopez Grant Silva Brooks "
    "Kelly Foster Nolan Berg Price Turner Wood Haas Reed Mason Cole Duran Shaw Porter Lang Marsh Cook Blake Hunt Young"
).split()
CITIES = (
    "Lisbon Oslo Vienna Dublin Madrid Prague Geneva Athens Warsaw Berlin Paris London Rome Milan Lyon Porto "
    "Boston Denver Chicago Toronto Sydney Tokyo Delhi Cairo Lima Quito Havana Seattle Austin Dallas"
).split()
COMPANIES = "Northgate Bluefin Harrow Solaris Redwood Kestrel Marlow Vertex Oakley Pinecrest Tidewater Summit".split()
WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday".split()
MONTHS = "January February March April May June July August September October November December".split()
NUMBERS = "two three four five six seven eight nine ten twelve twenty thirty".split()

THINGS: dict[str, list[str]] = {
    "kitchen": (
        "kettle pan spoon fork toaster oven teapot mug whisk ladle saucepan blender plate bowl grater colander cup pot skillet "
        "spatula jug microwave teaspoon cooker"
    ).split(),
    "garden": (
        "rake spade hose shovel wheelbarrow hedge-trimmer lawnmower flowerpot hoe sprinkler trowel greenhouse pitchfork birdhouse "
        "fence flowerbed weeder hammock birdbath gazebo leaf-blower plant-pot garden-chair seed-tray"
    ).split(),
    "clothing": (
        "jacket scarf sweater shirt coat skirt glove hat sock raincoat blouse belt cardigan vest tie cap boot sandal tunic hoodie "
        "cloak shawl blazer pullover"
    ).split(),
    "office": (
        "stapler notebook folder pencil envelope calculator printer eraser ruler calendar clipboard pen marker desk keyboard stamp "
        "binder highlighter whiteboard scanner planner notepad ballpoint"
    ).split(),
}
COLORS: dict[str, list[str]] = {
    "red": ["red", "orange", "pink"],
    "blue": ["blue", "purple", "navy"],
    "green": ["green", "olive", "mint"],
    "plain": ["black", "gray", "white"],
}

TICKET_SUBJECTS: dict[str, tuple[list[str], list[str]]] = {
    "device": (
        "laptop screen keyboard printer mouse monitor headset charger webcam scanner tablet projector".split(),
        ["does not switch on", "is broken", "makes a strange noise", "stopped working", "keeps flickering", "overheats"],
    ),
    "money": (
        "invoice,bill,refund,payment,receipt,fee,discount,deposit,credit note,price,subscription,bank transfer".split(","),
        ["is too high", "was charged twice", "shows the wrong amount", "was never paid out", "does not match the contract", "is missing"],
    ),
    "account": (
        "password,login,user name,account,profile,PIN,sign-in page,access code,user role,login page,passcode,security question".split(","),
        ["is not accepted", "is locked", "has expired", "must be reset", "is rejected after the update", "no longer lets me in"],
    ),
    "delivery": (
        "parcel,package,shipment,delivery,box,courier,order,crate,letter,pallet,cargo,truck".split(","),
        [
            "has not arrived",
            "came to the wrong address",
            "is late",
            "was left at the wrong door",
            "is stuck at the depot",
            "got lost on the way",
        ],
    ),
}
URGENCY: dict[str, list[str]] = {
    "now": ["immediately", "at once", "right now", "this very minute"],
    "today": ["today", "tonight", "by the end of the day", "later today"],
    "week": ["this week", "by Friday", "before the weekend", "later this week"],
    "later": ["when you have time", "without any hurry", "at your leisure", "some time or other"],
}
URGENCY_FRAMES = (
    "Please deal with it {}.",
    "I need an answer {}.",
    "It should be solved {}.",
    "Someone should look at it {}.",
    "Could you take care of this {}?",
    "Please reply {}.",
    "I would like it done {}.",
)
VERDICTS: dict[str, list[str]] = {
    "good": ["perfect", "excellent", "wonderful", "great", "fantastic", "superb"],
    "fair": ["average", "okay", "mediocre", "ordinary", "passable", "so-so"],
    "bad": ["terrible", "awful", "horrible", "useless", "dreadful", "broken"],
}
VERDICT_FRAMES = (
    "It is {}.",
    "I find it {}.",
    "In a word: {}.",
    "I would call it {}.",
    "After a week I think it is {}.",
    "It looked {} from the first day.",
    "My whole family says it is {}.",
)
HANDLING: dict[str, list[str]] = {
    "fragile": ["fragile", "breakable", "delicate", "brittle"],
    "cold": ["frozen", "chilled", "refrigerated", "cold"],
    "heavy": ["heavy", "very heavy", "overweight", "bulky"],
    "fast": ["express", "overnight", "urgent", "same-day"],
}
HANDLING_FRAMES = ("{}", "{} goods", "caution, {}", "{}, thank you", "attention: {}", "{} cargo", "{} (see list)")

PEOPLE = "Visitors,Drivers,Nurses,Guests,Students,Tenants,Members,Cleaners,Managers,Trainees,Teachers,Clerks".split(",")
FORCES: dict[str, list[str]] = {
    "must": ["must", "have to", "are required to", "are obliged to", "need to always"],
    "may": ["may", "are allowed to", "are free to", "can if they wish", "are permitted to"],
    "ban": ["must not", "are not allowed to", "are forbidden to", "may never", "are not permitted to"],
    "advice": ["should", "are advised to", "ought to", "would do well to", "are encouraged to"],
}
MATTERS: dict[str, list[str]] = {
    "safety": [
        "wear a helmet",
        "use the fire exit",
        "carry a fire extinguisher",
        "wear safety gloves",
        "touch the alarm",
        "lock the fire door",
    ],
    "money": ["pay in cash", "claim travel costs", "accept a tip", "pay by card", "ask for a refund", "keep the receipts"],
    "data": [
        "copy customer files",
        "share a password",
        "store e-mail addresses",
        "print personal data",
        "delete old files",
        "read the database",
    ],
    "food": ["eat in the hall", "bring lunch", "drink coffee at the desk", "cook in the kitchen", "order pizza", "share snacks"],
}

REASONS = "dentist,haircut,eye test,job interview,tax advice,car repair,music lesson,passport photo,house viewing,flu shot".split(",")
PAPERS = (
    "lease invoice permit contract report letter memo form receipt licence budget survey petition itinerary brochure certificate "
    "agenda proposal transcript warranty"
).split()

TITLE_STARTS = "Annual,Monthly,Spring,Summer,Winter,Final,Short,Public,Local,Draft,Weekly,New".split(",")
TITLE_KINDS = "Report,Guide,Plan,Meeting,Survey,Budget,Review,Letter,Notes,Program".split(",")
TITLE_SUBJECTS = "Water,Traffic,School,Music,Forest,Health,Energy,Market,Garden,Museum,Sports,Travel,Housing,Bridge,Library".split(",")

VOCABULARY: dict[str, dict[str, str]] = {
    "Velka": dict(
        zip(
            "old small red wise dog king child bird sees finds helps calls".split(),
            "tor mik ras vel dun kol pim sav lo ga ni fu".split(),
            strict=True,
        )
    ),
    "Ormu": dict(
        zip(
            "old small red wise dog king child bird sees finds helps calls".split(),
            "ban ced hok jal wes gim zan tup re po su da".split(),
            strict=True,
        )
    ),
}
"""Two invented languages of twelve words; a sentence is translated word by word."""
_SLOTS = ("old small red wise".split(), "dog king child bird".split(), "sees finds helps calls".split())


def kept_out(key: str) -> bool:
    """Whether a date, an amount or a sentence belongs to the 40 % that training never shows; depends on the text alone."""
    return hashlib.sha256(key.encode()).digest()[0] % 5 < 2


def pick(rng: random.Random, words: Sequence[str], held_out: bool) -> str:
    """One word of a half."""
    return rng.choice(half(words, held_out))


def filled(rng: random.Random, words: Sequence[str], frames: Sequence[str], held_out: bool) -> str:
    """A word in a frame, so that the pair is of a half; each word and each frame occurs in both."""
    while True:
        text = rng.choice(frames).format(rng.choice(words))
        if kept_out(text) == held_out:
            return text


def full_name(rng: random.Random, held_out: bool) -> tuple[str, str]:
    """First name and surname."""
    return pick(rng, FIRST_NAMES, held_out), pick(rng, SURNAMES, held_out)


def date(rng: random.Random, held_out: bool) -> tuple[int, int, int]:
    """Year, month, day of a half."""
    while True:
        year, month, day = rng.randrange(1990, 2030), rng.randrange(1, 13), rng.randrange(1, 29)
        if kept_out(f"{year}-{month}-{day}") == held_out:
            return year, month, day


def amount(rng: random.Random, held_out: bool) -> tuple[str, str]:
    """Whole part (one to three digits) and two digits of cents of a half."""
    while True:
        whole, cents = (
            str(rng.choice((rng.randrange(2, 10), rng.randrange(10, 100), rng.randrange(100, 1000)))),
            f"{rng.randrange(100):02d}",
        )
        if kept_out(f"{whole}.{cents}") == held_out:
            return whole, cents


def toy_sentence(rng: random.Random, held_out: bool) -> str:
    """``adjective noun verb adjective noun`` of a half; every word has a translation."""
    adjectives, nouns, verbs = _SLOTS
    while True:
        words = [rng.choice(adjectives), rng.choice(nouns), rng.choice(verbs), rng.choice(adjectives), rng.choice(nouns)]
        if kept_out(" ".join(words)) == held_out:
            return " ".join(words)


def translate(language: str, sentence: str) -> str:
    """Word by word into one of ``VOCABULARY``."""
    return " ".join(VOCABULARY[language][word] for word in sentence.split())
