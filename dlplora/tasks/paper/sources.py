"""The 28 tasks of MeteoRA's list: sources of the rows, and scoring of the answers.

Names, order, hub ids, prompt wordings and which split serves as test: NJUDeepEngine/meteora@6227ac3, ``constant.py``,
``data/dataset_presets.py``, ``data/create_dataset.py``, ``data/dataset_utils.py`` and ``eval/eval.py``. The BIG-bench rows, a folder of
JSON files there, are taken from ``tasksource/bigbench``, which has the same fields and splits.

Revisions: a commit is pinned if public text ties it to the repository and shows that it contains the requested files
(docs/reproduce_paper.md names the sources). BIG-bench is not pinned: its repository is known to contain a loading script, which
``datasets`` no longer runs, and the files of the only other known commit could not be checked. If there is only a script, the hub's own
conversion to Parquet is read (``hub.CONVERTED``). Every record keeps the commit that was resolved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BIG_BENCH = "tasksource/bigbench"
Judge = Literal["exact", "number", "yes_no"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """One task of the list.

    Args:
        name: Task name, also of its expert.
        kind: ``mcq`` if its rows have options, else ``gen``.
        hub_id, config: Data set on the hub and its configuration (the task's own name for BIG-bench).
        revision: Commit of the data set; None takes the newest and records which it was.
        train, test: Splits; ``test`` None means that 90 or so rows are set aside from the training split.
        fields: Names of the columns of question and answer; a dot reaches into a mapping.
        instruction: Line before the question.
        shows_options: Whether the prompt lists the options where the rows themselves do not (``choice: …`` lines, as MeteoRA appends
            them for four tasks; for two more BIG-bench's own text has them, which rows from files lack).
        judge: What ``exact_match`` compares: the text, the last number, or the yes or no it begins with.
        max_new_tokens: Longest generated answer.
        several_lines: Whether an answer may hold newlines; it then ends at the end token only.
        asks_by_options: Whether all rows share one prompt and differ in their options.
    """

    name: str
    kind: Literal["mcq", "gen"]
    hub_id: str = BIG_BENCH
    config: str | None = None
    revision: str | None = None
    train: str = "train"
    test: str | None = "validation"
    fields: tuple[str, str] = ("inputs", "targets")
    instruction: str = ""
    shows_options: bool = False
    judge: Judge = "exact"
    max_new_tokens: int = 64
    several_lines: bool = False
    asks_by_options: bool = False


def big_bench_choice(name: str, *, shows_options: bool = False, asks_by_options: bool = False) -> Source:
    """A multiple-choice task of BIG-bench."""
    return Source(name=name, kind="mcq", config=name, shows_options=shows_options, asks_by_options=asks_by_options)


def _news(language: str, config: str, instruction: str) -> Source:
    return Source(
        name=f"news_commentary_{language}",
        kind="gen",
        hub_id="Helsinki-NLP/news_commentary",
        config=config,
        revision="bbaf548083e788e0e6d2ca68efc325283fe2aff5",
        test=None,
        fields=(f"translation.{language}", "translation.en"),
        instruction=instruction,
        max_new_tokens=128,
    )


SOURCES: tuple[Source, ...] = (
    big_bench_choice("abstract_narrative_understanding", shows_options=True),
    Source(
        name="alpaca",
        kind="gen",
        hub_id="tatsu-lab/alpaca",
        revision="dce01c9b08f87459cf36a430d809084718273017",
        test=None,
        fields=("instruction", "output"),
        max_new_tokens=256,
        several_lines=True,
    ),
    Source(
        name="cnn_dailymail",
        kind="gen",
        hub_id="abisee/cnn_dailymail",
        config="3.0.0",
        revision="96df5e686bee6baa90b8bee7c28b81fa3fa6223d",
        test="test",
        fields=("article", "highlights"),
        instruction="Generate a summarization of the news article.",
        max_new_tokens=160,
        several_lines=True,
    ),
    big_bench_choice("contextual_parametric_knowledge_conflicts"),
    big_bench_choice("cs_algorithms"),
    Source(name="disfl_qa", kind="gen", config="disfl_qa"),
    big_bench_choice("elementary_math_qa"),
    big_bench_choice("epistemic_reasoning"),
    big_bench_choice("formal_fallacies_syllogisms_negation"),
    big_bench_choice("goal_step_wikihow", shows_options=True),
    Source(
        name="gsm8k",
        kind="gen",
        hub_id="openai/gsm8k",
        config="main",
        revision="740312add88f781978c0658806c59bc2815b9866",
        test="test",
        fields=("question", "answer"),
        judge="number",
        max_new_tokens=256,
        several_lines=True,
    ),
    big_bench_choice("language_identification"),
    Source(name="linguistics_puzzles", kind="gen", config="linguistics_puzzles"),
    big_bench_choice("logical_deduction", shows_options=True),
    _news("de", "de-en", "Den folgenden Text ins Englische übersetzen."),
    _news("es", "en-es", "Traducir las siguientes frases al inglés."),
    _news("it", "en-it", "Tradurre le seguenti frasi in inglese."),
    Source(name="object_counting", kind="gen", config="object_counting"),
    Source(name="paragraph_segmentation", kind="gen", config="paragraph_segmentation"),
    big_bench_choice("play_dialog_same_or_different"),
    big_bench_choice("question_selection", shows_options=True),
    big_bench_choice("reasoning_about_colored_objects"),
    Source(name="strategyqa", kind="gen", config="strategyqa", judge="yes_no", max_new_tokens=128),
    Source(name="topical_chat", kind="gen", config="topical_chat", max_new_tokens=128),
    big_bench_choice("tracking_shuffled_objects", shows_options=True),
    big_bench_choice("unit_conversion", shows_options=True),
    big_bench_choice("vitaminc_fact_verification"),
    big_bench_choice("winowhy"),
)
"""In MeteoRA's order, which is alphabetical."""

LEFT_OUT_OF_26 = ("disfl_qa", "object_counting")
"""Which two of the 28 the paper leaves out is not public. These two are *our* choice: MeteoRA judges 19 tasks and GSM8K by accuracy and
eight by BLEU or ROUGE; without two of the free-text ones among the 19 the counts are the paper's 18 and 8."""

PAPER26: tuple[str, ...] = tuple(source.name for source in SOURCES if source.name not in LEFT_OUT_OF_26)


def source_of(name: str) -> Source:
    """The entry of that name.

    Raises:
        KeyError: If there is none; ask ``Suite.task`` first for a good message.
    """
    return next(source for source in SOURCES if source.name == name)
