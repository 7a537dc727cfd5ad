"""What a reader of a suite's table must know before any number; written above the table."""

from __future__ import annotations

NOTES: dict[str, str] = {
    "paper_local": (
        "**These are not the paper's numbers, nor comparable with any.** They show that the whole path of `dlplora reproduce paper` runs on real "
        "rows:\n16 of the 28 tasks (those whose rows lay at hand), a Llama of 2.2 million parameters pretrained for minutes on the text of the "
        "training rows\n(prompts and answers apart, no test row), adapters of 80 steps, on two CPU cores that other jobs shared. A model of this "
        "size cannot answer\nmost of these questions: read accuracies against chance, which differs from task to task, and expect ties. Prompts "
        "over 2400 characters are\nleft out of all splits; how many is in the records (`provenance.data`). Latency was not measured."
    )
}
