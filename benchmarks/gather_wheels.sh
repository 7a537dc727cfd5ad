#!/usr/bin/env bash
# Wheels of what this package needs and a GPU machine without a network lacks:
#   benchmarks/gather_wheels.sh [FOLDER]     (default: wheels)
# The versions are those of the environment that PYTHON names (default: .venv/bin/python, else python3), the files are for Python 3.12 on Linux.
# HAVE=FILE lists what the machine has, one name a line, as `pip list --format=freeze` prints it. Without it a usual image is assumed: PyTorch,
# transformers, Lightning, PEFT and the numerical packages. There:  pip install --no-index --no-deps --target SITE FOLDER/*.whl
# FOR=3.12 and MAX_MB=40 can be changed. Exit code 1 if the wheels are larger than MAX_MB together.
set -euo pipefail
cd "$(dirname "$0")/.."
FOLDER="${1:-wheels}"
PYTHON="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}"
PIP="${PIP:-python3 -m pip}"
mkdir -p "$FOLDER"

"$PYTHON" - "${HAVE:-}" >"$FOLDER/wanted.txt" <<'PY'
"""The requirements of dlplora, with theirs, that the other machine lacks, as NAME==VERSION."""
import re, sys
from importlib.metadata import PackageNotFoundError, distribution
from packaging.requirements import Requirement

USUAL = """torch transformers lightning pytorch-lightning lightning-utilities torchmetrics peft accelerate numpy scipy pandas pyarrow scikit-learn
matplotlib contourpy cycler fonttools kiwisolver pillow pyparsing tensorboard tensorboard-data-server grpcio protobuf markdown werkzeug absl-py
tokenizers safetensors huggingface-hub hf-xet regex requests urllib3 certifi idna charset-normalizer tqdm filelock fsspec packaging pyyaml click
jinja2 markupsafe networkx sympy mpmath setuptools six psutil httpx httpcore h11 anyio aiohttp aiohappyeyeballs aiosignal attrs
frozenlist multidict propcache yarl xxhash joblib threadpoolctl sacrebleu portalocker tabulate colorama lxml python-dateutil typer shellingham rich
pygments markdown-it-py mdurl pytest iniconfig pluggy hypothesis sortedcontainers triton"""

def plain(name): return re.sub(r"[-_.]+", "-", name).lower()

have = set(USUAL.split())
if sys.argv[1]:
    have = {plain(re.split(r"[=@ ]", line.strip())[0]) for line in open(sys.argv[1]) if line.strip()}
seen, todo, wanted = set(), ["dlplora", "gguf", "pytest", "hypothesis"], []
while todo:
    name = plain(todo.pop())
    if name in seen or name in have or name.startswith(("nvidia-", "cuda-")):
        continue
    seen.add(name)
    try:
        found = distribution(name)
    except PackageNotFoundError:
        print(f"warning: {name} is not installed here and was left out", file=sys.stderr)
        continue
    if name != "dlplora":
        wanted.append(f"{name}=={found.version}")
    for text in found.requires or ():
        one = Requirement(text)
        if one.marker is None or one.marker.evaluate({"extra": "", "python_version": "3.12", "python_full_version": "3.12.0"}):
            todo.append(one.name)
            for extra in one.extras:  # jsonargparse[omegaconf,signatures]
                try:
                    deps = distribution(one.name).requires or ()
                except PackageNotFoundError:
                    continue
                todo += [r.name for r in map(Requirement, deps) if r.marker is not None and r.marker.evaluate({"extra": extra})]
print("\n".join(sorted(wanted)))
PY

platforms=(manylinux1_x86_64 manylinux2014_x86_64 manylinux_2_17_x86_64 manylinux_2_27_x86_64 manylinux_2_28_x86_64 linux_x86_64)
failed=""
while read -r one; do
  $PIP download -q --no-deps --only-binary=:all: --python-version "${FOR:-3.12}" --implementation cp "${platforms[@]/#/--platform=}" -d "$FOLDER" "$one" ||
    $PIP wheel -q --no-deps -w "$FOLDER" "$one" || failed="$failed $one" # pure Python without a wheel
done <"$FOLDER/wanted.txt"
tag="cp$(echo "${FOR:-3.12}" | tr -d .)"
for wheel in "$FOLDER"/*.whl; do # a source distribution is built for the Python that runs this
  case "$(basename "$wheel")" in
  *-none-any.whl | *-"$tag"-* | *-abi3-*) ;;
  *) failed="$failed $(basename "$wheel") (not for $tag)" ;;
  esac
done
kb=$(du -ck "$FOLDER"/*.whl | tail -1 | cut -f1)
echo "$(ls "$FOLDER"/*.whl | wc -l) wheels, $((kb / 1024)) MB in $FOLDER${failed:+; not found:$failed}" >&2
[ -z "$failed" ] && [ "$kb" -le $((${MAX_MB:-40} * 1024)) ]
