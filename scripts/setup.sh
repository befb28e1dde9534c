# Sourced by demo.sh and test.sh: makes .venv in the project's root and installs what is asked for, once.
# Nothing is downloaded but packages. Usage: . scripts/setup.sh [extra]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
extra="${1:-}"
# Threads that spin while they wait slow a busy machine tenfold; torch reads this when it is imported.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"

if [ ! -x .venv/bin/python ]; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit("grpo-lab needs Python 3.11 or newer") if sys.version_info < (3, 11) else None'
    "${PYTHON:-python3}" -m venv .venv
fi
stamp=".venv/installed-${extra:-core}"
if [ ! -e "$stamp" ] || [ constraints.txt -nt "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
    # torch first and pinned: left to a later resolution, pip may choose a build with gigabytes of CUDA.
    .venv/bin/pip install -q -c constraints.txt torch
    .venv/bin/pip install -q -c constraints.txt -e ".${extra:+[$extra]}"
    touch "$stamp"
fi
