"""Draws the README's picture of runs: training accuracy by step and held-out accuracy before and after, as SVG.

Run by hand: `.venv/bin/python scripts/picture.py runs/quickstart runs/quickstart-1 --to scripts/quickstart.svg`.
"""

import argparse
from pathlib import Path

from grpo_lab.tracking.files import read_jsonl

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 320, 56, 16, 36, 44
COLOURS = ("#1f6feb", "#d1570a", "#1a7f37", "#8250df", "#cf222e")


def curve(run: Path, stage: str) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """(step, training accuracy) and (step, held-out greedy accuracy) of one run."""
    lines = read_jsonl(run / stage / "metrics.jsonl")
    trained = [(line["step"], line["rewards/accuracy/mean"]) for line in lines if "rewards/accuracy/mean" in line]
    measured = [(line["step"], line["eval_greedy/accuracy/mean"]) for line in lines if "eval_num_prompts" in line]
    return trained, measured


def draw(runs: list[Path], stage: str) -> str:
    """The picture: one colour a run, a line for training, rings for held-out accuracy."""
    curves = [curve(run, stage) for run in runs]
    last = max(step for trained, _ in curves for step, _ in trained)

    def place(step: float, value: float) -> tuple[float, float]:
        return (
            LEFT + (WIDTH - LEFT - RIGHT) * step / last,
            TOP + (HEIGHT - TOP - BOTTOM) * (1 - value),
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="20">accuracy by GRPO step: lines = sampled while training, rings = held-out, greedy</text>',
    ]
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = place(0, tick)
        parts.append(f'<path d="M{x:.1f} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{x - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for step in range(0, last + 1, 10):
        x, y = place(step, 0)
        parts.append(f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{step}</text>')
    for index, (run, (trained, measured)) in enumerate(zip(runs, curves, strict=True)):
        colour = COLOURS[index % len(COLOURS)]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in trained))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        for x, y in (place(*point) for point in measured):
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="none" stroke="{colour}" stroke-width="2"/>')
        y = HEIGHT - BOTTOM - 16 * (len(runs) - index)
        parts.append(f'<text x="{WIDTH - RIGHT - 8}" y="{y}" text-anchor="end" fill="{colour}">{run.name}</text>')
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--stage", default="grpo")
    parser.add_argument("--to", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.to.write_text(draw(arguments.runs, arguments.stage), encoding="utf-8")
