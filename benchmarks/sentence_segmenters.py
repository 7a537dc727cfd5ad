"""Our sentence rule compared with maintained segmenters: ``python -m benchmarks.sentence_segmenters run``, then ``report``.

Needs ``pip install pysbd sentence-splitter``. The passages are generated from sentence templates written for this comparison in twelve
languages, so the right boundaries are known: three sentences each, with the abbreviations, initials, ordinals, decimals, quotations and
short answers of the language. ``F1`` is over boundaries inside a passage; times are µs per passage.
"""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from benchmarks.docs_table import command
from dlplora.inference.sentences import sentence_end_positions
from dlplora.provenance import provenance
from dlplora.reporting import markdown

PASSAGES = 150

TEMPLATES: dict[str, list[str]] = {
    "en": [
        "Dr. {name} paid {n}.50 dollars for it.", "The answer is no.", "J. R. {name} lives at No. {n} on the hill.", "We met at {n} p.m.",
        "He said \"I know.\"", "Is it far?", "They moved to the U.S. Army base.", "The price rose by {n}.2 percent on Jan. {n}.",
        "{name} likes tea, e.g. green tea.", "See Fig. {n} for more.", "What a day!", "I work for {name} Inc.", "So do I.",
    ],
    "de": [
        "Dr. {name} kam am {n}. Mai an.", "Das kostet {n},50 Euro.", "Wir essen gern Obst, z. B. Äpfel.", "Die Antwort ist nein.",
        "Er wohnt in der Nr. {n} am Markt.", "Kommst du mit?", "Das war im {n}. Jahrhundert.", "Frau {name} sagte: „Ich weiß es.“",
        "Prof. {name} liest am 3. Juli.", "Wie schön!", "Sie kauft Brot, Käse usw.", "Es ist kalt.",
    ],
    "fr": [
        "M. {name} est arrivé à {n} h.", "Cela coûte {n},50 euros.", "La réponse est non.", "Mme {name} habite au no. {n} de la rue.",
        "Viens-tu demain ?", "Quelle belle journée !", "Il aime les fruits, p. ex. les pommes.", "Dr. {name} lit le journal.",
        "Nous avons vu le film.", "Voir fig. {n} pour la suite.",
    ],
    "es": [
        "El Dr. {name} llegó a las {n}.", "Cuesta {n},50 euros.", "La respuesta es no.", "La Sra. {name} vive en el núm. {n} de la calle.",
        "¿Vienes mañana?", "¡Qué día tan bonito!", "Compró pan, queso, etc.", "Nos vimos en la plaza.", "El Sr. {name} dijo que sí.",
    ],
    "it": [
        "Il dott. {name} è arrivato alle {n}.", "Costa {n},50 euro.", "La risposta è no.", "Il sig. {name} abita qui.", "Vieni domani?",
        "Che bella giornata!", "Ha comprato pane, vino ecc.", "Vedi fig. {n} per i dettagli.", "Ci siamo visti in piazza.",
    ],
    "nl": [
        "Dr. {name} kwam om {n} uur.", "Het kost {n},50 euro.", "Het antwoord is nee.", "Mevr. {name} woont op nr. {n} in de straat.",
        "Kom je morgen?", "Wat een mooie dag!", "Wij eten fruit, bijv. appels.", "Zie fig. {n} voor meer.", "Het regent vandaag.",
    ],
    "pl": [
        "Dr {name} przyszedł o {n}.", "To kosztuje {n},50 zł.", "Odpowiedź brzmi nie.", "Mieszkam tu od dawna.", "Idziesz jutro?",
        "Jaki piękny dzień!", "Prof. {name} czyta książkę.", "Spotkaliśmy się na rynku.",
    ],
    "ru": [
        "Проф. {name} приехал в {n} часов.", "Это стоит {n},50 рубля.", "Ответ нет.", "Он живёт на ул. Мира.", "Ты придёшь завтра?",
        "Какой чудесный день!", "Мы купили хлеб, сыр и т. д.", "См. рис. {n} в книге.", "Они встретились на площади.",
    ],
    "hi": [
        "{name} घर गया।", "यह {n}.50 रुपये का है।", "उत्तर नहीं है।", "क्या तुम कल आओगे?", "कितना सुंदर दिन है!", "हम बाज़ार में मिले।",
        "उसने फल खरीदे।",
    ],
    "ar": [
        "وصل {name} في الساعة {n}.", "ثمنه {n}.50 دولار.", "الجواب لا.", "هل ستأتي غدا؟", "ما أجمل هذا اليوم!", "التقينا في السوق.",
        "اشترى الخبز والجبن.",
    ],
    "zh": [
        "{name}昨天来了。", "这个要{n}.50元。", "答案是不。", "你明天来吗？", "今天天气真好！", "他说：“我知道。”", "我们在市场见面。",
    ],
    "ja": [
        "{name}さんは{n}時に来ました。",
        "値段は{n}.5ドルです。", "答えはいいえです。", "明日来ますか？", "いい天気ですね！",
        "「知っている。」と彼は言った。",
        "市場で会いました。",
    ],
}  # fmt: skip
NAMES = {
    "ru": ["Иванов", "Петров", "Смирнов"], "hi": ["राम", "मोहन", "सीता"], "ar": ["أحمد", "خالد", "سمير"], "zh": ["小明", "王芳", "李强"],
    "ja": ["田中", "佐藤", "鈴木"],
}  # fmt: skip
LATIN_NAMES = ["Kim", "Roy", "Novak", "Costa", "Braun", "Dupont"]
UNSPACED = {"zh", "ja"}

