#!/usr/bin/env bash
# Set up and run the main job: a tiny model learns addition by GRPO (two or three minutes on two CPU cores).
# Run again, it shows the finished run; arguments go to `grpo-lab train`, e.g. `bash scripts/demo.sh seed=1 --name s1`.
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh" ""
exec .venv/bin/grpo-lab train recipes/quickstart.yaml --resume "$@"
