#!/usr/bin/env bash
# Everything that needs a GPU, in one unattended call of less than ten minutes (every part has a limit):
#   benchmarks/gpu.sh [FOLDER]        records go to FOLDER (default: results/bench)
# First the tests marked "gpu" (a wrong kernel needs no timing), then the shapes of Qwen-2 1.5B and LLaMA-3 8B in bfloat16: batch 1, 8 and 32,
# eager and compiled, decode over the bandwidth floor; then the training of a pool. A short table comes last.
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
  TESTS="tests/unit/test_bench_timing.py -k median"
else
  "$PYTHON" -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "error: torch finds no GPU; DLPLORA_GPU_SMOKE=1 tries this script on a CPU")'
  CONFIGS="gpu-1.5b:150 gpu-8b:210" # name:seconds; a benchmark that is cut off keeps its finished groups
  TRAINING="--device cuda --num-tasks 10 --num-steps 40 --repeats 1 --modes peft_one_by_one,sequential,joint"
  TESTS="tests -m gpu"
fi

echo "== correctness" >&2
status=0
timeout "$((120 * ${SLOWER:-1}))" "$PYTHON" -m pytest -q -p no:cacheprovider $TESTS >&2 || status=$?
# 5: no test is marked. Anything else but 0 stops here.
if [ "$status" -ne 0 ] && [ "$status" -ne 5 ]; then
  echo "error: the GPU tests failed (exit $status); nothing was timed" >&2
  exit 1
fi

echo "== training" >&2
timeout "$((90 * ${SLOWER:-1}))" "$PYTHON" -m benchmarks.training_speed $TRAINING --out "$OUT" >&2 || echo "warning: the training benchmark did not finish" >&2

for entry in $CONFIGS; do
  config="${entry%%:*}"
  echo "== $config" >&2
  timeout "${entry##*:}" "$PYTHON" -m benchmarks.latency_ratios "$config" --out "$OUT" >/dev/null || echo "warning: $config did not finish" >&2
done
"$PYTHON" -m tests.tools.targets --records "$OUT" --only-speed
