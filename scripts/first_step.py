"""How long `grpo-lab train quickstart` takes to its first optimiser step, beside what importing torch and transformers takes.

The run's own table of step times says when the step is done; the run is stopped then. Imports are measured in turns with
it, each in a new process, so that both meet the machine in the same state. One run before them is not counted: the first
start after an installation compiles our modules, and reads everything from the disk.

    python scripts/first_step.py --rounds 6
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

IMPORTS = "import gc, os; gc.disable(); import torch, transformers.modeling_utils; os._exit(0)"
LIMIT = 120.0  # seconds


def first_step(recipe: str) -> float:
    """Seconds from the start of the process until the first step stands on the disk."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        command = [
            sys.executable,
            "-m",
            "grpo_lab",
            "train",
            recipe,
            "--output-dir",
            folder,
            "--name",
            "run",
            "--quiet",
        ]
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            while not any(table.stat().st_size for table in Path(folder).glob("run/*/timing.jsonl")):
                if run.poll() is not None:
                    sys.exit(f"the run ended with exit code {run.returncode} before its first step")
                if time.perf_counter() - began > LIMIT:
                    sys.exit(f"no step after {LIMIT:.0f} s")
                time.sleep(0.01)
            return time.perf_counter() - began
        finally:
            run.kill()
            run.wait()


def imports() -> float:
    """Seconds that a process takes which only imports the libraries."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # with it every start would compile our modules again
    first_step(options.recipe)
    seconds: dict[str, list[float]] = {"first step": [], "imports alone": []}
    for _ in range(options.rounds):
        seconds["first step"].append(first_step(options.recipe))
        seconds["imports alone"].append(imports())
    for name, found in seconds.items():
        sys.stdout.write(f"{name:14} {median(found):.2f} s ({min(found):.2f} to {max(found):.2f}, {len(found)} runs)\n")


if __name__ == "__main__":
    main()
