"""What several end-to-end tests share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from dlplora.inference.fused_model import FusedCausalLM
from tests.e2e.asked import GATE, ZARGI


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium of the system (``apt-get install chromium``) under playwright; skips where either is absent."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[browser]'")
    chromium = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
    if chromium is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def alone() -> dict[str, str]:
    """What ``generate`` answers."""
    model = FusedCausalLM.from_pretrained(method="dlp")
    found = {}
    for text in (ZARGI, GATE):
        ids = model.tokenizer(f"{text}\nAnswer:", return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=30, do_sample=False)
        found[text] = model.tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return found
