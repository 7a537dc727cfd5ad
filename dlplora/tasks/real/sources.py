"""The candidates of the public block: tasks with rows on the hub, most of them from BIG-bench.

The paper's own tasks keep their entries of ``tasks.paper.sources``. Local rows of the reasoning tasks come from BIG-Bench Hard if it has
them; the hub entry names BIG-bench, which has the same fields. Records identify the rows by checksum.
"""

from __future__ import annotations

from dlplora.tasks.paper.sources import Source, big_bench_choice, source_of


def _text(name: str, max_new_tokens: int = 32) -> Source:
    return Source(name=name, kind="gen", config=name, max_new_tokens=max_new_tokens)


CANDIDATES: tuple[Source, ...] = (
    source_of("abstract_narrative_understanding"),
    source_of("alpaca"),
    big_bench_choice("boolean_expressions"),
    big_bench_choice("causal_judgment"),
    big_bench_choice("date_understanding"),
    big_bench_choice("disambiguation_qa"),
    source_of("disfl_qa"),
    source_of("epistemic_reasoning"),
    source_of("formal_fallacies_syllogisms_negation"),
    big_bench_choice("geometric_shapes"),
    source_of("goal_step_wikihow"),
    source_of("gsm8k"),
    big_bench_choice("hyperbaton", asks_by_options=True),
    big_bench_choice("implicatures"),
    source_of("linguistics_puzzles"),
    source_of("logical_deduction"),
    big_bench_choice("logical_fallacy_detection"),
    big_bench_choice("movie_recommendation"),
    big_bench_choice("navigate"),
    source_of("news_commentary_de"),
    source_of("object_counting"),
    _text("operators"),
    big_bench_choice("penguins_in_a_table"),
    big_bench_choice("presuppositions_as_nli"),
    source_of("question_selection"),
    source_of("reasoning_about_colored_objects"),
    big_bench_choice("ruin_names"),
    big_bench_choice("salient_translation_error_detection"),
    big_bench_choice("snarks", asks_by_options=True),
    big_bench_choice("sports_understanding"),
    source_of("strategyqa"),
    big_bench_choice("temporal_sequences"),
    _text("tense", 48),
    big_bench_choice("timedial"),
    source_of("tracking_shuffled_objects"),
    big_bench_choice("web_of_lies"),
    source_of("winowhy"),
    _text("word_sorting", 64),
    _text("word_unscrambling", 12),
)
"""In alphabetical order."""
