"""Draws the README's picture of runs: training accuracy by step and held-out accuracy before and after, as SVG.

Run by hand: `.venv/bin/python scripts/picture.py runs/quickstart runs/quickstart-1 --to scripts/quickstart.svg`.
"""

import argparse
from pathlib import Path

from grpo_lab.compare.picture import Curve, draw
from grpo_lab.tracking.files import read_jsonl

TITLE = "accuracy by GRPO step: lines = sampled while training, rings = held-out, greedy"


def curve(run: Path, stage: str) -> Curve:
    """Training accuracy and held-out greedy accuracy of one run."""
    lines = read_jsonl(run / stage / "metrics.jsonl")
    trained = [(line["step"], line["rewards/accuracy/mean"]) for line in lines if "rewards/accuracy/mean" in line]
    measured = [(line["step"], line["eval_greedy/accuracy/mean"]) for line in lines if "eval_num_prompts" in line]
    return Curve(run.name, trained, rings=measured)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--stage", default="grpo")
    parser.add_argument("--to", type=Path, required=True)
    arguments = parser.parse_args()
    curves = [curve(run, arguments.stage) for run in arguments.runs]
    arguments.to.write_text(draw(TITLE, curves), encoding="utf-8")
