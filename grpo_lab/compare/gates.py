"""Quantities with their difference and the gate that it must pass, as one table."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from grpo_lab.tracking.console import safe

MATTERS = 1e-3  # tensors whose gradient is below this share of the whole are left out of the cosine


@dataclass(frozen=True)
class Check:
    """One compared quantity. It passes where `difference` <= `gate`; a difference that is nan never does."""

    quantity: str
    difference: float
    gate: float
    detail: str = ""

    @property
    def passed(self) -> bool:
        return self.difference <= self.gate


def largest(quantity: str, one: Tensor, other: Tensor, gate: float, detail: str = "") -> Check:
    """The largest absolute difference between two tensors; inf where their shapes differ."""
    if one.shape != other.shape:
        return Check(quantity, math.inf, gate, f"shapes {tuple(one.shape)} and {tuple(other.shape)}")
    difference = (one.double() - other.double()).abs()
    return Check(quantity, float(difference.max()) if difference.numel() else 0.0, gate, detail)


def gradient_checks(one: Mapping[str, Tensor], other: Mapping[str, Tensor], *, gate: float) -> list[Check]:
    """Per tensor: the norm of the difference as a share of the whole gradient's norm, and 1 - cosine."""
    if one.keys() != other.keys():
        named = ", ".join(sorted(one.keys() ^ other.keys())[:3])
        return [Check("gradient", math.inf, gate, f"only one side has {named}")]
    whole = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in other.values()))
    share, worst = 0.0, ""
    turned, turned_at = 0.0, ""
    for name, tensor in other.items():
        a, b = one[name].double().flatten(), tensor.double().flatten()
        difference = float((a - b).norm()) / whole if whole > 0 else float((a - b).norm())
        if not difference <= share:
            share, worst = difference, short(name)
        if float(b.norm()) > MATTERS * whole:
            angle = 1 - float(torch.nn.functional.cosine_similarity(a, b, dim=0))
            if not angle <= turned:
                turned, turned_at = angle, short(name)
    return [
        Check("gradient", share, gate, f"norm {whole:.3g}; worst: {worst}" if worst else f"norm {whole:.3g}"),
        Check("gradient 1 - cosine", turned, 1e-5, f"worst: {turned_at}" if turned_at else ""),
    ]


def short(name: str) -> str:
    """A parameter's name without what peft puts around it."""
    return name.removeprefix("base_model.model.").replace(".default.", ".")


def worst_of(checks: Sequence[Check]) -> Check:
    """The one that comes closest to its gate, or exceeds it most."""
    return max(
        checks, key=lambda check: math.inf if math.isnan(check.difference) else check.difference / (check.gate or 1e-30)
    )


def first_failure(checks: Sequence[Check]) -> str | None:
    """The first quantity, in the order in which they are computed, that differs."""
    return next((check.quantity for check in checks if not check.passed), None)


def as_json(checks: Sequence[Check]) -> list[dict[str, Any]]:
    """Plain values; a difference that is not a number is its name."""
    return [
        {**asdict(check), "difference": check.difference if math.isfinite(check.difference) else str(check.difference)}
        | {"passed": check.passed}
        for check in checks
    ]


def table(title: str, checks: Sequence[Check]) -> Table:
    """One row per quantity."""
    shown = new_table(title, ["quantity", "difference", "gate", "", "detail"])
    for check in checks:
        verdict = "pass" if check.passed else "[bold red]FAIL[/]"
        shown.add_row(check.quantity, f"{check.difference:.1e}", f"{check.gate:.0e}", verdict, check.detail)
    return shown


def new_table(title: str, columns: Sequence[str]) -> Table:
    """An empty table in the house's style."""
    shown = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1))
    for column in columns:
        shown.add_column(safe(column), no_wrap=True)
    return shown
