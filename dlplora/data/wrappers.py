"""Wrappers that users put around prompts (system texts, instruction formats), as noise for router training.

At inference the question is extracted from its wrapper (``inference.question``). A router trained with wrappers also handles wrappers that
this rule does not recognise.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

SYSTEM_SENTENCES = (
    "You are a helpful assistant.",
    "Answer the question as well as you can.",
    "Be polite and give short answers.",
    "Think step by step before you answer.",
    "If you do not know the answer, say so.",
    "Use plain language and do not repeat the question.",
    "You work for a company that sells tools, food and clothes.",
    "Today is Monday.",
    "Never promise anything that is not in the text.",
    "Write numbers as words.",
    "Du bist ein hilfreicher Assistent und antwortest kurz.",
    "Tu es un assistant utile et précis.",
    "Eres un asistente amable.",
    'You can call these tools: [{"name": "search", "parameters": {"query": "string"}}]',
)
FORMATS = (
    "{system}\n\n{prompt}",
    "{system}\n{prompt}",
    "Below is an instruction that describes a task. {system}\n\n### Instruction:\n{prompt}\n\n### Response:\n",
    "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n",
    "[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{prompt} [/INST]",
    "<start_of_turn>user\n{system}\n\n{prompt}<end_of_turn>\n<start_of_turn>model\n",
    "{system} USER: {prompt} ASSISTANT:",
)


def wrapped(prompts: Sequence[str], share: float, seed: int) -> list[str]:
    """The prompts, about ``share`` of them in a random wrapper; a pure function of the arguments.

    Args:
        prompts: Any prompts.
        share: Probability of a wrapper, 0 to 1; 0 returns the prompts as they are.
        seed: Of the draw.
    """
    rng = random.Random(f"wrappers/{seed}")
    found = []
    for prompt in prompts:
        if rng.random() < share:
            system = " ".join(rng.sample(SYSTEM_SENTENCES, rng.randint(1, 8)))
            prompt = rng.choice(FORMATS).format(system=system, prompt=prompt)
        found.append(prompt)
    return found
