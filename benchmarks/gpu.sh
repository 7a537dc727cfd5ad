#!/usr/bin/env bash
# Everything that needs a GPU, in one unattended call of less than nine minutes (every part has a limit, 520 s together):
#   benchmarks/gpu.sh [FOLDER]        records go to FOLDER (default: results/bench)
# The shapes of Qwen-2 1.5B and LLaMA-3 8B in bfloat16 are compiled in processes of their own, six at a time, which takes minutes (half a minute
# to a minute a system) and leaves the GPU idle. Meanwhile the tests marked "gpu" run, the training of a pool of 26 adapters is timed, and the
# constants of `auto` are measured (written to FOLDER/cost_model-cuda.json); those processes hold a shared lock, and no decoding is timed before
# they have ended. Then comes what is wanted most: decoding compiled with batch 1, 32 and 8, then with gates, then prefill, eager decoding, and
# the backends. The tables come last.
# DLPLORA_GPU_SMOKE=1 runs the same steps with tiny shapes on a CPU, so that this script is tried wherever the tests run.
# PYTHON names the interpreter (default: .venv/bin/python, else python3). DLPLORA_COMMIT names the commit in a copy without .git.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT="${1:-results/bench}"
PYTHON="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}"
export TORCHINDUCTOR_COMPILE_THREADS="${TORCHINDUCTOR_COMPILE_THREADS:-4}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
mkdir -p "$OUT"

if [ "${DLPLORA_GPU_SMOKE:-0}" = 1 ]; then
  CONFIGS="gpu-smoke" PROCESSES=2
  SLOWER=5  # a busy CPU is no reason to cut a trial off
  TRAINING="--device cpu --num-tasks 2 --num-steps 2 --repeats 1 --modes peft_one_by_one,joint"
  CONSTANTS=""
  TESTS="tests/unit/test_bench_timing.py -k median"
else
  PROCESSES="$("$PYTHON" -c 'import sys, torch
if not torch.cuda.is_available():
    sys.exit("error: torch finds no GPU; DLPLORA_GPU_SMOKE=1 tries this script on a CPU")
print(min(6, max(1, int(torch.cuda.get_device_properties(0).total_memory / 18e9))))')" # the larger model takes 16 GB
  CONFIGS="gpu-1.5b gpu-8b" SLOWER=1
  TRAINING="--device cuda --num-tasks 26 --num-steps 20 --repeats 1 --group-size 26 --modes peft_one_by_one,joint"
  CONSTANTS="--device cuda --repeats 5 --out $OUT/cost_model-cuda.json"
  TESTS="tests/property/test_kernels.py tests/equivalence/test_on_a_gpu.py -m gpu"
fi
TURN="$(mktemp)"
trap 'rm -f "$TURN" "$TURN.tests"' EXIT

tests() {
  status=0
  timeout "$((120 * SLOWER))" "$PYTHON" -m pytest -q -p no:cacheprovider $TESTS >&2 9>&- || status=$?
  # 5: no test is marked. A time-out or a test file that cannot be read says nothing about the kernels.
  [ "$status" -le 1 ] || [ "$status" -eq 5 ] || echo "warning: the GPU tests did not finish (exit $status)" >&2
  echo "$status" >"$TURN.tests"
}
others() {
  tests &
  timeout "$((150 * SLOWER))" "$PYTHON" -m benchmarks.training_speed $TRAINING --out "$OUT" >&2 9>&- || echo "warning: the training benchmark did not finish" >&2
  if [ -n "$CONSTANTS" ]; then
    timeout 70 "$PYTHON" -m benchmarks.kernels $CONSTANTS >&2 9>&- || echo "warning: the constants were not measured" >&2
  fi
  wait
}
exec 9>"$TURN"
"$PYTHON" -c "import fcntl; fcntl.flock(9, fcntl.LOCK_SH)" # held by the functions above until they end
others &
exec 9>&-
timeout -k 20 "$((${SECONDS_IN_ALL:-520} * SLOWER))" "$PYTHON" -m benchmarks.latency_ratios $CONFIGS --processes "$PROCESSES" --prepare-seconds 300 --turn "$TURN" --out "$OUT" >/dev/null ||
  echo "warning: not all groups were timed" >&2
wait
if [ "$(cat "$TURN.tests")" = 1 ]; then
  echo "error: a GPU test failed; no figure of a wrong kernel counts" >&2
  exit 1
fi

"$PYTHON" -m tests.tools.targets --records "$OUT" --only-speed
for record in "$OUT"/latency-*.json; do
  [ ! -e "$record" ] || "$PYTHON" -c 'import sys; from pathlib import Path
from dlplora.reporting.latency.records import read_latency
from dlplora.reporting.latency.tables import markdown
print("\n" + markdown(read_latency(Path(sys.argv[1]))))' "$record"
done