Segmenter = Callable[[str], list[int]]


def passages(language: str, num: int) -> list[tuple[str, list[int]]]:
    """Passages of three different sentences with the boundaries inside, a pure function of the arguments."""
    rng = random.Random(f"segmenters/{language}")
    made = []
    for _ in range(num):
        sentences = [
            template.replace("{name}", rng.choice(NAMES.get(language, LATIN_NAMES))).replace("{n}", str(rng.randrange(2, 12)))
            for template in rng.sample(TEMPLATES[language], 3)
        ]
        gap = "" if language in UNSPACED else " "
        ends = [end - len(gap) for end in accumulate(len(sentence) + len(gap) for sentence in sentences)]
        made.append((gap.join(sentences), ends[:-1]))
    return made


def _ends_of(text: str, pieces: Sequence[str]) -> list[int]:
    """Where the pieces that a segmenter gave end in the text; the end of the text is left out."""
    ends, at = [], 0
    for piece in pieces:
        at = text.index(piece.strip(), at) + len(piece.strip())
        ends.append(at)
    return [end for end in ends if end < len(text.rstrip())]


def ours(language: str) -> Segmenter:
    """The rule of ``dlplora.inference.sentences``, which needs no language."""
    return lambda text: [end for end in sentence_end_positions(text) if end < len(text)]


def pysbd_segmenter(language: str) -> Segmenter:
    """pySBD."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pysbd
    segmenter = pysbd.Segmenter(language=language, clean=False)
    return lambda text: _ends_of(text, segmenter.segment(text))


def koehn_segmenter(language: str) -> Segmenter | None:
    """sentence-splitter (Koehn and Schroeder's heuristics); None where it has no list for the language."""
    from sentence_splitter import SentenceSplitter, SentenceSplitterException

    try:
        splitter = SentenceSplitter(language=language)
    except SentenceSplitterException:
        return None
    return lambda text: _ends_of(text, splitter.split(text))


SEGMENTERS: dict[str, Callable[[str], Segmenter | None]] = {
    "ours": ours,
    "pysbd": pysbd_segmenter,
    "sentence-splitter": koehn_segmenter,
}


def f1(found: Sequence[list[int]], truth: Sequence[list[int]]) -> float:
    """Harmonic mean of precision and recall over all boundaries."""
    hits = sum(len(set(a) & set(b)) for a, b in zip(found, truth, strict=True))
    return 2 * hits / max(1, sum(map(len, found)) + sum(map(len, truth)))


def measure(num: int) -> dict[str, Any]:
    """The whole record."""
    languages: dict[str, Any] = {}
    for language in TEMPLATES:
        made = passages(language, num)
        texts, truth = [text for text, _ in made], [ends for _, ends in made]
        row: dict[str, Any] = {}
        found: dict[str, list[list[int]]] = {}
        for name, make in SEGMENTERS.items():
            segment = make(language)
            if segment is None:
                continue
            start = time.perf_counter()
            found[name] = [segment(text) for text in texts]
            seconds = time.perf_counter() - start

            row[name] = {
                "f1": f1(found[name], truth),
                "agreement_with_ours": f1(found[name], found["ours"]),
                "us_per_passage": 1e6 * seconds / num,
            }
        languages[language] = row
    return {"passages": num, "sentences": 3 * num * len(TEMPLATES), "languages": languages, "provenance": provenance()}


def table(record: dict[str, Any]) -> str:
    """The record as Markdown; percent, and microseconds per passage."""
    header = ["language", "F1: ours", "pySBD", "sentence-splitter", "agreement ours, pySBD", "µs: ours", "pySBD", "sentence-splitter"]
    rows = []
    for language, row in record["languages"].items():
        cells = [
            language,
            *(f"{100 * row[name]['f1']:.1f}" if name in row else "" for name in SEGMENTERS),
            f"{100 * row['pysbd']['agreement_with_ours']:.1f}",
            *(f"{row[name]['us_per_passage']:.0f}" if name in row else "" for name in SEGMENTERS),
        ]
        rows.append(cells)
    return markdown.table(header, rows)


def main() -> None:
    """Read the command line."""
    command(__doc__, lambda arguments: measure(arguments.size), table, name="sentence_segmenters", size="--passages", default=PASSAGES)


if __name__ == "__main__":
    main()
