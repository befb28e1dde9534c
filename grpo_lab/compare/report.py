"""What `grpo-lab compare RECIPE` measures, as plain values and as tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

from rich.console import Console
from rich.table import Table

from grpo_lab.assemble import Plan
from grpo_lab.compare.by_design import by_design
from grpo_lab.compare.gates import Check, as_json, first_failure, new_table, table
from grpo_lab.compare.parity import CASES, SHEET, Case, Parity, compare, partner
from grpo_lab.compare.recording import exact_policy
from grpo_lab.compare.runs import VERSIONS
from grpo_lab.compare.self_check import self_check
from grpo_lab.compare.sft_parity import CASES as SFT_CASES
from grpo_lab.compare.sft_parity import SftSubject, compare_sft
from grpo_lab.engines.trl_sft_config import sft_differences
from grpo_lab.errors import RecipeError, UsageError
from grpo_lab.recipe.presets import PRESETS
from grpo_lab.recipe.schema import Algorithm, GrpoStage
from grpo_lab.scoring import RewardSet, bind
from grpo_lab.stages.plan import GrpoPlan
from grpo_lab.types import Example, Policy

NUM_PROMPTS = 4
WITH_KL = 0.04  # beta where a preset has none of its own
COLUMNS = {  # quantity -> its heading
    "advantages": "adv.",
    "reference log-probs": "ref.",
    "log-probs": "logp",
    "KL": "KL",
    "loss": "loss",
    "gradient": "grad.",
    "weights": "weights",
}


@dataclass(frozen=True)
class Subject:
    """What is compared: the recipe's model in float32 as it is before any stage, and one GRPO stage of it."""

    policy: Policy
    plan: Plan
    name: str
    stage: GrpoStage
    rewards: RewardSet
    examples: list[Example]

    @property
    def seed(self) -> int:
        return self.plan.recipe.seed


