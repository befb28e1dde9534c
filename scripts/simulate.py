"""Predicts the time of a step from measured times, for other numbers of trainers and samplers, and names the bottleneck.

    .venv/bin/python scripts/simulate.py --sample 24 --score 2 --learn 12 --prompts 8 --trainers 1 2 4 --samplers 0 2 4
    .venv/bin/python scripts/simulate.py --run runs/quickstart/grpo --prompts 8 --trainers 1 2      # its measured medians

The times are of one step by one trainer and one sampler alone. With 0 samplers the trainers sample themselves, as
`train --nproc` and torchrun do; otherwise that many samplers draw the completions beside them. What is assumed:

- Groups are dealt whole, so of P prompts the busiest of n processes has ceil(P / n).
- Sampling has a part that more processes do not shorten (`--longest`: one completion of full length, alone).
- Adding up gradients sends each of n trainers 2 (n - 1) / n times the gradient (`--gradient-mib`, `--mib-per-second`).
- Sending weights to samplers (`--sync`) stops both sides.
- "in turn": sample, score, learn, one after the other. "one step off": a step's completions are drawn while the step
  before is learnt, with the weights before that (a queue of depth one; its correction costs nothing measurable).
- Nothing else is lost: caches, memory bandwidth, uneven lengths. So times are a lower bound for several processes on one
  machine, whose cores share all of that.
"""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import median


@dataclass(frozen=True)
class Measured:
    """Seconds of one step's phases by one trainer and one sampler, and what limits their division."""

    sample: float
    score: float
    learn: float
    prompts: int
    longest: float = 0.0
    sync: float = 0.0
    gradient_mib: float = 0.0
    mib_per_second: float = 1000.0


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step, of its phases, and the phase that decides."""

    step: float
    phases: dict[str, float]
    bottleneck: str


def share(things: int, processes: int) -> float:
    """The busiest process's share.

    >>> share(8, 3)
    0.375
    """
    return math.ceil(things / processes) / things


def phases(measured: Measured, trainers: int, samplers: int) -> dict[str, float]:
    """Seconds of each phase; without samplers the trainers draw the completions."""
    drawn_by = samplers or trainers
    exchange = 2 * (trainers - 1) / trainers * measured.gradient_mib / measured.mib_per_second
    return {
        "sample": measured.longest + (measured.sample - measured.longest) * share(measured.prompts, drawn_by),
        "score": measured.score * share(measured.prompts, trainers),
        "learn": measured.learn * share(measured.prompts, trainers) + exchange,
        "sync": measured.sync if samplers else 0.0,
    }


def in_turn(measured: Measured, trainers: int, samplers: int) -> Prediction:
    """A step whose phases come one after the other."""
    found = phases(measured, trainers, samplers)
    return Prediction(sum(found.values()), found, max(found, key=lambda name: found[name]))


def one_step_off(measured: Measured, trainers: int, samplers: int) -> Prediction:
    """A step whose completions were drawn while the step before was learnt. Scoring belongs to the drawing side."""
    found = phases(measured, trainers, samplers)
    drawing, learning = found["sample"] + found["score"], found["learn"]
    side = ["sample", "score"] if drawing > learning else ["learn"]
    return Prediction(max(drawing, learning) + found["sync"], found, max(side, key=lambda name: found[name]))


def balanced(measured: Measured, trainers: int) -> int | None:
    """The fewest samplers with which learning never waits in a run one step off; None where no number suffices."""
    for samplers in range(1, measured.prompts + 1):
        found = phases(measured, trainers, samplers)
        if found["sample"] + found["score"] <= found["learn"]:
            return samplers
    return None


def measured_medians(stage: Path) -> dict[str, float]:
    """The medians of a stage's logged steps; the first step, which warms up, is left out where there are more."""
    lines = [json.loads(line) for line in (stage / "timing.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "step_seconds" in line]
    steps = steps[1:] or steps
    return {name: median(line[f"{name}_seconds"] for line in steps) for name in ("sample", "score", "learn")}


def table(measured: Measured, trainers: list[int], samplers: list[int]) -> list[str]:
    """One row for each number of trainers and samplers, as a markdown table."""
    lines = ["| trainers | samplers | way | step, s | sample | score | learn | sync | bottleneck |", "|" + "---|" * 9]
    for count in trainers:
        for others in samplers:
            ways = [("in turn", in_turn)] + ([("one step off", one_step_off)] if others else [])
            for way, predict in ways:
                found = predict(measured, count, others)
                seconds = " | ".join(f"{found.phases[name]:.3g}" for name in ("sample", "score", "learn", "sync"))
                lines.append(
                    f"| {count} | {others or '-'} | {way} | {found.step:.3g} | {seconds} | {found.bottleneck} |"
                )
        if any(samplers):
            enough = balanced(measured, count)
            said = f"{enough} sampler(s)" if enough else "no number of samplers"
            lines.append(f"| {count} | | learning never waits with | {said} | | | | | |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a stage's folder, whose medians are taken")
    for name in ("sample", "score", "learn"):
        parser.add_argument(f"--{name}", type=float, help="seconds of a step" + ("" if name == "score" else ", alone"))
    parser.add_argument("--prompts", type=int, required=True, help="prompts per step")
    parser.add_argument("--trainers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--samplers", type=int, nargs="+", default=[0], help="0: the trainers sample")
    parser.add_argument("--longest", type=float, default=0.0, help="seconds of one longest completion, alone")
    parser.add_argument("--sync", type=float, default=0.0, help="seconds of sending weights to samplers")
    parser.add_argument("--gradient-mib", type=float, default=0.0)
    parser.add_argument("--mib-per-second", type=float, default=1000.0)
    given = parser.parse_args()
    times = measured_medians(given.run) if given.run else {}
    times |= {name: getattr(given, name) for name in ("sample", "score", "learn") if getattr(given, name) is not None}
    missing = {"sample", "score", "learn"} - times.keys()
    if missing:
        parser.error(f"give --run, or also --{' --'.join(sorted(missing))}")
    measured = Measured(
        **times,
        prompts=given.prompts,
        longest=given.longest,
        sync=given.sync,
        gradient_mib=given.gradient_mib,
        mib_per_second=given.mib_per_second,
    )
    print("\n".join(table(measured, given.trainers, given.samplers)))  # noqa: T201


if __name__ == "__main__":
    main()
