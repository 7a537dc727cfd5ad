#!/usr/bin/env bash
# Everything that needs a GPU, in one unattended call of less than nine minutes (every part has a limit, 520 s together):
#   benchmarks/gpu.sh [FOLDER]        records go to FOLDER (default: results/bench)
# First the tests marked "gpu" (a wrong kernel needs no timing). Then the shapes of Qwen-2 1.5B and LLaMA-3 8B in bfloat16, most wanted first:
# compiled decoding with batch 1, 8 and 32 over the bandwidth floor, then eager with gates, prefill, and the backends. Then the training of a
# pool of 26 adapters, and the constants of `auto`, which are written to FOLDER/cost_model-cuda.json. The tables come last.
# DLPLORA_GPU_SMOKE=1 runs the same steps with tiny shapes on a CPU, so that this script is tried wherever the tests run.
# PYTHON names the interpreter (default: .venv/bin/python, else python3).
set -euo pipefail
cd "$(dirname "$0")/.."
OUT="${1:-results/bench}"
PYTHON="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
mkdir -p "$OUT"

if [ "${DLPLORA_GPU_SMOKE:-0}" = 1 ]; then
  CONFIGS="gpu-smoke:600"
  SLOWER=5  # a busy CPU is no reason to cut a trial off
  TRAINING="--device cpu --num-tasks 2 --num-steps 2 --repeats 1 --modes peft_one_by_one,joint"
  CONSTANTS=""
  TESTS="tests/unit/test_bench_timing.py -k median"
else
  "$PYTHON" -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "error: torch finds no GPU; DLPLORA_GPU_SMOKE=1 tries this script on a CPU")'
  CONFIGS="gpu-1.5b:140 gpu-8b:180" # name:seconds; a benchmark that is cut off keeps its finished groups
  TRAINING="--device cuda --num-tasks 26 --num-steps 20 --repeats 1 --modes peft_one_by_one,joint"
  CONSTANTS="--device cuda --repeats 5 --out $OUT/cost_model-cuda.json"
  TESTS="tests/property/test_kernels.py -m gpu"
fi

echo "== correctness" >&2
status=0
timeout "$((60 * ${SLOWER:-1}))" "$PYTHON" -m pytest -q -p no:cacheprovider $TESTS >&2 || status=$?
if [ "$status" -eq 1 ]; then
  echo "error: a GPU test failed; nothing was timed" >&2
  exit 1
fi
# 5: no test is marked. A time-out or a test file that cannot be read says nothing about the kernels.
[ "$status" -eq 0 ] || [ "$status" -eq 5 ] || echo "warning: the GPU tests did not finish (exit $status)" >&2

for entry in $CONFIGS; do
  config="${entry%%:*}"
  echo "== $config" >&2
  timeout "${entry##*:}" "$PYTHON" -m benchmarks.latency_ratios "$config" --out "$OUT" >/dev/null || echo "warning: $config did not finish" >&2
done

echo "== training" >&2
timeout "$((100 * ${SLOWER:-1}))" "$PYTHON" -m benchmarks.training_speed $TRAINING --out "$OUT" >&2 || echo "warning: the training benchmark did not finish" >&2

if [ -n "$CONSTANTS" ]; then
  echo "== constants" >&2
  timeout 40 "$PYTHON" -m benchmarks.kernels $CONSTANTS >&2 || echo "warning: the constants were not measured" >&2
fi

"$PYTHON" -m tests.tools.targets --records "$OUT" --only-speed
for record in "$OUT"/latency-*.json; do
  [ ! -e "$record" ] || "$PYTHON" -c 'import sys; from pathlib import Path
from dlplora.reporting.latency.records import read_latency
from dlplora.reporting.latency.tables import markdown
print("\n" + markdown(read_latency(Path(sys.argv[1]))))' "$record"
done