def subject(plan: Plan, name: str | None, num_prompts: int) -> Subject:
    """The GRPO stage of that name, or the last one, with the first prompts that it would train on.

    Raises:
        UsageError: there is no such stage, or the number of prompts does not fit its mini-batches.
    """
    stages = [each for each in plan.stages if isinstance(each, GrpoPlan)]
    chosen = [each for each in stages if name in (None, each.name)]
    if not chosen:
        raise UsageError(f"no GRPO stage {name or ''}; there are: {', '.join(each.name for each in stages) or 'none'}")
    found = chosen[-1]
    parts = found.stage.algorithm.num_minibatches
    if num_prompts % parts:
        raise UsageError(f"--prompts {num_prompts}: must be a multiple of algorithm.num_minibatches ({parts})")
    policy, _ = exact_policy(plan, found.stage)
    examples: list[Example] = []
    while len(examples) < num_prompts:  # small data sets are gone round again
        examples += found.prompts.at(len(examples) // found.stage.prompts_per_step)
    return Subject(policy, plan, found.name, found.stage, found.rewards, examples[:num_prompts])


def parity_report(of: Subject) -> dict[str, Any]:
    """Every case of the recipe's own algorithm."""
    cases = [run_case(of, case) for case in CASES]
    return {
        **header(of),
        "cases": [parity_json(each) for each in cases],
        "by_design": []
        if partner(of.stage) == SHEET
        else by_design(of.policy, of.examples, of.rewards, of.stage, seed=of.seed),
        "passed": all(each.first_failure is None for each in cases),
    }


def sft_report(of: SftSubject) -> dict[str, Any]:
    """Every case of a supervised stage."""
    cases = [compare_sft(of, case) for case in SFT_CASES]
    return {
        **header(of),
        "cases": [parity_json(each) for each in cases],
        "by_design": sft_differences(of.stage),
        "passed": all(each.first_failure is None for each in cases),
    }


def presets_report(of: Subject) -> dict[str, Any]:
    """Every preset with the recipe's model, data, rewards and sizes, with a KL and without."""
    rows: list[dict[str, Any]] = []
    for name, algorithm in variants(of.stage.algorithm):
        stage = of.stage.model_copy(update={"algorithm": algorithm})
        one = replace(of, stage=stage, rewards=bind(stage.reward_terms, of.plan.registry))
        try:
            rows += [{"variant": name, **parity_json(run_case(one, case))} for case in CASES]
        except RecipeError as error:
            rows.append({"variant": name, "not_in_trl": error.problems})
    return {**header(of), "variants": rows, "passed": all(row.get("first_failure") is None for row in rows)}


def variants(base: Algorithm) -> list[tuple[str, Algorithm]]:
    """The presets, each with the KL it has (or with beta .04) and without one."""
    kept = {"num_iterations": base.num_iterations, "num_minibatches": base.num_minibatches}
    found = []
    for preset in PRESETS:
        own = Algorithm(preset=preset, **kept)  # type: ignore[arg-type]
        for beta in (own.beta, 0.0 if own.beta else WITH_KL):
            algorithm = Algorithm(preset=preset, beta=beta, **kept)  # type: ignore[arg-type]
            found.append((f"{preset} (beta {beta:g})", algorithm))
    return found


def run_case(of: Subject, case: Case) -> Parity:
    """One case of the stage."""
    return compare(of.policy, of.examples, of.rewards, of.stage, case, seed=of.seed)


def self_report(of: Subject, *, processes: int) -> dict[str, Any]:
    """The native engine against itself."""
    processes = min(processes, len(of.examples))  # each takes whole groups
    found = self_check(of.policy, of.examples, of.rewards, of.stage, seed=of.seed, processes=processes)
    failed = first_failure(found)
    return {**header(of), "checks": as_json(found), "first_failure": failed, "passed": failed is None}


def header(of: Subject | SftSubject) -> dict[str, Any]:
    """What was compared, and with which versions."""
    versions = {name: version(name) for name in VERSIONS}
    device = next(of.policy.model.parameters()).device.type
    return {"recipe": of.plan.recipe.name, "stage": of.name, "versions": versions, "device": device, "dtype": "float32"}


def parity_json(found: Parity) -> dict[str, Any]:
    """Plain values."""
    return {
        "case": found.case,
        "against": found.against,
        "checks": as_json(found.checks),
        "first_failure": found.first_failure,
        "notes": found.notes,
    }


def show_header(report: Mapping[str, Any], console: Console) -> None:
    """Which recipe, and which versions."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    line(console, f"{report['recipe']}, stage {report['stage']}; {report['device']}, {report['dtype']}; {versions}")


def show_parity(report: Mapping[str, Any], console: Console) -> None:
    """One table per case, its notes, and what differs by design."""
    show_header(report, console)
    for case in report["cases"]:
        console.print(table(f"native against {case['against']}: {case['case']}", checks_of(case["checks"])))
        for note in case["notes"]:
            line(console, f"  note: {note}")
    if report["by_design"]:
        line(console, "\nBy design the engines differ in:")
    for each in report["by_design"]:
        line(console, f"  - {each}")
    verdict(console, [case["first_failure"] for case in report["cases"]])


def show_presets(report: Mapping[str, Any], console: Console) -> None:
    """One row per variant and case: the largest difference of each quantity, as a share of its gate."""
    show_header(report, console)
    title = "differences as shares of their gates (1 = at the gate); trainers are TRL's"
    shown: Table = new_table(title, ["native", "against", "case", *COLUMNS.values(), ""])
    missing = []
    for row in report["variants"]:
        if "not_in_trl" in row:
            missing.append(row)
            continue
        shares = {check["quantity"]: share(check) for check in row["checks"]}
        cells = [short(shares[name]) if name in shares else "" for name in COLUMNS]
        passed = row["first_failure"] is None
        shown.add_row(
            row["variant"],
            row["against"],
            row["case"],
            *cells,
            "pass" if passed else f"[bold red]FAIL {row['first_failure']}[/]",
        )
    console.print(shown)
    for row in missing:
        line(console, f"  {row['variant']}: not compared. {'; '.join(row['not_in_trl'])}")
    verdict(console, [row.get("first_failure") for row in report["variants"]])


def share(check: Mapping[str, Any]) -> float:
    """A difference as a share of its gate."""
    return float(check["difference"]) / check["gate"] if check["gate"] else float(check["difference"])


def short(value: float) -> str:
    """In few places, however large."""
    return f"{value:.2f}" if value < 100 else f"{value:.0e}"


def show_self(report: Mapping[str, Any], console: Console) -> None:
    """One table."""
    show_header(report, console)
    console.print(
        table("native against itself: one optimiser step, in one piece and otherwise", checks_of(report["checks"]))
    )
    if any("processes" in row["quantity"] for row in report["checks"]):
        line(
            console,
            "  note: training itself runs in one process; several real ones each took some groups of this step,",
        )
        line(console, "  with the weights of the whole step, and added up their losses and gradients")
    verdict(console, [report["first_failure"]])


def checks_of(rows: Sequence[Mapping[str, Any]]) -> list[Check]:
    """Back from plain values."""
    return [Check(row["quantity"], float(row["difference"]), row["gate"], row["detail"]) for row in rows]


def verdict(console: Console, failures: Sequence[str | None]) -> None:
    """The outcome in one line; the first quantity that differs is nearest to the cause."""
    failed = [each for each in failures if each is not None]
    line(console, f"FAILED; first quantity that differs: {failed[0]}" if failed else "all gates passed")


def line(console: Console, text: str) -> None:
    """One line as it is."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
