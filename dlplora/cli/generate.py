"""``dlplora generate``: generate text; with ``--trace``, print the routing weights."""

from __future__ import annotations

import argparse
from typing import Any

from dlplora.errors import GenerationError


def prompt_text(arguments: argparse.Namespace) -> str:
    """The prompt as typed with ``--raw``. Otherwise a typed ``\\n`` is a line break, and nano prompts end with ``Answer:``.

    The embedded experts were trained on that form.
    """
    text = str(arguments.prompt)
    if not arguments.raw:
        text = text.replace("\\n", "\n")
    if any("\ud800" <= character <= "\udfff" for character in text):  # how Python hands on bytes that its locale cannot read
        raise GenerationError("the prompt is not text in the terminal's encoding; pass UTF-8 and set PYTHONUTF8=1 or LC_ALL=C.UTF-8.")
    if arguments.chat or arguments.raw or arguments.pretrained or not text.strip() or text.rstrip().endswith("Answer:"):
        return text
    return f"{text.rstrip()}\nAnswer:"


def run_generate(arguments: argparse.Namespace) -> int:
    """Generate greedily and print the text; with ``--trace`` also the routing weights of each routed sentence."""
    from dlplora.cli.model_options import open_model
    from dlplora.cli.terminal import quiet_loading

    text = prompt_text(arguments)
    quiet_loading(arguments.pretrained)
    model = open_model(arguments)
    trace: list[dict[str, Any]] = []
    prompt = [{"role": "user", "content": text}] if arguments.chat else text
    added = model.generate_text(prompt, max_new_tokens=arguments.max_new_tokens, task_names=arguments.task, do_sample=False, trace=trace)
    print(added.strip())
    if arguments.trace:
        for entry in trace:
            weights = ", ".join(f"{name} {weight:.2f}" for name, weight in sorted(entry["weights"].items(), key=lambda pair: -pair[1]))
            what = "prompt" if entry["sentence_idx"] == 0 else f"after sentence {entry['sentence_idx']}"
            print(f"  {what}: {weights or 'no expert'}  (read: {' '.join(entry['view_text'].split())[-90:]!r})")
    return 0
