"""What a reader of a suite's table must know before any number; written above the table."""

from __future__ import annotations

NOTES: dict[str, str] = {
    "paper_local": """\
**These are not the paper's numbers, nor comparable with any.** They show that the whole path of `dlplora reproduce paper` runs on
real rows: those of the 28 tasks whose rows lay at hand, a Llama of about two million parameters pretrained for minutes on the text
of the training rows (prompts and answers apart, no test row), adapters of a hundred or two steps, all on two CPU cores that other jobs
shared. A model of this size cannot answer most of these questions: read an accuracy against chance, which differs from task to
task, and expect ties. Prompts too long for it are left out of all splits; how many, and the checksum of the rest, is in the records
(`provenance.data`). Latency was not measured.""",
}
