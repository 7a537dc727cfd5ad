"""Notes above the table of a suite: what a reader must know before the numbers."""

from __future__ import annotations

CEILINGS = """\
Results of a perfect router that knows the right expert from some token of the prompt on. The right expert is applied from the first token
(`oracle_whole`, the ceiling of prompt-level and sentence-level routing), from a quarter, half or three quarters of the prompt's tokens on,
from its last token on, or on the answer only (`oracle_answer`). Earlier tokens use no expert, or in the rows `_mean` the average of all.
`oracle_half_mean_upper` keeps the average in the first decoder layer, where a gate reads a token embedding without context: the ceiling of
gates per module. All rows are given the task. Definitions: [docs/ceilings.md](../../docs/ceilings.md)."""

NOTES: dict[str, str] = {
    "real26": """\
**An ordinary classifier is as good as the router here.** Every prompt of this suite clearly belongs to one task: `dlp` keeps one adapter
for every prompt and gives the same answers as `oracle`, and so does `tfidf_linear`, a linear classifier on word counts. The suite shows
what adapters, routing and merging do on a pretrained model; it does not show that fusing several adapters helps. Where the router is in
doubt, see `skills_confusable`. `multitask` is one adapter of the size of one expert, trained on as many rows as all experts together.
Most retrieval methods combine three adapters per prompt, as in their papers, and score lower because of it. Learning rates of gates were
not searched by validation. `meteora_gate` saw a third of the router's training tokens (with a twelfth of them its mean score was 61.6),
the other gates a twelfth. `mole` was tried at two rates: at 1e-3 its gate ended saturated on one adapter per token (23.8), at 1e-4, shown
here, its loss hardly fell, and it scores like `cat`, which has one trained weight per adapter and layer whatever the input; the row says
little about the method. These two choices were made after the test scores were seen, so both rows are optimistic. `llm_choice` names the
first adapter of its menu for nine prompts in ten. Compare gates with their [ceilings](real26_ceilings.md). For tasks whose adapter is
missing, see [unseen tasks](../../docs/unseen_task.md).""",
    "skills_confusable": """\
**Where the router is in doubt, fusing two adapters is worse than taking the likelier one**, with each of three seeds. Four pairs of tasks
whose prompts are drawn from the same texts: `dlp` keeps two adapters for a fifth of the prompts, all of one pair, and answers fewer of
them right than `dlp_top1`, which takes the best one alone. The tasks of a pair contradict each other by design; nothing here says what
fusion does for adapters that complement each other. More:
[docs/real26_suite.md](../../docs/real26_suite.md#tasks-that-a-router-confuses).""",
    "paper_local": """\
**These are not the paper's numbers, and they are not comparable with any others.** They show that the pipeline of
`dlplora reproduce paper` runs on real rows: the tasks whose rows were available locally, a Llama of about two million parameters
pretrained for minutes on the text of the training rows (prompts and answers separately, no test row), and adapters trained for one or two
hundred steps, all on two shared CPU cores. A model of this size cannot answer most of these questions. Compare an accuracy with chance,
which differs from task to task, and expect ties. Prompts that are too long for the model are left out of all splits; the records contain
their number and the checksum of the remaining rows (`provenance.data`). Latency was not measured.""",
    "nano_unseen": """\
Every task is answered by a pool without its expert. The 26 tasks are left out in five groups of five or six, so a pool holds 20 or 21
experts; routers and classifiers were trained without the group. `adapter_soup` and `lorahub_leave_one_out` are given the task and
leave its expert out themselves; their pool holds the other 25. There is no row `multitask`: it was not trained without the tasks. Not
comparable with the table of `nano`, where the expert is in the pool. More: [docs/unseen_task.md](../../docs/unseen_task.md).""",
    "nano_ceilings": CEILINGS,
    "nano_linear_ceilings": CEILINGS,
    "real26_ceilings": CEILINGS,
}
